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
        epsilons: E numbers.
        bins: B ≥ 0 bins of one width over [low, high]; the last one includes high.
        low, high: float64, low < high.
        words: those of a mask; entries whose bit is 0 are left out. None: none are.

    Returns:
        moments, float64 [5]: min θ, max θ, Σθ, Σ|θ|, Σθ²; of no entries inf, −inf, 0, 0, 0; with a
        NaN among the entries all of them NaN.
        counts, int64 [2 + E + B]: entries, NaNs among them, entries with |θ| < ε for each ε, and
        the histogram, in whose bin b lie ⌊(θ − low) · (B / (high − low))⌋ = b.
    """
    theta = power(weight.detach(), alpha).reshape(-1)
    if words is not None:
        theta = theta[unpacked(words, theta.shape)]
    x = theta.double()
    is_nan = x.isnan()
    below = [(x.abs() < epsilon).sum() for epsilon in epsilons]
    place = ((x - low) * (bins / (high - low))).floor()
    inside = (x >= low) & (x <= high)
    histogram = torch.bincount(place[inside].long().clamp(max=bins - 1), minlength=bins)[:bins]
    ends = x.new_tensor([torch.inf, -torch.inf])
    edges = [torch.cat([x, ends[:1]]).min(), torch.cat([x, ends[1:]]).max()]
    moments = torch.stack([*edges, x.sum(), x.abs().sum(), (x * x).sum()])
    moments = torch.where(is_nan.any(), torch.nan, moments)
    entries = torch.tensor(x.numel(), device=x.device)
    counts = torch.cat([torch.stack([entries, is_nan.sum(), *below]), histogram])
    return moments, counts
