"""Keeps frozen entries where they are while an optimizer steps that knows nothing of masks.

Before the step the gradient is set to 0 at the frozen entries, and these are copied; after it they
get their bits back, whatever momentum, weight decay or a closure have done.

For N float32 entries of a weight with a mask that is 8N bytes read or written to copy what is
frozen, 16N for the gradient (at each call of a closure too) and 20N to put the copy back. The copy
is as large as the weight and lives as long as the step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ppkernels.ops import BitMask, apply_mask

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class FrozenEntries:
    """The entries of one weight that a step may not move, with the values from before it."""

    def __init__(self, weight: Tensor, mask: BitMask) -> None:
        self._weight = weight
        self._mask = mask.to(weight.device)
        # The frozen entries, and zero bits elsewhere.
        self._before = apply_mask(weight.detach(), (~self._mask).words)

    @torch.no_grad()
    def zero_grad(self) -> None:
        """Set the gradient to 0 where the weight is frozen."""
        grad = self._weight.grad
        if grad is None:
            return
        if grad.is_sparse:
            self._weight.grad = grad = grad.coalesce()
            is_free = self._mask.unpack()[tuple(grad.indices())]
            grad.values().masked_fill_(~is_free, 0)
        elif 0 in grad.stride():
            # Somebody's expanded tensor, in which entries share their memory.
            self._weight.grad = apply_mask(grad, self._mask.words)
        else:
            # In place, for it may be a part of a bucket; not by masked_fill_, which is slower on
            # a CPU than both of these.
            grad.copy_(apply_mask(grad, self._mask.words))

    def put_back(self) -> None:
        """Give the frozen entries the bits that they had."""
        # As integers, for any value has to come through.
        bits = _BITS[self._weight.itemsize]
        weight = self._weight.detach()
        free = apply_mask(weight, self._mask.words)
        torch.bitwise_or(free.view(bits), self._before.view(bits), out=weight.view(bits))


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
