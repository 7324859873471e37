"""Whether weights were written to, other than by the steps of optimizers, which keep their masks.

A tensor counts the writes to it. The counts are read before and after each step of each optimizer,
by global hooks of torch.optim that are there from the first pruning on, and after the hooks that
put frozen entries back. What has been counted at another time is somebody else's write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)


class Watch:
    """Looks after some weights from `start` on.

    A write through ``.data`` is not counted by torch, and not seen here.
    """

    def __init__(self) -> None:
        self._weights: Sequence[Tensor] = ()
        self._counts: list[int] = []
        self._was_written = False

    def start(self, weights: Sequence[Tensor]) -> None:
        """Begin anew, with these weights."""
        # Inference tensors have no count.
        self._weights = [weight for weight in weights if not weight.is_inference()]
        self._counts = self._now()
        self._was_written = False
        if not _watches:
            _hook()
        _watches.add(self)

    def is_written(self) -> bool:
        """Whether anybody but an optimizer has written to the weights since `start`."""
        return self._was_written or self._now() != self._counts

    def before_step(self) -> None:
        """Note what was written before an optimizer writes."""
        self._was_written = self.is_written()

    def after_step(self) -> None:
        """Take what an optimizer has written as known."""
        self._counts = self._now()

    def _now(self) -> list[int]:
        return [weight._version for weight in self._weights]


_watches: WeakSet[Watch] = WeakSet()
_hooks: list[Any] = []


def _hook() -> None:
    if not _hooks:
        _hooks.append(register_optimizer_step_pre_hook(_before_step))
        _hooks.append(register_optimizer_step_post_hook(_after_step))


@_disable_dynamo
def _before_step(*_: Any) -> None:
    for watch in _watches:
        watch.before_step()


@_disable_dynamo
def _after_step(*_: Any) -> None:
    for watch in _watches:
        watch.after_step()
