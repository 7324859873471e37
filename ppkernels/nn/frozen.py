"""Keeps frozen entries where they are while an optimizer steps that knows nothing of masks.

Before the step the gradient is set to 0 at the frozen entries and the weight is copied; after it
they get their values back, bit for bit, whatever momentum, weight decay or a closure have done.

For N entries of a weight with a mask that is a copy of the weight, one byte an entry for the mask,
a pass over the gradient and one over the weight, which reads the copy too: in float32, 8N + N +
9N + 13N bytes read or written. The copies live as long as the step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ppkernels.ops import BitMask


class FrozenEntries:
    """The entries of one weight that a step may not move, with the values from before it."""

    def __init__(self, weight: Tensor, mask: BitMask) -> None:
        self._weight = weight
        self._frozen = (~mask.to(weight.device)).unpack()
        self._before = weight.detach().clone()

    def zero_grad(self) -> None:
        """Set the gradient to 0 where the weight is frozen."""
        grad = self._weight.grad
        if grad is None:
            return
        with torch.no_grad():
            if grad.is_sparse:
                self._weight.grad = grad = grad.coalesce()
                grad.values().masked_fill_(self._frozen[tuple(grad.indices())], 0)
            elif 0 in grad.stride():
                # Somebody's expanded tensor, in which entries share their memory.
                self._weight.grad = grad.masked_fill(self._frozen, 0)
            else:
                grad.masked_fill_(self._frozen, 0)

    def put_back(self) -> None:
        """Give the frozen entries the bits that they had."""
        with torch.no_grad():
            torch.where(self._frozen, self._before, self._weight, out=self._weight)


class StepArguments(tuple[Any, ...]):
    """The arguments of one call of ``step``, which carry the frozen entries to its end.

    Nowhere else are they kept: so the copies go when the call does, by an exception too, and of
    steps within steps each has its own.
    """

    frozen: list[FrozenEntries]


def freeze(
    frozen: list[FrozenEntries], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[StepArguments, dict[str, Any]]:
    """Begin a step: gradients are 0 at frozen entries, also each time that a closure makes them."""
    for entries in frozen:
        entries.zero_grad()
    if callable(closure := kwargs.get("closure")):
        kwargs = {**kwargs, "closure": _zeroing(closure, frozen)}
    elif len(args) > 1 and callable(args[1]):
        args = (args[0], _zeroing(args[1], frozen), *args[2:])
    carrier = StepArguments(args)
    carrier.frozen = frozen
    return carrier, kwargs


def _zeroing(closure: Callable[..., Any], frozen: list[FrozenEntries]) -> Callable[..., Any]:
    @wraps(closure)
    def closure_of_free_entries(*args: Any, **kwargs: Any) -> Any:
        loss = closure(*args, **kwargs)
        for entries in frozen:
            entries.zero_grad()
        return loss

    return closure_of_free_entries
