"""θ as the network sees it, in numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ppkernels.ops import BitMask, Statistics, statistics


def seen(
    name: str,
    weight: Tensor,
    alpha: Tensor | None,
    mask: BitMask | None,
    epsilons: Sequence[float],
    bins: int,
    entries: int,
) -> tuple[Statistics, int]:
    """The statistics of θ as the network sees it, and how many of its ``entries`` are 0.

    ``alpha`` is that of a φ in ``weight``; ε are distinct. What is hidden, or not stored, is 0.
    """
    # Nothing but 0 is below the least number of the dtype.
    limits = torch.finfo(weight.dtype)
    least = limits.smallest_normal * limits.eps
    # By its name, for the errors of `statistics`.
    one, within = {name: weight}, None if mask is None else {name: mask}
    try:
        found = statistics(one, [*epsilons, least], alpha, within=within)[name]
    except ValueError as error:
        raise ValueError(f"report: the weight of {name!r}: {error}") from error
    largest = max(-found.min, found.max) if found.count else 0.0
    if largest == float("inf"):
        raise ValueError(f"report: there is an infinite weight in {name!r}")
    if bins:
        if largest > sys.float_info.max / 2:
            raise ValueError(
                f"report: |theta| goes up to {largest:g} in {name!r}, and no histogram is as wide "
                "as twice that; bins=0 makes a report without any"
            )
        # A width of a layer that is 0 throughout.
        largest = largest if largest > torch.finfo(torch.float32).tiny else 1.0
        ends = (-largest, largest)
        counted = statistics(one, (), alpha, bins=bins, range=ends, within=within)[name]
        found = replace(found, histogram=counted.histogram, range=ends)
    found = _with_zeros(found, entries - found.count)
    zeros = found.counts_below[-1]
    return replace(found, epsilons=tuple(epsilons), counts_below=found.counts_below[:-1]), zeros


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
        counts_below=tuple(count + hidden for count in found.counts_below),
        histogram=tuple(histogram),
    )


def epsilon_text(epsilon: float) -> str:
    """ε in few digits, but never those of another one."""
    short = f"{epsilon:g}"
    return short if float(short) == epsilon else repr(epsilon)
