"""Weights that have had other shapes: dense and sparse ones, or sparse ones of other counts.

Who gives a layer's weight another shape notes it here; before a step the optimizers ask whether
their state is still one of its entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ppkernels import _powered

# A weight, and the shapes that it has had.
Resized = tuple[Tensor, set[torch.Size]]

# The shapes that layers' weights had before the one that they have. By layer, because torch swaps
# no Parameter that something has a weak reference to (set_swap_module_params_on_conversion).
_former_shapes: WeakKeyDictionary[nn.Module, set[torch.Size]] = WeakKeyDictionary()


def note_resized(layer: nn.Module, former: torch.Size) -> None:
    """The weight of ``layer`` may have another shape now than the ``former`` one.

    Optimizers may have a state of that one.
    """
    if cast(Tensor, layer.weight).shape != former:
        _former_shapes.setdefault(layer, set()).add(former)
        _powered.weights_changed()


def any_resized() -> bool:
    """Whether the weight of any layer that is alive has had another shape."""
    return len(_former_shapes) > 0


def resized_among(weights: Iterable[Tensor]) -> list[Resized]:
    """Those of ``weights`` that have had other shapes."""
    former: dict[int, set[torch.Size]] = {}
    for layer, shapes in list(_former_shapes.items()):
        for weight in _powered.trained(layer):
            former.setdefault(id(weight), set()).update(shapes)
    return [(weight, former[id(weight)]) for weight in weights if id(weight) in former]


def check_state(optimizer: Optimizer, weight: Tensor, former: set[torch.Size]) -> None:
    """The state of ``weight`` is not that of the entries which it had in a ``former`` shape.

    Fused steps would not notice, and read past the end of it.
    """
    former = former - {weight.shape}
    for name, value in optimizer.state.get(weight, {}).items():
        if isinstance(value, Tensor) and value.shape in former:
            raise RuntimeError(
                f"{type(optimizer).__name__}.step: {name!r} in its state has the shape "
                f"{tuple(value.shape)} that a weight had before it became {tuple(weight.shape)}; "
                "name the optimizer when a model changes, as in "
                "pp.sparsify(..., optimizer=optimizer), or make a new one"
            )
