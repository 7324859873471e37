"""A model that several tests of this folder take apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class TiedModel(nn.Module):
    """A small language model of 17 tokens whose output layer has the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(17, 8)
        self.mix = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2
        )
        self.head = nn.Linear(8, 17, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(torch.tanh(self.mix(self.tokens(x)))))


@pytest.fixture
def tied_model() -> type[nn.Module]:
    """The class, to be made as often as a test likes."""
    return TiedModel
