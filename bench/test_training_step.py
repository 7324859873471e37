"""pytest-benchmark: whole training steps, dense and powered, from the registry."""

from collections.abc import Callable


def test_training_step(timed: Callable[[], None], contender: str) -> None:
    timed()
