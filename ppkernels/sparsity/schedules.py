"""Schedules: when to prune, and which share of the weights to keep then.

A schedule is a frozen dataclass. Steps are counted in calls of `Pruner.step`, which follow the
optimizer's: "at step 100" is after 100 optimizer steps; step 0 is before the first. ``kept`` is the
share of the weights that is left in the end, from 0 to 1, or None where the distribution says so
(`PerLayer`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

from ppkernels._shares import check_share


@runtime_checkable
class Schedule(Protocol):
    """What a `Pruner` asks of a schedule."""

    @property
    def kept(self) -> float | None:
        """The share kept in the end."""

    def is_due(self, step: int) -> bool:
        """Whether to prune at ``step``."""

    def share(self, step: int, kept: float) -> float:
        """The share kept at ``step`` on the way from 1 to ``kept``; it never rises."""


@dataclass(frozen=True)
class OneShot:
    """Everything at once, at step ``at``.

    With ``at=0`` that is before training: call `Pruner.prune` there.

    Args:
        kept: the share kept; None where the distribution says so.
        at: ≥ 0.
    """

    kept: float | None
    at: int = 0

    def __post_init__(self) -> None:
        _check_kept(self)
        _check_whole(self, "at", at_least=0)

    def is_due(self, step: int) -> bool:
        """At ``at`` only."""
        return step == self.at

    def share(self, step: int, kept: float) -> float:
        """1 before ``at``, ``kept`` from then on."""
        return kept if step >= self.at else 1.0


@dataclass(frozen=True)
class _Gradual:
    """A curve from 1 at ``begin`` to ``kept`` at ``end``."""

    kept: float | None
    begin: int
    end: int
    every: int = 1

    def __post_init__(self) -> None:
        _check_kept(self)
        _check_whole(self, "begin", at_least=0)
        _check_whole(self, "end", at_least=self.begin + 1)
        _check_whole(self, "every", at_least=1)

    def is_due(self, step: int) -> bool:
        """At begin + every, begin + 2·every, ... before ``end``, and at ``end``."""
        if step == self.end:
            return True
        return self.begin < step < self.end and (step - self.begin) % self.every == 0

    def share(self, step: int, kept: float) -> float:
        """The curve's value; 1 up to ``begin``, exactly ``kept`` from ``end`` on."""
        if step <= self.begin:
            return 1.0
        if step >= self.end:
            return kept
        way = (step - self.begin) / (self.end - self.begin)
        return kept + (1 - kept) * self._left(way)

    def _left(self, way: float) -> float:
        """What is left to prune, from 1 to 0, after a part of the ``way``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cubic(_Gradual):
    """Much at first, ever less: kept + (1 − kept)·(1 − (t − begin)/(end − begin))³ at step t.

    Prunes at begin + every, begin + 2·every, ... and in any case at ``end``, where exactly ``kept``
    is left; nothing before and nothing after. (At ``begin`` the formula says 1.)

    Args:
        kept: the share kept from ``end`` on; None where the distribution says so.
        begin: ≥ 0.
        end: > begin.
        every: steps from one pruning to the next, ≥ 1.

    Source: Zhu & Gupta, "To prune, or not to prune", 2017, equation 1, with initial sparsity 0.
    """

    def _left(self, way: float) -> float:
        return (1 - way) ** 3


@dataclass(frozen=True)
class Cosine(_Gradual):
    """Slow, fast, slow: kept + (1 − kept)·(1 + cos(π·(t − begin)/(end − begin)))/2 at step t.

    Prunes at begin + every, begin + 2·every, ... and in any case at ``end``, where exactly ``kept``
    is left; nothing before and nothing after.

    Args:
        kept: the share kept from ``end`` on; None where the distribution says so.
        begin: ≥ 0.
        end: > begin.
        every: steps from one pruning to the next, ≥ 1.
    """

    def _left(self, way: float) -> float:
        return (1 + math.cos(math.pi * way)) / 2


@dataclass(frozen=True)
class Iterative:
    """Rounds of training, each followed by a pruning that keeps the same part of what was left.

    Round r of ``rounds`` ends at step begin + r·every, where kept^(r/rounds) is left: exactly
    ``kept`` after the last. Together with `Pruner.rewind` this finds lottery tickets, with the
    weights remembered at step ``begin``: 0 for those of the start, a little more for late
    rewinding. `Pruner` shows the loop.

    Args:
        kept: the share kept after the last round, > 0; None where the distribution says so.
        rounds: ≥ 1.
        every: the steps of a round, ≥ 1.
        begin: the step at which the first round begins, ≥ 0.

    Sources: Frankle & Carbin, "The lottery ticket hypothesis", 2019, strategy 1 of appendix B;
    Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", 2020, for begin >
    0.
    """

    kept: float | None
    rounds: int
    every: int
    begin: int = 0

    def __post_init__(self) -> None:
        _check_kept(self)
        if self.kept == 0:
            raise ValueError("Iterative: kept must be above 0, for no round would keep a part of 0")
        _check_whole(self, "rounds", at_least=1)
        _check_whole(self, "every", at_least=1)
        _check_whole(self, "begin", at_least=0)

    def is_due(self, step: int) -> bool:
        """At the end of each round."""
        since = step - self.begin
        return since % self.every == 0 and 1 <= since // self.every <= self.rounds

    def share(self, step: int, kept: float) -> float:
        """kept^(r/rounds) from the end of round r on."""
        rounds = (step - self.begin) // self.every
        if rounds >= self.rounds:
            return kept
        return float(kept ** (max(rounds, 0) / self.rounds))


def _check_kept(schedule: Any) -> None:
    if schedule.kept is not None:
        check_share(type(schedule).__name__, "kept", schedule.kept)


def _check_whole(schedule: Any, name: str, *, at_least: int) -> None:
    value = getattr(schedule, name)
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(
            f"{type(schedule).__name__}: {name} must be a whole number of "
            f"{'rounds' if name == 'rounds' else 'steps'}, got {value!r}"
        )
    if value < at_least:
        raise ValueError(
            f"{type(schedule).__name__}: {name} must be at least {at_least}, got {value}"
        )
