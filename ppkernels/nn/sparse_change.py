"""Another topology for a sparse layer: what of its weight and its optimizer's state moves where."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ppkernels import _powered
from ppkernels._checks import check_floating, normal_tensors
from ppkernels._optimizers import StateTensor, check_one_has, optimizers_of, state_tensors
from ppkernels._resized import note_resized
from ppkernels.ops import BitMask, Topology

if TYPE_CHECKING:
    from ppkernels.nn.sparse import Sparse

Optimizers = Optimizer | Iterable[Optimizer] | None


class _Moved(NamedTuple):
    """Where each entry of a new topology comes from: int64 [E'], and whether from anywhere."""

    origin: Tensor
    is_old: Tensor

    def values(self, old: Tensor, grown: Tensor | float) -> Tensor:
        """``old`` [E] at the entries there are now; ``grown`` [G], by place, at the others."""
        new = old.new_empty(self.origin.shape)
        new[self.is_old] = old[self.origin[self.is_old]]
        new[~self.is_old] = grown if isinstance(grown, float) else grown.to(new.dtype)
        return new


@normal_tensors()
def change_topology(
    layer: Sparse,
    drop: Tensor,
    grow: Tensor,
    values: Tensor | None,
    optimizer: Optimizers,
) -> Tensor:
    """See `Sparse.change_topology`. All that is refused is found before anything is changed."""
    op = f"{type(layer).__name__}.change_topology"
    weight = layer._own_weight(op)
    layers = sharing(op, layer, weight)
    states = _states(op, weight, optimizer)
    topology, origin = layer.topology.changed(drop, grow)
    moved = _Moved(origin, origin >= 0)
    grown = _stored(op, layer, grow, values)
    new_weight = moved.values(weight.detach(), grown)
    masks = [_moved_masks(each, moved) for each in layers]
    exchange_values(weight, new_weight)
    for each, own in zip(layers, masks, strict=True):
        each._move(topology, own)
    for state in states:
        filled = grown if state.key == _powered.MASTER else 0.0
        state.replace(partial(moved.values, grown=filled))
    return origin


def drawn(like: Tensor, topology: Topology) -> Tensor:
    """θ for ``like``, drawn as torch.nn draws weights of this topology's shape, but never 0."""
    bound = bound_of(topology)
    values = torch.empty_like(like, requires_grad=False).uniform_(-bound, bound)
    return values.masked_fill_(values == 0, bound)


def bound_of(topology: Topology) -> float:
    """torch.nn draws weight and bias between plus and minus this."""
    return 1 / math.sqrt(max(topology.in_features, 1))


def sharing(op: str, layer: Sparse, weight: nn.Parameter) -> list[Sparse]:
    """All layers that have ``weight``, which have to have the same topology."""
    others = [other for other in _powered.masked_layers_of(weight) if other is not layer]
    for other in others:
        if not _powered.is_sparse(other) or other.topology != layer.topology:
            raise ValueError(
                f"{op}: {other} shares the weight and has another topology, so its values would no "
                "longer be those of its entries"
            )
    return [layer, *cast(Any, others)]


def exchange_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Give ``parameter`` other values, of any number, and no gradient; it stays the same object."""
    former = parameter.shape
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    # While a graph lives, autograd keeps what adds up the gradient, and expects one of the size
    # from then; another dtype makes it forget.
    parameter.data = values.new_empty(0, dtype=other)
    parameter.data = values
    parameter.grad = None
    # What the assignment does not do. So the backward pass of an older graph, whose indices are
    # others, is an error.
    torch.autograd.graph.increment_version(parameter)
    if former != values.shape:
        note_resized(parameter, former)


def _states(op: str, weight: nn.Parameter, optimizer: Optimizers) -> list[StateTensor]:
    """What the optimizers keep of each entry."""
    optimizers = optimizers_of(op, optimizer)
    check_one_has(op, optimizers, [weight], "the layer's weight")
    return state_tensors(op, optimizers, "the layer", weight)


def _stored(op: str, layer: Sparse, grow: Tensor, values: Tensor | None) -> Tensor:
    """What the weight is to hold at the grown entries, by place; float32 at least."""
    dtype = layer.weight.dtype
    if values is None:
        # In the weight's own dtype, in which none is 0 then.
        values = drawn(layer.weight.new_empty(grow.shape), layer.topology)
    check_floating(op, "values", values)
    if values.shape != grow.shape:
        raise ValueError(
            f"{op}: values must have a value for each place of grow, {tuple(grow.shape)}, got "
            f"{tuple(values.shape)}"
        )
    values = values.detach().to(grow.device, torch.promote_types(dtype, torch.float32))
    stored = layer._stored(values[grow.argsort()])
    held = stored.to(dtype)
    if not bool(held.isfinite().all()):
        raise ValueError(f"{op}: values must be finite numbers of {dtype}, got NaN or infinity")
    is_dead = _powered.is_powered(layer) and float(layer.alpha) > 1
    if is_dead and bool((held == 0).any()):
        raise ValueError(
            f"{op}: values must not be 0, nor become 0 in {dtype}, for a powered layer with alpha "
            "> 1, where such an entry gets no gradient and stays 0"
        )
    return stored


def _moved_masks(layer: Sparse, moved: _Moved) -> dict[str, BitMask]:
    """Masks over the entries that there are now; set at the grown ones."""
    return {
        name: BitMask.pack(moved.values(mask.unpack(), 1.0))
        for name, mask in layer._masks().items()
    }
