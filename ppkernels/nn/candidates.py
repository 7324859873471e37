"""Which layers of a model can become sparse, and why the others stay dense."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from ppkernels._checks import normal_tensors
from ppkernels._powered import is_masked, weight_parameter
from ppkernels.nn.choice import Select
from ppkernels.nn.sharing import others_with, owners_of, readers_of
from ppkernels.nn.sparse import Sparse
from ppkernels.nn.sparse_convert import dense_class, sparse_obstacle, to_sparse
from ppkernels.nn.sparse_kept import NO_VALUES, pruned_mask, random_topology
from ppkernels.ops import Topology, topk_mask


@dataclass(frozen=True)
class Candidate:
    """A linear or convolution layer of a model.

    Attributes:
        name: its name in the model.
        layer: the module.
        shape: of its weight as a dense layer has it; empty where it has none yet.
        kept: how many entries are not 0 or are trained.
        obstacle: why it cannot be sparse, whatever is kept of it; None if it can.
    """

    name: str
    layer: nn.Module
    shape: tuple[int, ...]
    kept: int
    obstacle: str | None

    @property
    def kind(self) -> str:
        """The layer's class; of a sparse layer the one that `pp.densify` gives it."""
        layer = self.layer
        return (dense_class(layer) if isinstance(layer, Sparse) else type(layer)).__name__

    @property
    def entries(self) -> int:
        """How many entries the weight has."""
        return math.prod(self.shape) if self.shape else 0

    def unpruned(self) -> str | None:
        """Why there is nothing to gain, or no telling what is pruned; None for a pruned layer."""
        if cast(Tensor, self.layer.weight).is_meta:
            return NO_VALUES
        if self.kept == self.entries:
            return "not pruned"
        if self.kept == 0 and not (is_masked(self.layer) and self.layer.update_mask is not None):
            return "all of its entries are 0, and none is frozen"
        return None

    @normal_tensors()
    def as_sparse(self, kept: int | None = None) -> Sparse:
        """A sparse layer of this one, which stays as it is.

        Of ``kept`` entries, the largest, or any where there are no values; by default those that
        are not 0 or are trained.
        """
        if kept is None:
            return to_sparse(self.layer)
        layer, weight = self.layer, cast(Tensor, self.layer.weight)
        if weight.is_meta:
            return to_sparse(layer, random_topology(self.shape, kept))
        theta = (layer.theta if is_masked(layer) else weight).detach()
        if theta.isnan().any():  # memory that nobody has written to
            return to_sparse(layer, random_topology(self.shape, kept).to(weight.device))
        return to_sparse(layer, Topology.of_mask(topk_mask(theta, kept)))


def candidates(model: nn.Module) -> list[Candidate]:
    """All linear and convolution layers of ``model``, sparse ones and subclasses included."""
    readers, owners = readers_of(model), owners_of(model)
    found = []
    for name, layer in model.named_modules():
        if not isinstance(layer, (Sparse, nn.Linear, _ConvNd)):
            continue
        obstacle = None if isinstance(layer, Sparse) else _obstacle(layer, readers, owners)
        found.append(Candidate(name, layer, *_kept(layer), obstacle))
    return found


def selected(model: nn.Module, found: Iterable[Candidate], select: Select | None) -> set[str]:
    """The names of those of ``found`` that ``select`` wants.

    Raises:
        TypeError: ``select`` is of another kind, or names a module of another kind.
        ValueError: it names a module that there is not.
    """
    if select is None:
        return {each.name for each in found}
    if callable(select):
        return {each.name for each in found if select(each.name, each.layer)}
    if isinstance(select, (str, bytes)) or not isinstance(select, Iterable):
        raise TypeError(f"sparsify: select must be several names or a function, got {select!r}")
    names, modules = set(select), dict(model.named_modules())
    for name in names - {each.name for each in found}:
        if name not in modules:
            raise ValueError(f"sparsify: {type(model).__name__} has no module named {name!r}")
        raise TypeError(
            f"sparsify: {name!r} ({type(modules[name]).__name__}) is no linear or convolution layer"
        )
    return names


def _obstacle(
    layer: nn.Module,
    readers: dict[int, tuple[nn.Module, str]],
    owners: dict[int, list[tuple[str, nn.Module]]],
) -> str | None:
    """Why a dense ``layer`` cannot be sparse, or None."""
    if isinstance(layer, LazyModuleMixin):
        return "lazy; run a batch through the model first"
    if id(layer) in readers:
        return f"{readers[id(layer)][1]} reads its weight"
    weight = weight_parameter(layer)
    if weight is not None:
        for _, other in others_with(layer, weight, owners):
            return f"its weight is shared with {other}"
        if type(weight) is not nn.Parameter:
            return f"its weight is a {type(weight).__name__}"
    return sparse_obstacle(layer)


def _kept(layer: nn.Module) -> tuple[tuple[int, ...], int]:
    """The shape of the dense weight, and how many of its entries are not 0 or are trained."""
    if isinstance(layer, Sparse):
        return tuple(layer.topology.shape), layer.topology.count()
    weight = weight_parameter(layer)
    if weight is None or isinstance(layer, LazyModuleMixin):
        return (), 0
    if weight.is_meta or type(weight) is not nn.Parameter:
        return tuple(weight.shape), weight.numel()
    return tuple(weight.shape), pruned_mask(layer).count()
