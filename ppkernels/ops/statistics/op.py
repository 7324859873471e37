"""Statistics of the powered weights as a PyTorch op: public function, schema, kernels.

The CPU kernels register themselves from csrc/bindings/statistics.cpp when ppkernels._C is loaded.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, overload

import torch
from torch import Tensor

from ppkernels import _backend
from ppkernels._checks import alpha_tensor, check_floating, check_has_values, check_numbers
from ppkernels._many import Many
from ppkernels.ops.bitmask import BitMask, words_within
from ppkernels.ops.statistics import reference
from ppkernels.ops.statistics.result import Statistics

Alpha = float | Tensor | None

# Each thread counts in tables of its own, 32 bytes a bin.
MOST_BINS = 2**20

# ---- public functions


@overload
def statistics(
    tensors: Tensor,
    epsilons: Sequence[float] = (),
    alpha: Alpha = None,
    *,
    bins: int = 0,
    range: tuple[float, float] | None = None,
    within: BitMask | None = None,
) -> Statistics: ...


@overload
def statistics(
    tensors: Mapping[str, Tensor],
    epsilons: Sequence[float] = (),
    alpha: Alpha | Mapping[str, Alpha] = None,
    *,
    bins: int = 0,
    range: tuple[float, float] | None = None,
    within: Mapping[str, BitMask | None] | None = None,
) -> dict[str, Statistics]: ...


@overload
def statistics(
    tensors: Sequence[Tensor],
    epsilons: Sequence[float] = (),
    alpha: Alpha | Sequence[Alpha] = None,
    *,
    bins: int = 0,
    range: tuple[float, float] | None = None,
    within: Sequence[BitMask | None] | None = None,
) -> list[Statistics]: ...


def statistics(
    tensors: Any,
    epsilons: Sequence[float] = (),
    alpha: Any = None,
    *,
    bins: int = 0,
    range: tuple[float, float] | None = None,
    within: Any = None,
) -> Any:
    """How θ is distributed: small entries counted, extremes, moments, a histogram; one pass each.

    θ is what `pp.power` makes of φ, rounded to its dtype, or what is stored; it is not written
    anywhere. Counts, extremes and histogram are exact. Sums are taken in float64; those of n
    entries are off by less than (n / 2^15 + 2^11 + 5) · 2^-53 of Σ|θ|, or of Σθ² (CPU kernels; by
    the order in kernels/statistics.h). On a CPU they have the same bits on every run, with any
    number of threads, and on every instruction set for which θ has; they depend on the order in
    which the entries are added up, that of memory for a tensor that fills one piece of it, and else
    row-major.

    Args:
        tensors: one tensor, or a list or mapping of some: float32, float64, bfloat16 or float16,
            of any shapes and strides.
        epsilons: the ε ≥ 0 for which entries with |θ| < ε are counted, compared in float64.
        alpha: α of the tensors that hold φ; None for those that hold θ. One for all, or a list or
            mapping like ``tensors``.
        bins: bins of one width of the histogram; 0 for none.
        range: its ends, low < high, needed with bins. Entries outside are in no bin; high itself is
            in the last one. θ is in bin ⌊(θ − low) · (bins / (high − low))⌋, in float64.
        within: masks like ``tensors``; entries whose bit is 0 are left out, whatever they are.

    Returns:
        `Statistics`, or a list or dict of them, as ``tensors`` came. Infinite θ count: among the
        extremes, in the sums (inf and −inf add up to NaN), and as below no ε.

    Raises:
        TypeError: tensors, numbers or masks of another kind.
        ValueError: a tensor in which there is a NaN, which the error names, or which has no values
            (on the meta device); α below 1; a negative ε; bins without a range, and a range that is
            empty, infinite, or too narrow for so many bins; lists that do not go together.

    The results are Python numbers: a GPU is waited for, once for all tensors if they are on one, so
    that no CUDA graph can hold a call, and torch.compile leaves its graph there. The raw op,
    ``torch.ops.ppkernels.statistics``, returns tensors and waits for nothing.
    """
    many = Many("statistics", tensors)
    limits = _limits(epsilons)
    bins, ends = _bins(bins, range)
    alphas, labels = many.each("alpha", alpha), many.labels("alpha", alpha)
    masks = many.each("within", within)
    calls = []
    for name, weight, exponent, label, mask in zip(
        many.names, many.tensors, alphas, labels, masks, strict=True
    ):
        check_floating("statistics", name, weight)
        check_has_values("statistics", name, weight)
        words = None if mask is None else words_within("statistics", mask, name, weight)
        if exponent is None:
            power = _ONE
        else:
            power = alpha_tensor("statistics", exponent, weight.device, label)
        calls.append((weight.detach(), power, limits, bins, *ends, words))
    find = reference.statistics
    if not _backend.uses_reference():
        find = torch.ops.ppkernels.statistics.default
    found = [find(*call) for call in calls]
    moments, counts = (_numbers([pair[i] for pair in found]) for i in (0, 1))
    results = [
        _read(*each, limits, ends if bins else None)
        for each in zip(many.names, moments, counts, strict=True)
    ]
    return many.like(results)


# θ itself; what `alpha_tensor` would make of 1 at each call.
_ONE = torch.ones((), dtype=torch.float64, device="cpu")


def _numbers(tensors: list[Tensor]) -> list[list[Any]]:
    """The numbers in each of some tensors of one size; one device is waited for once."""
    if not tensors:
        return []
    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.cpu() for tensor in tensors]
    return torch.stack(tensors).tolist()


def _read(
    name: str,
    moments: list[float],
    counts: list[int],
    epsilons: list[float],
    range: tuple[float, float] | None,
) -> Statistics:
    entries, nans, *rest = counts
    if nans:
        raise ValueError(f"statistics: there is a NaN in {name} ({nans} of {entries} entries)")
    below, histogram = rest[: len(epsilons)], rest[len(epsilons) :]
    least, largest, total, total_abs, total_square = moments
    return Statistics(
        count=entries,
        min=least,
        max=largest,
        sum=total,
        sum_abs=total_abs,
        sum_square=total_square,
        epsilons=tuple(epsilons),
        counts_below=tuple(below),
        histogram=tuple(histogram),
        range=range,
    )


def _limits(epsilons: Any) -> list[float]:
    limits = check_numbers("statistics", "epsilons", epsilons)
    for limit in limits:
        if not limit >= 0:
            raise ValueError(f"statistics: epsilons must be numbers >= 0, got {limit}")
    return limits


def _bins(bins: Any, range: Any) -> tuple[int, tuple[float, float]]:
    """The number of bins and their ends, (0, 1) without."""
    if not isinstance(bins, Integral) or isinstance(bins, bool):
        raise TypeError(f"statistics: bins must be a whole number, got {bins!r}")
    bins = int(bins)
    if not 0 <= bins <= MOST_BINS:
        raise ValueError(f"statistics: bins must be a number from 0 to {MOST_BINS}, got {bins}")
    if range is None:
        if bins > 0:
            raise ValueError(f"statistics: {bins} bins need a range, (low, high)")
        return 0, (0.0, 1.0)
    if not isinstance(range, (tuple, list)) or len(range) != 2:
        raise TypeError(f"statistics: range must be a pair of numbers, (low, high), got {range!r}")
    low, high = check_numbers("statistics", "range", range)
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(
            "statistics: range must be (low, high) with low < high and a finite difference, got "
            f"({low}, {high})"
        )
    if not math.isfinite(bins / (high - low)):
        raise ValueError(f"statistics: range ({low}, {high}) is too narrow for {bins} bins")
    return bins, (low, high)


# ---- schema, and the kernels of every device but the CPU

_SCHEMA = (
    "(Tensor weight, Tensor alpha, float[] epsilons, int bins, float low, float high, "
    "Tensor? words) -> (Tensor moments, Tensor counts)"
)


def _shapes(
    weight: Tensor, alpha: Tensor, epsilons: list[float], bins: int, *_: Any
) -> tuple[Tensor, Tensor]:
    return (
        weight.new_empty(5, dtype=torch.float64),
        weight.new_empty(2 + len(epsilons) + bins, dtype=torch.int64),
    )


def _launch(*args: Any) -> tuple[Tensor, Tensor]:
    # Triton is imported by the first call on a GPU, never by `import ppkernels`.
    from ppkernels.ops.statistics import gpu

    return gpu.statistics(*args)


torch.library.define("ppkernels::statistics", _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
torch.library.register_fake("ppkernels::statistics", _shapes)
# The reference, wherever nothing better is registered for a device.
torch.library.impl("ppkernels::statistics", "CompositeExplicitAutograd", reference.statistics)
if importlib.util.find_spec("triton") is not None:
    torch.library.impl("ppkernels::statistics", "CUDA", _launch)
