"""θ as the network sees it, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ppkernels._powered import PoweredLayer
from ppkernels.ops import BitMask, Statistics, statistics


def seen(
    name: str,
    weight: Tensor,
    powered: PoweredLayer | None,
    mask: BitMask | None,
    epsilons: Sequence[float],
    bins: int,
) -> tuple[Statistics, int]:
    """The statistics of θ as the network sees it, and how many of its entries are 0."""
    alpha = powered.alpha if powered is not None and powered.stores == "phi" else None
    # Nothing but 0 is below the least number of the dtype.
    limits = torch.finfo(weight.dtype)
    least = limits.smallest_normal * limits.eps
    # By its name, for the errors of `statistics`.
    one = {name: weight}
    within = None if mask is None else {name: mask}
    found = statistics(one, [*epsilons, least], alpha, within=within)[name]
    largest = max(-found.min, found.max) if found.count else 0.0
    if largest == float("inf"):
        raise ValueError(f"report: there is an infinite weight in {name!r}")
    if bins:
        # A width of a layer that is 0 throughout.
        largest = largest if largest > torch.finfo(torch.float32).tiny else 1.0
        ends = (-largest, largest)
        counted = statistics(one, (), alpha, bins=bins, range=ends, within=within)[name]
        found = replace(found, histogram=counted.histogram, range=ends)
    found = _with_zeros(found, weight.numel() - found.count)
    below = {epsilon: found.below[epsilon] for epsilon in map(float, epsilons)}
    return replace(found, below=below), found.below[least]


def _with_zeros(found: Statistics, hidden: int) -> Statistics:
    """``found`` with as many more entries that are 0."""
    if hidden == 0:
        return found
    histogram = list(found.histogram)
    if histogram:
        # The range lies around 0.
        histogram[len(histogram) // 2] += hidden
    return replace(
        found,
        count=found.count + hidden,
        min=min(found.min, 0.0),
        max=max(found.max, 0.0),
        below={epsilon: count + hidden for epsilon, count in found.below.items()},
        histogram=tuple(histogram),
    )


def bin_edges(found: Statistics) -> list[float]:
    """The edges of the histogram's bins, one more than there are bins."""
    low, high = found.range or (0.0, 0.0)
    bins = len(found.histogram)
    return [low + (high - low) * edge / bins for edge in range(bins + 1)]
