"""The optimizers that a user hands over, and what they keep of a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer


def optimizers_of(op: str, optimizer: Any) -> list[Optimizer]:
    """One optimizer, several or none, as a list."""
    if optimizer is None:
        return []
    wanted = f"{op}: optimizer must be a torch.optim.Optimizer or several, got "
    if isinstance(optimizer, Optimizer):
        return [optimizer]
    if not isinstance(optimizer, Iterable):
        raise TypeError(wanted + type(optimizer).__name__)
    optimizers = list(optimizer)
    for other in optimizers:
        if not isinstance(other, Optimizer):
            raise TypeError(wanted + type(other).__name__)
    return optimizers


def innermost(optimizer: Optimizer) -> Optimizer:
    """The optimizer that has the states: ZeroRedundancyOptimizer and its like step another one."""
    while isinstance(inner := getattr(optimizer, "optim", None), Optimizer):
        optimizer = inner
    return optimizer


def group_of(optimizer: Optimizer, weight: Tensor | None) -> dict[str, Any] | None:
    """The parameter group that has ``weight``."""
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            return group
    return None


def check_one_has(
    op: str, optimizers: Iterable[Optimizer], weights: Iterable[Tensor], whose: str
) -> None:
    """At least one of ``optimizers``, if there are any, has one of ``weights``."""
    own, given = {id(weight) for weight in weights}, list(optimizers)
    groups = [group["params"] for optimizer in given for group in optimizer.param_groups]
    if given and not any(id(parameter) in own for params in groups for parameter in params):
        names = ", ".join(type(optimizer).__name__ for optimizer in given)
        raise ValueError(f"{op}: optimizer must have {whose}, got {names} without")


class StateTensor(NamedTuple):
    """A tensor of a weight's shape in an optimizer's state, and where it stands."""

    state: dict[str, Any]
    key: str

    def replace(self, moved: Callable[[Tensor], Tensor]) -> None:
        """Put what ``moved`` makes of the tensor in its place."""
        with torch.no_grad():
            self.state[self.key] = moved(self.state[self.key])


def state_tensors(
    op: str, optimizers: Iterable[Optimizer], name: str, weight: Tensor
) -> list[StateTensor]:
    """All that ``optimizers`` keep of each entry of ``weight``: momentum, averages, a master copy.

    For whoever gives the weight other entries; 0-dim tensors and numbers belong to it as a whole
    and stay. ``name`` is the layer's, for errors.

    Raises:
        RuntimeError: a state that is neither, of rows and columns say: nobody has said how that
            follows.
    """
    found = []
    for optimizer in map(innermost, optimizers):
        state = optimizer.state.get(weight, {})
        # It keeps one flat history of all weights, under the first of them.
        unknown = ["old_dirs"] if isinstance(optimizer, LBFGS) and optimizer.state else []
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim() > 0 and _is_beside(value, weight):
                found.append(StateTensor(state, key))
            elif not (value is None or isinstance(value, (bool, int, float, str))) and not (
                isinstance(value, Tensor) and value.dim() == 0
            ):
                unknown.append(key)
        if unknown:
            raise RuntimeError(
                f"{op}: nobody has said how {unknown[0]!r} in the state that "
                f"{type(optimizer).__name__} keeps of the weight of {name!r} follows; what follows "
                "are tensors of the weight's shape, so use SGD or one of Adam's kind, or do this "
                "before the first step"
            )
    return found


def _is_beside(value: Tensor, weight: Tensor) -> bool:
    """Whether ``value`` has a number for each entry of ``weight``, on its device."""
    is_same = value.shape == weight.shape and value.device == weight.device
    return is_same and value.is_floating_point()
