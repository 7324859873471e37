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
