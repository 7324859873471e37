"""Statistics of the powered weights in pure PyTorch: the specification of every implementation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppkernels.ops._bits import unpacked
from ppkernels.ops.power.reference import power


def statistics(
    weight: Tensor,
    alpha: Tensor,
    epsilons: Sequence[float],
    bins: int,
    low: float,
    high: float,
    words: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Moments and counts of θ = power(weight, alpha), rounded to weight's dtype as `power` does.

    Args:
        weight: any shape.
        alpha: 0-dim float64; 1 for weights that hold θ.
        epsilons: E numbers, none of them NaN.
        bins: B ≥ 0 bins of one width over [low, high].
        low, high: low < high; with bins, high − low and B / (high − low) are finite.
        words: those of a mask; entries whose bit is 0 are left out. None: none are.

    Returns:
        moments, float64 [5]: min θ, max θ, Σθ, Σ|θ|, Σθ²; of no entries inf, −inf, 0, 0, 0; with a
        NaN among the entries all of them NaN. A least or largest θ that is a zero is +0.
        counts, int64 [2 + E + B]: entries, NaNs among them, entries with |θ| < ε for each ε, and
        the histogram. Entries with low ≤ θ ≤ high lie in bin ⌊(θ − low) · (B / (high − low))⌋, each
        operation rounded to float64, or in the last one where that is B or, by rounding, more.
    """
    theta = power(weight.detach(), alpha).reshape(-1)
    if words is not None:
        theta = theta[unpacked(words, theta.shape)]
    x = theta.double()
    is_nan = x.isnan()
    below = [(x.abs() < epsilon).sum() for epsilon in epsilons]
    ends = x.new_tensor([torch.inf, -torch.inf])
    # + 0.0 makes +0 of −0: which of two zeros is the least would depend on their order.
    extremes = [torch.cat([x, ends[:1]]).min() + 0.0, torch.cat([x, ends[1:]]).max() + 0.0]
    moments = torch.stack([*extremes, x.sum(), x.abs().sum(), (x * x).sum()])
    moments = torch.where(is_nan.any(), torch.nan, moments)
    entries = torch.tensor(x.numel(), device=x.device)
    histogram = _histogram(x, bins, low, high)
    counts = torch.cat([torch.stack([entries, is_nan.sum(), *below]), histogram])
    return moments, counts


def _histogram(x: Tensor, bins: int, low: float, high: float) -> Tensor:
    if bins == 0:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    inside = x[(x >= low) & (x <= high)]
    place = ((inside - low) * (bins / (high - low))).floor().long()
    return torch.bincount(place.clamp(max=bins - 1), minlength=bins)
