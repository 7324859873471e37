"""Statistics of the powered weights as a PyTorch op: public function, schema, kernels.

The CPU kernels register themselves from csrc/bindings/statistics.cpp when ppkernels._C is loaded.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from ppkernels import _backend
from ppkernels._checks import alpha_tensor, check_floating, check_words_for
from ppkernels._many import Many
from ppkernels.ops.bitmask import BitMask
from ppkernels.ops.statistics import reference

Alpha = float | Tensor | None


@dataclass(frozen=True)
class Statistics:
    """What `pp.statistics` counts of a weight; several are `combined` into those of them all.

    Attributes:
        count: how many entries were looked at.
        min, max: the least and the largest θ; inf and −inf of no entries.
        sum, sum_abs, sum_square: Σθ, Σ|θ|, Σθ².
        below: for each ε, how many entries have |θ| < ε.
        histogram: how many entries lie in each bin; a tuple of ints, empty without bins.
        range: the ends of the histogram, (low, high); None without bins.
    """

    count: int
    min: float
    max: float
    sum: float
    sum_abs: float
    sum_square: float
    below: Mapping[float, int]
    histogram: tuple[int, ...] = ()
    range: tuple[float, float] | None = None

    @property
    def mean(self) -> float:
        """Mean of θ; NaN of no entries, as the others."""
        return self._per_entry(self.sum)

    @property
    def mean_abs(self) -> float:
        """Mean of |θ|."""
        return self._per_entry(self.sum_abs)

    @property
    def mean_square(self) -> float:
        """Mean of θ², the second moment."""
        return self._per_entry(self.sum_square)

    def share_below(self, epsilon: float) -> float:
        """The share of entries with |θ| < ε, one of those that were asked for."""
        return self._per_entry(self.below[epsilon])

    def _per_entry(self, total: float) -> float:
        return total / self.count if self.count else math.nan

    @classmethod
    def combined(cls, parts: Iterable[Statistics]) -> Statistics:
        """The statistics of all entries of several weights together.

        Raises:
            ValueError: no parts, or parts of different ε, bins or range.
        """
        several = list(parts)
        if not several:
            raise ValueError("Statistics.combined: there are no parts")
        first = several[0]
        for other in several[1:]:
            if (
                list(other.below) != list(first.below)
                or other.range != first.range
                or len(other.histogram) != len(first.histogram)
            ):
                raise ValueError(
                    "Statistics.combined: the parts must have the same epsilons, bins and range"
                )
        return cls(
            count=sum(part.count for part in several),
            min=min(part.min for part in several),
            max=max(part.max for part in several),
            sum=math.fsum(part.sum for part in several),
            sum_abs=math.fsum(part.sum_abs for part in several),
            sum_square=math.fsum(part.sum_square for part in several),
            below={
                epsilon: sum(part.below[epsilon] for part in several) for epsilon in first.below
            },
            histogram=tuple(
                sum(counts) for counts in zip(*(part.histogram for part in several), strict=True)
            ),
            range=first.range,
        )


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
    anywhere. Sums are taken in float64, in an order that depends on nothing but the shape.

    Args:
        tensors: one tensor, or a list or mapping of some: float32, float64, bfloat16 or float16,
            of any shapes and strides.
        epsilons: the ε for which entries with |θ| < ε are counted.
        alpha: α of the tensors that hold φ; None for those that hold θ. One for all, or a list or
            mapping like ``tensors``.
        bins: bins of the histogram; 0 for none.
        range: its ends, low < high; entries outside are in no bin, high itself is in the last one.
        within: masks like ``tensors``; entries whose bit is 0 are left out.

    Returns:
        `Statistics`, or a list or dict of them, as ``tensors`` came.

    Raises:
        TypeError: tensors, numbers or masks of another kind.
        ValueError: a tensor in which there is a NaN, which the error names; bins without a range;
            lists that do not go together.

    A GPU is waited for, once a tensor.
    """
    many = Many("statistics", tensors)
    limits = [_number("epsilons", epsilon) for epsilon in epsilons]
    low, high = _checked_range(bins, range)
    alphas = many.each("alpha", alpha)
    masks = many.each("within", within)
    results = []
    for name, weight, own_alpha, mask in zip(many.names, many.tensors, alphas, masks, strict=True):
        check_floating("statistics", name, weight)
        words = None if mask is None else _words(name, weight, mask)
        exponent = alpha_tensor("statistics", 1.0 if own_alpha is None else own_alpha)
        count = reference.statistics
        if not _backend.uses_reference():
            count = torch.ops.ppkernels.statistics
        moments, counts = count(weight.detach(), exponent, limits, bins, low, high, words)
        results.append(_read(name, moments, counts, limits, (low, high) if bins else None))
    return many.like(results)


def _read(
    name: str,
    moments: Tensor,
    counts: Tensor,
    epsilons: list[float],
    range: tuple[float, float] | None,
) -> Statistics:
    entries, nans, *rest = counts.tolist()
    if nans:
        raise ValueError(f"statistics: there is a NaN in {name}")
    least, largest, *sums = moments.tolist()
    return Statistics(
        entries,
        least,
        largest,
        sums[0],
        sums[1],
        sums[2],
        below=dict(zip(epsilons, rest, strict=False)),
        histogram=tuple(rest[len(epsilons) :]),
        range=range,
    )


def _words(name: str, weight: Tensor, mask: Any) -> Tensor:
    if not isinstance(mask, BitMask):
        raise TypeError(
            f"statistics: within must be a pp.BitMask for {name}, got {type(mask).__name__}"
        )
    if mask.shape != weight.shape:
        raise ValueError(
            f"statistics: within must have the shape of {name}, {tuple(weight.shape)}, got "
            f"{tuple(mask.shape)}"
        )
    check_words_for("statistics", mask.words, weight)
    return mask.words


def _checked_range(bins: Any, range: Any) -> tuple[float, float]:
    if not isinstance(bins, int) or isinstance(bins, bool) or bins < 0:
        raise ValueError(f"statistics: bins must be a whole number >= 0, got {bins!r}")
    if bins == 0:
        return 0.0, 1.0
    if range is None:
        raise ValueError(f"statistics: {bins} bins need a range, (low, high)")
    low, high = (_number("range", end) for end in range)
    if not (low < high and math.isfinite(high - low)):
        raise ValueError(f"statistics: range must be (low, high) with low < high, got {range}")
    return low, high


def _number(name: str, value: Any) -> float:
    number = float(value)
    if math.isnan(number):
        raise ValueError(f"statistics: {name} must be numbers, got {value!r}")
    return number


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
