"""pytest-benchmark: sparse layers, from the registry."""

from collections.abc import Callable


def test_sparse(timed: Callable[[], None], contender: str) -> None:
    timed()
