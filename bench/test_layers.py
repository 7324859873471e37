"""pytest-benchmark: what a powered layer adds to a small nn.Linear, from the registry."""

from collections.abc import Callable


def test_layers(timed: Callable[[], None], contender: str) -> None:
    timed()
