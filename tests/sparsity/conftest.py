"""Models that the tests of this folder prune, and how they are trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import ppkernels as pp


def _model(kind: str = "theta", alpha: float = 1.5) -> nn.Sequential:
    """20-30-10: plain, or powered and storing what ``kind`` says."""
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    return model if kind == "plain" else pp.powerize(model, alpha, kind)


@pytest.fixture
def make_model() -> Callable[..., nn.Sequential]:
    """``make_model(kind, alpha)``: 20-30-10, ``"plain"``, ``"theta"`` or ``"phi"``."""
    return _model


def _backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(8, 20)).square().mean().backward()


@pytest.fixture
def backward() -> Callable[[nn.Module], None]:
    """``backward(model)``: new gradients for such a model."""
    return _backward
