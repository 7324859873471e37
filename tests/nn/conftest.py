"""Models and layers that several tests of this folder take apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

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


# A dense layer, and the input that it is given.
DENSE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 10), (6, 24)),
    "wide linear": (lambda: nn.Linear(70_000, 2, bias=False), (2, 3, 70_000)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "strided conv": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), bias=False),
        (2, 3, 8, 7),
    ),
    "same conv": (lambda: nn.Conv2d(3, 4, 3, padding="same", dilation=2), (2, 3, 7, 7)),
    "1x1 conv": (lambda: nn.Conv2d(8, 6, 1), (2, 8, 5, 5)),
}
SparsePair = Callable[..., tuple[nn.Module, nn.Module, Tensor]]


@pytest.fixture(params=DENSE)
def sparse_pair(request: pytest.FixtureRequest) -> SparsePair:
    """``sparse_pair(stores)``: a pruned layer with masks, its sparse one, and an input.

    ``stores`` is None for a plain layer. Of each kind in turn.
    """

    def make(stores: str | None, alpha: float = 2.0) -> tuple[nn.Module, nn.Module, Tensor]:
        make_dense, size = DENSE[request.param]
        dense = make_dense()
        kept = torch.rand_like(dense.weight) < 0.3
        with torch.no_grad():
            dense.weight.mul_(kept)
        if stores is None:
            pp.nn.add_masks(dense)
        else:
            pp.powerize(dense, alpha, stores)
        dense.update_mask = pp.BitMask.pack(kept)
        is_conv = isinstance(dense, nn.Conv2d)
        convert = pp.nn.SparseConv2d.from_conv if is_conv else pp.nn.SparseLinear.from_linear
        return dense, convert(dense), torch.randn(size)

    return make
