"""Scores: what a weight is worth. The entries with the smallest scores are pruned.

A score is a frozen dataclass with one method ``of``. It may be written by anybody: it gets the
weights by name and gives back, for each, a tensor of its shape whose magnitudes are ranked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ppkernels._checks import DTYPES, check_whole
from ppkernels.ops import BitMask, power_backward
from ppkernels.sparsity.weights import Weight


class NonFiniteGradient(ValueError):
    """A gradient has an infinity or a NaN, as after an overflow that a GradScaler takes care of.

    A score of gradients raises it, and `Pruner.step` waits then for the next one.
    """


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
        if check_whole("Random", "seed", self.seed, at_least=0) >= 2**64:
            raise ValueError(f"Random: seed must be below 2^64, got {self.seed}")

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

    It may be accumulated, clipped as a whole or scaled by one number; all weights must have one,
    and it must be finite (`Pruner.step` waits for that). At entries that are frozen an optimizer
    of torch has set it to 0; they are not ranked.

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
    float64 weights; products too small for it are 0, and of equal ones the first are kept.

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
    if not bool(grad.isfinite().all()):
        raise NonFiniteGradient(
            f"{score}: the gradient of {name!r} has an infinity or a NaN; prune after a backward "
            "without"
        )
    return grad.detach()


def check_scores(
    score: Score, weights: Mapping[str, Weight], within: Mapping[str, BitMask | None]
) -> dict[str, Weight]:
    """What ``score`` says of ``weights``: one ranking for each, of its shape, in their order.

    Raises:
        TypeError, ValueError: it says anything else, or NaN of an entry ``within``.
    """
    ranked = score.of(weights)
    if not isinstance(ranked, Mapping) or ranked.keys() != weights.keys():
        found = list(ranked) if isinstance(ranked, Mapping) else type(ranked).__name__
        raise ValueError(
            f"Pruner: {score}.of must give back a mapping with the names {list(weights)}, got "
            f"{found}"
        )
    for name, weight in weights.items():
        one, of_it = ranked[name], f"Pruner: {score}.of({name!r})"
        if not isinstance(one, Weight) or not isinstance(one.stored, Tensor):
            raise TypeError(f"{of_it} must be a Weight of a tensor, got {type(one).__name__}")
        if one.stored.dtype not in DTYPES:
            raise TypeError(f"{of_it} must be of a floating dtype, got {one.stored.dtype}")
        if one.stored.shape != weight.stored.shape:
            raise ValueError(
                f"{of_it} must have the shape of the weight, {tuple(weight.stored.shape)}, got "
                f"{tuple(one.stored.shape)}"
            )
        is_nan, mask = one.stored.detach().isnan(), within[name]
        if bool(is_nan.any()) and (mask is None or bool((is_nan & mask.unpack()).any())):
            raise ValueError(f"{of_it} has a NaN")
    return {name: ranked[name] for name in weights}
