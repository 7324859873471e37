"""pytest-benchmark: the optimizers' steps alone, powered and plain, from the registry."""

from collections.abc import Callable


def test_step(timed: Callable[[], None], contender: str) -> None:
    timed()
