"""The plan of one model on another copy of it: whether it fits, and what it makes sparse."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ppkernels._powered import is_sparse
from ppkernels.nn.candidates import Candidate
from ppkernels.nn.choice import MASKED, POWERED, called
from ppkernels.nn.plan import SparsifyPlan
from ppkernels.nn.powered import Powered
from ppkernels.nn.sparse import Sparse

_POWERED = frozenset(each.__name__ for each in POWERED.values())


def replayed(model: nn.Module, found: Sequence[Candidate], plan: SparsifyPlan) -> dict[str, Sparse]:
    """The sparse counterparts of the layers that ``plan`` has as sparse, by name.

    Raises:
        ValueError: the plan is that of another model.
    """
    layers = {each.name: each for each in found}
    planned = {row.name: row for row in plan.layers}
    for name, row in planned.items():
        if name not in layers:
            raise ValueError(
                f"sparsify: the plan has a {row.kind} {name!r}, and {type(model).__name__} has no "
                "linear or convolution layer of that name"
            )
        if row.shape and layers[name].shape and row.shape != layers[name].shape:
            raise ValueError(
                f"sparsify: the weight of {name!r} has shape {row.shape} in the plan, and "
                f"{layers[name].shape} in {type(model).__name__}"
            )
    for name, each in layers.items():
        layer = each.layer
        if name not in planned:
            raise ValueError(
                f"sparsify: {type(model).__name__} has a {each.kind} {name!r}, of which the plan "
                "says nothing; it is that of another model"
            )
        if isinstance(layer, Sparse) and planned[name].choice == "dense":
            raise ValueError(
                f"sparsify: {called(name, layer)} is dense in the plan; pp.densify the model "
                "before the plan is replayed"
            )
        kind = planned[name].kind
        if kind in _POWERED and not isinstance(layer, Powered):
            raise ValueError(
                f"sparsify: {called(name, layer)} is a {kind} in the plan; pp.powerize the model "
                "before the plan is replayed"
            )
    return {
        name: _planned(each, planned[name].kept)
        for name, each in layers.items()
        if planned[name].choice == "sparse" and not is_sparse(each.layer)
    }


def without_masks(found: Sequence[Candidate], plan: SparsifyPlan) -> list[str]:
    """The plain layers of a model that had masks where ``plan`` was made."""
    masked = {each.__name__ for each in MASKED.values()}
    had_masks = {row.name for row in plan.layers if row.kind in masked}
    return [each.name for each in found if each.name in had_masks and type(each.layer) in MASKED]


def _planned(each: Candidate, kept: int) -> Sparse:
    """The sparse counterpart of a layer, with its own entries if it is pruned."""
    if each.obstacle is not None:
        raise ValueError(
            f"sparsify: {called(each.name, each.layer)} is sparse in the plan and cannot be here: "
            f"{each.obstacle}"
        )
    return each.as_sparse(None if each.unpruned() is None else kept)
