"""Schedules: when they prune, and how much; the formulas again in plain Python."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ppkernels.sparsity import Cosine, Cubic, Iterative, OneShot, Schedule

KEPT = st.floats(0.001, 1)
STEPS = st.integers(0, 60)
GRADUAL = st.builds(
    lambda kind, kept, begin, length, every: kind(kept, begin, begin + length, every),
    st.sampled_from([Cubic, Cosine]),
    KEPT,
    STEPS,
    st.integers(1, 60),
    st.integers(1, 20),
)
ITERATIVE = st.builds(Iterative, KEPT, st.integers(1, 9), st.integers(1, 9), STEPS)
ANY = st.one_of(st.builds(OneShot, KEPT, STEPS), GRADUAL, ITERATIVE)


def due(schedule: Schedule) -> list[int]:
    return [step for step in range(300) if schedule.is_due(step)]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        (OneShot(0.1), [0]),
        (OneShot(0.1, at=7), [7]),
        (Cubic(0.1, 0, 10, 5), [5, 10]),
        (Cubic(0.1, 3, 14, 5), [8, 13, 14]),
        (Cosine(0.1, 3, 14, 5), [8, 13, 14]),
        (Cubic(0.1, 3, 6), [4, 5, 6]),
        (Cubic(0.1, 3, 6, every=100), [6]),
        (Iterative(0.1, rounds=3, every=4), [4, 8, 12]),
        (Iterative(0.1, rounds=2, every=4, begin=3), [7, 11]),
    ],
    ids=str,
)
def test_prunes_at(schedule: Schedule, steps: list[int]) -> None:
    assert due(schedule) == steps


SPARSITY_AT = {
    # s_t = s_f + (s_i − s_f)(1 − (t − t0)/(nΔt))³ with s_i = 0, as Zhu & Gupta write it.
    Cubic: lambda final, way: final - final * (1 - way) ** 3,
    Cosine: lambda final, way: final * (1 - math.cos(math.pi * way)) / 2,
}


@pytest.mark.parametrize("kind", SPARSITY_AT)
@given(kept=st.floats(0, 1), begin=STEPS, length=st.integers(1, 50), step=st.integers(0, 120))
def test_gradual_formula(
    kind: Callable[..., Schedule], kept: float, begin: int, length: int, step: int
) -> None:
    way = min(max((step - begin) / length, 0), 1)
    pruned = SPARSITY_AT[kind](1 - kept, way)
    assert kind(kept, begin, begin + length).share(step, kept) == pytest.approx(1 - pruned)


@given(kept=KEPT, rounds=st.integers(1, 9), every=st.integers(1, 5), begin=STEPS)
def test_iterative_keeps_the_same_part_each_round(
    kept: float, rounds: int, every: int, begin: int
) -> None:
    schedule = Iterative(kept, rounds, every, begin)
    shares = [schedule.share(step, kept) for step in due(schedule)]
    assert len(shares) == rounds
    for before, after in zip([1.0, *shares], shares, strict=False):
        assert after / before == pytest.approx(kept ** (1 / rounds))


@given(schedule=ANY)
def test_shares_fall_from_one_to_kept(schedule: Any) -> None:
    shares = [schedule.share(step, schedule.kept) for step in range(300)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1 or schedule == OneShot(schedule.kept, 0)
    last = due(schedule)[-1]
    assert all(share == schedule.kept for share in shares[last:])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: OneShot(1.5), ValueError, "OneShot: kept must be a number from 0 to 1, got 1.5"),
        (lambda: OneShot("5 %"), TypeError, "OneShot: kept must be a number from 0 to 1"),
        (lambda: OneShot(0.5, -1), ValueError, "OneShot: at must be a whole number >= 0, got -1"),
        (lambda: OneShot(0.5, 1.0), TypeError, "at must be a whole number >= 0, got 1.0"),
        (lambda: Cubic(0.5, 5, 5), ValueError, "end must be a whole number >= 6, got 5"),
        (
            lambda: Cosine(0.5, -1, 5),
            ValueError,
            "begin must be a whole number >= 0, got -1",
        ),
        (
            lambda: Cubic(0.5, 0, 5, 0),
            ValueError,
            "Cubic: every must be a whole number >= 1, got 0",
        ),
        (
            lambda: Iterative(0.5, 0, 5),
            ValueError,
            "Iterative: rounds must be a whole number >= 1, got 0",
        ),
        (lambda: Iterative(0.0, 2, 5), ValueError, "Iterative: kept must be above 0"),
        (
            lambda: Iterative(0.5, True, 5),
            TypeError,
            "rounds must be a whole number >= 1, got True",
        ),
    ],
)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()
