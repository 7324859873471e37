"""What `statistics` is tested on and how exact it must be; the rest of ppkernels.testing.

Counts, extremes and histograms are exact. A sum may err by `SUM_ERROR` of the sum of sizes, which
is what a sum of as many float64 numbers may err in any order of blocks and lanes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ppkernels import ops, reference

STATISTICS = ("statistics",)

# An exact sum of n numbers is n roundings away at most; lanes and blocks make it far fewer.
SUM_ERROR = 2.0**-40
EPSILONS = (1e-3, 0.25, 0.0, 1e-60, math.inf)
BINS, RANGE = 7, (-0.5, 0.25)

# None, one, a remainder, more than a block for each of two threads.
_SIZES = (0, 1, 37, 4_999, 70_001)
_ALPHAS = (1.0, 1.5, 2.0, 2.7)


def edge_values(dtype: torch.dtype) -> Tensor:
    """θ on which statistics turn: zeros, ends of bins and ε, neighbours of both, infinities."""
    low, high = RANGE
    edges = [low + (high - low) * place / BINS for place in range(BINS + 1)]
    edges += [0.0, 1e-3, 0.25, 1e-60, torch.finfo(dtype).tiny, math.inf]
    exact = torch.tensor(edges, dtype=torch.float64).to(dtype)
    up, down = torch.full_like(exact, math.inf), torch.full_like(exact, -math.inf)
    near = torch.cat([exact, torch.nextafter(exact, up), torch.nextafter(exact, down)])
    return torch.cat([near, -near])  # [6 · edges]


def check_statistics(op: str, device: str, dtypes: Sequence[torch.dtype]) -> None:
    """Raise AssertionError unless `statistics` is right, with and without a mask.

    What it should find is taken, in float64 and in Python's exact sums, from the θ that `power`
    gives on the same device.
    """
    generator = torch.Generator().manual_seed(0)
    for dtype in dtypes:
        for size in _SIZES:
            weight = (torch.randn(size, generator=generator) * 0.3).to(dtype)
            kept = torch.rand(size, generator=generator) < 0.6
            weights = [weight, edge_values(dtype)] if size == 37 else [weight]
            for each in weights:
                mask = kept if len(each) == size else None
                for alpha in _ALPHAS:
                    _check(each.to(device), alpha, None)
                    if mask is not None:
                        _check(each.to(device), alpha, mask.to(device))


def _check(weight: Tensor, alpha: float, mask: Tensor | None) -> None:
    called = f"statistics: {weight.dtype}, alpha={alpha}, {len(weight)} entries, " + (
        "no mask" if mask is None else "masked"
    )
    theta = ops.power(weight, alpha)
    found = ops.statistics(
        weight,
        EPSILONS,
        alpha,
        bins=BINS,
        range=RANGE,
        within=None if mask is None else ops.BitMask.pack(mask),
    )
    one = torch.ones((), dtype=torch.float64)
    words = None if mask is None else ops.pack_bits(mask)
    moments, counts = reference.statistics(theta, one, EPSILONS, BINS, *RANGE, words)
    came = [found.count, 0, *found.counts_below, *found.histogram]
    assert came == counts.tolist(), f"{called}: counts {counts.tolist()}, got {came}"
    least, largest = moments[:2].tolist()
    assert (found.min, found.max) == (least, largest), (
        f"{called}: extremes {least} and {largest}, got {found.min} and {found.max}"
    )
    x = (theta if mask is None else theta[mask]).double()
    for name, terms in (("sum", x), ("sum_abs", x.abs()), ("sum_square", x * x)):
        _check_sum(f"{called}: {name}", getattr(found, name), terms.tolist())


def _check_sum(called: str, came: float, terms: list[float]) -> None:
    finite = all(map(math.isfinite, terms))
    exact = math.fsum(terms) if finite else sum(terms)
    if not finite:
        assert came == exact or (math.isnan(came) and math.isnan(exact)), (
            f"{called}: {exact}, got {came}"
        )
        return
    error, allowed = abs(came - exact), SUM_ERROR * math.fsum(map(abs, terms))
    assert error <= allowed, f"{called}: {exact}, got {came}; allowed is an error of {allowed}"
