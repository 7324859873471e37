"""Weights that have had other shapes: dense and sparse ones, or sparse ones of other counts.

Who gives a weight another shape notes it here; before a step the optimizers ask whether their state
is still one of its entries.
"""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ppkernels import _powered

# The shapes that Parameters had before the one that they have.
_former_shapes: MutableMapping[Tensor, set[torch.Size]] = WeakIdKeyDictionary()


def note_resized(weight: nn.Parameter, former: torch.Size) -> None:
    """``weight`` has another shape now, and optimizers may have a state of the ``former`` one."""
    _former_shapes.setdefault(weight, set()).add(former)
    _powered.weights_changed()


def any_resized() -> bool:
    """Whether any weight that is alive has had another shape."""
    return len(_former_shapes) > 0


def is_resized(weight: Tensor) -> bool:
    """Whether ``weight`` has had another shape."""
    return weight in _former_shapes


def check_state(optimizer: Optimizer, weight: Tensor) -> None:
    """The state of ``weight`` is not that of the entries which it had in a former shape.

    Fused steps would not notice, and read past the end of it.
    """
    former = _former_shapes.get(weight, set()) - {weight.shape}
    for name, value in optimizer.state.get(weight, {}).items():
        if isinstance(value, Tensor) and value.shape in former:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step: {name!r} in its state has the shape "
                f"{tuple(value.shape)} that a weight had before it became {tuple(weight.shape)}; "
                "name the optimizer when a model changes, as in "
                "pp.sparsify(..., optimizer=optimizer), or make a new one"
            )
