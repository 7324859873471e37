"""pytest-benchmark: selections of the largest weights, from the registry."""

from collections.abc import Callable


def test_select(timed: Callable[[], None], contender: str) -> None:
    timed()
