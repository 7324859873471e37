"""`pp.Statistics`: what is found in a weight, as plain numbers."""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Statistics:
    """What `pp.statistics` finds in a weight; several are `combined` into those of them all.

    Immutable; plain numbers and tuples of them, so that it can be compared, hashed and pickled.

    Attributes:
        count: how many entries were looked at.
        min, max: the least and the largest θ; inf and −inf of no entries.
        sum, sum_abs, sum_square: Σθ, Σ|θ|, Σθ².
        epsilons: the ε that were asked for.
        counts_below: for each of them, how many entries have |θ| < ε.
        histogram: how many entries lie in each bin; empty without bins.
        range: the ends of the histogram, (low, high); None without bins.
    """

    count: int
    min: float
    max: float
    sum: float
    sum_abs: float
    sum_square: float
    epsilons: tuple[float, ...] = ()
    counts_below: tuple[int, ...] = ()
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

    @property
    def below(self) -> dict[float, int]:
        """How many entries have |θ| < ε, by ε."""
        return dict(zip(self.epsilons, self.counts_below, strict=True))

    def share_below(self, epsilon: float) -> float:
        """The share of entries with |θ| < ε; NaN of no entries.

        Raises:
            ValueError: an ε that is none of those that were asked for.
        """
        below = self.below
        if epsilon not in below:
            raise ValueError(
                f"Statistics.share_below: epsilon must be one of {self.epsilons}, which were "
                f"counted, got {epsilon!r}"
            )
        return self._per_entry(below[epsilon])

    @property
    def edges(self) -> tuple[float, ...]:
        """The ends of the bins, one more than there are bins, for plots; empty without bins."""
        if self.range is None:
            return ()
        low, high = self.range
        bins = len(self.histogram)
        return (*(low + (high - low) * (bin / bins) for bin in builtins.range(bins)), high)

    def _per_entry(self, total: float) -> float:
        return total / self.count if self.count else math.nan

    @classmethod
    def combined(cls, parts: Iterable[Statistics]) -> Statistics:
        """The statistics of all entries of several weights together; sums are rounded once.

        Raises:
            TypeError: a part that is no `Statistics`.
            ValueError: no parts, or parts of different ε, bins or range.
        """
        several = list(parts)
        if not several:
            raise ValueError("Statistics.combined: there are no parts")
        first = several[0]
        for part in several:
            if not isinstance(part, Statistics):
                raise TypeError(
                    f"Statistics.combined: parts must be pp.Statistics, got {type(part).__name__}"
                )
            if part._questions() != first._questions():
                raise ValueError(
                    "Statistics.combined: the parts must have the same epsilons, bins and range, "
                    f"got {first._questions()} and {part._questions()}"
                )
        return cls(
            count=sum(part.count for part in several),
            min=min(part.min for part in several),
            max=max(part.max for part in several),
            sum=_total(part.sum for part in several),
            sum_abs=_total(part.sum_abs for part in several),
            sum_square=_total(part.sum_square for part in several),
            epsilons=first.epsilons,
            counts_below=_added(part.counts_below for part in several),
            histogram=_added(part.histogram for part in several),
            range=first.range,
        )

    def _questions(self) -> tuple[tuple[float, ...], int, tuple[float, float] | None]:
        """What was asked for: ε, bins, range."""
        return self.epsilons, len(self.histogram), self.range


def _total(values: Iterable[float]) -> float:
    several = list(values)
    try:
        return math.fsum(several)
    except (OverflowError, ValueError):  # beyond float64, or inf and −inf: as floats add up
        return sum(several)


def _added(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(map(sum, zip(*counts, strict=True)))
