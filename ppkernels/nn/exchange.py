"""Turns a layer into one of another kind: the same module and Parameters with other insides."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ppkernels._powered import dismiss, enrol
from ppkernels._resized import note_resized
from ppkernels.nn.masks import Masked
from ppkernels.nn.sparse_change import exchange_values

# What layers of this package keep among their attributes, and what a layer of another kind may
# lack; all else that stands there is the user's.
_OWN = (
    *("_update_mask", "_mask", "plain_class", "stores"),
    *("_topology", "_geometry", "_dense_class"),
)
# What belongs to any module and stays: hooks, modes.
_MODULE = frozenset(nn.Module().__dict__)


def become(layer: nn.Module, made: nn.Module) -> None:
    """Turn ``layer`` into ``made``, which was made of it and must not be used afterwards.

    The module stays the same object, and so do its Parameters: hooks, and the references of
    optimizers hold. The weight takes the values of ``made``'s, whatever their shape, and its
    ``.grad`` goes. All other parameters and buffers stay as they are, those that only ``made`` has
    come along.
    """
    for name in _OWN:
        layer.__dict__.pop(name, None)
    for name, value in made.__dict__.items():
        if name not in _MODULE:
            layer.__dict__[name] = value
    weight = layer._parameters["weight"]
    assert weight is not None
    former = weight.shape
    exchange_values(weight, cast(Tensor, made.weight).detach())
    note_resized(layer, former)
    for name, buffer in made._buffers.items():
        layer._buffers.setdefault(name, buffer)
    layer.__class__ = type(made)
    if isinstance(layer, Masked):
        enrol(layer)
    else:
        dismiss(layer)
