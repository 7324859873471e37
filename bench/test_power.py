"""pytest-benchmark: the power ops and their rivals, from the registry."""

from collections.abc import Callable


def test_power(timed: Callable[[], None], contender: str) -> None:
    timed()
