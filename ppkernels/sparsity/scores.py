"""Scores: what a weight is worth. The entries with the smallest scores are pruned.

A score is a frozen dataclass with one method ``of``. It may be written by anybody: it gets the
weights by name and gives back, for each, a tensor of its shape whose magnitudes are ranked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ppkernels.ops import power_backward
from ppkernels.sparsity.weights import Weight


@runtime_checkable
class Score(Protocol):
    """What a `Pruner` asks of a score."""

    def of(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """What ranks each weight's entries: by |θ| of what comes back, as `pp.topk_mask` does."""


@dataclass(frozen=True)
class Magnitude:
    """|θ|: the smallest weights go first.

    The weights are ranked where they lie; where a layer stores φ, by α·log2|φ| only if exponents
    differ.
    """

    def of(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """The weights themselves."""
        return dict(weights)


@dataclass(frozen=True)
class Random:
    """Uniform random numbers: the same for each pruning, on every device and in every run.

    They are drawn anew from ``seed`` each time, one weight after the other in the order of the
    model's layers. So a gradual schedule gives nested random masks, and nothing has to be saved.

    Args:
        seed: any whole number from 0 to 2^64 − 1.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.seed, Integral) or isinstance(self.seed, bool):
            raise TypeError(f"Random: seed must be a whole number, got {self.seed!r}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"Random: seed must be from 0 to 2^64 - 1, got {self.seed}")

    def of(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """Numbers from [0, 1), float32, drawn on the CPU."""
        generator = torch.Generator(device="cpu").manual_seed(int(self.seed))
        return {
            name: Weight(
                torch.rand(weight.stored.shape, generator=generator, device="cpu").to(
                    weight.stored.device
                )
            )
            for name, weight in weights.items()
        }


@dataclass(frozen=True)
class Gradient:
    """|∂L/∂θ|, from the ``.grad`` that the weights have at the moment of pruning.

    Where a layer stores φ, ``.grad`` is ∂L/∂φ = ∂L/∂θ·α|φ|^(α−1), and is divided by that factor, in
    float64. At φ = 0 with α > 1 the factor is 0 and ∂L/∂θ is lost: the score is 0 there. Such an
    entry is 0 and stays 0 in training, so it is the first to go.
    """

    def of(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """∂L/∂θ."""
        return {name: Weight(_grad_of_theta(name, weight)) for name, weight in weights.items()}


@dataclass(frozen=True)
class Sensitivity:
    """|θ·∂L/∂θ|: by how much, to first order, the loss changes when θ goes to 0.

    ``.grad`` is that of the moment of pruning. Where a layer stores φ this is |φ·∂L/∂φ|/α, with
    nothing divided by a factor that may be 0. The product is taken in float32, or in float64 for
    float64 weights.

    Source: Lee et al., "SNIP: Single-shot network pruning based on connection sensitivity", 2019,
    equation 6, without its normalisation, which does not change the ranks.
    """

    def of(self, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """θ·∂L/∂θ."""
        return {name: Weight(_sensitivity(name, weight)) for name, weight in weights.items()}


def _sensitivity(name: str, weight: Weight) -> Tensor:
    stored = weight.stored.detach()
    wide = torch.promote_types(stored.dtype, torch.float32)
    product = stored.to(wide) * _grad("Sensitivity", name, weight).to(wide)
    return product if weight.alpha is None else product / weight.alpha.to(wide)


def _grad_of_theta(name: str, weight: Weight) -> Tensor:
    grad = _grad("Gradient", name, weight)
    if weight.alpha is None:
        return grad
    stored = weight.stored.detach().double()
    # α|φ|^(α−1) is the gradient of θ = Ψ(φ).
    factor = power_backward(torch.ones_like(stored), stored, weight.alpha)
    return torch.where(factor > 0, grad.double() / factor, 0.0)


def _grad(score: str, name: str, weight: Weight) -> Tensor:
    grad = weight.stored.grad
    if grad is None:
        raise RuntimeError(
            f"{score}: the weight of {name!r} has no gradient; prune between loss.backward() and "
            "optimizer.zero_grad()"
        )
    if grad.layout is not torch.strided:
        raise TypeError(f"{score}: the gradient of {name!r} must be dense, got {grad.layout}")
    return grad.detach()
