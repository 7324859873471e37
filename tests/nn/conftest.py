"""Models that several tests of this folder take apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import ppkernels as pp


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


class ConvNet(nn.Module):
    """Convolutions, a norm, groups, a layer that is called twice and one that is not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.drop = nn.Dropout(0.5)
        self.flat = nn.Linear(64, 24)
        self.twice = nn.Linear(24, 24)
        self.head = nn.Linear(24, 10)
        self.spare = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.second(self.grouped(x).relu()).relu()
        x = self.drop(self.flat(x.flatten(1)).relu())
        return self.head(self.twice(self.twice(x).relu()).relu())


def _pruned(kind: str = "plain", kept: float = 0.3) -> ConvNet:
    """The network with ``kept`` of each layer's weights left, powered if ``kind`` is a word for it.

    ``"zeros"``: plain layers that have zeros, and no masks.
    """
    model = ConvNet()
    if kind in ("theta", "phi"):
        pp.powerize(model, 1.5, kind)
    pp.sparsity.Pruner(model, pp.sparsity.OneShot(kept), distribution=pp.sparsity.Uniform()).prune()
    return pp.fold(model) if kind == "zeros" else model


@pytest.fixture
def pruned() -> Callable[..., nn.Module]:
    """``pruned(kind, kept)``: a pruned network for images of 3x4x4."""
    return _pruned


@pytest.fixture
def faster() -> Callable[..., tuple[float, float]]:
    """A measure that finds every sparse layer twice as fast."""
    return lambda dense, sparse, calls, training: (2e-3, 1e-3)
