"""Models for the tests on a GPU, whose bodies run on the CPU as well wherever that says something.

`pytest -m gpu` runs all that needs a GPU, here and in tests/ops, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ppkernels as pp

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (pp.optim.PowerSGD, {"lr": 0.05, "momentum": 0.9}),
    "adamw": (pp.optim.PowerAdamW, {"lr": 0.01, "weight_decay": 0.1}),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["theta", "phi"])
def stores(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=OPTIMIZERS)
def optimizer_of(request: pytest.FixtureRequest) -> Callable[..., torch.optim.Optimizer]:
    """``optimizer_of(model, **options)``: one of the two optimizers."""
    make, own = OPTIMIZERS[request.param]
    return lambda params, **options: make(params, **{**own, **options})


@pytest.fixture
def network() -> Callable[..., nn.Sequential]:
    """``network(stores)``: a powered convolution and two layers, plain parameters, both masks."""

    def make(stores: str = "theta") -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(128, 33))
        model.extend([nn.LayerNorm(33), nn.Linear(33, 5)])
        pp.powerize(model, 1.5, stores)
        pp.set_alpha(model[3], 2.0, keep="theta")
        model[0].update_mask = pp.BitMask.pack(torch.rand(8, 3, 3, 3) < 0.7)
        model[3].update_mask = pp.BitMask.pack(torch.rand(33, 128) < 0.7)
        model[5].mask = pp.BitMask.pack(torch.rand(5, 33) < 0.9)
        return model

    return make


@pytest.fixture
def batch() -> Callable[[int], tuple[Tensor, Tensor]]:
    """``batch(step)``: what `network` learns in a step, float64 on the CPU."""

    def draw(step: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(step)
        x = torch.randn(16, 3, 6, 6, generator=random, dtype=torch.float64)
        return x, torch.randn(16, 5, generator=random, dtype=torch.float64)

    return draw


# Of torch.backends: on a GPU convolutions take TF32 for float32, and add up in any order.
PRECISION = [("cudnn", "allow_tf32", False), ("cudnn", "deterministic", True)]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two runs differ by is not PyTorch's doing."""
    for backend, flag, value in PRECISION:
        monkeypatch.setattr(getattr(torch.backends, backend), flag, value)
