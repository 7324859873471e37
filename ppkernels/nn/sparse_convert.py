"""From a dense layer, whichever it is, to the sparse one, and what it is when it comes back."""

from __future__ import annotations

from torch import nn

from ppkernels._powered import is_powered
from ppkernels.nn.choice import MASKED, POWERED
from ppkernels.nn.masks import Masked
from ppkernels.nn.sparse import Sparse
from ppkernels.nn.sparse_conv import SparseConv2d, conv_obstacle
from ppkernels.nn.sparse_linear import SparseLinear, linear_obstacle
from ppkernels.ops import Topology


def sparse_obstacle(layer: nn.Module) -> str | None:
    """Why ``layer`` cannot be sparse, as a part of a sentence; None if `to_sparse` takes it."""
    return linear_obstacle(layer) if isinstance(layer, nn.Linear) else conv_obstacle(layer)


def to_sparse(layer: nn.Module, kept: Topology | None = None) -> Sparse:
    """`SparseLinear.from_linear` or `SparseConv2d.from_conv`, as ``layer`` needs."""
    if isinstance(layer, nn.Linear):
        return SparseLinear.from_linear(layer, kept)
    return SparseConv2d.from_conv(layer, kept)


def dense_class(layer: Sparse) -> type[nn.Module]:
    """The class that `pp.densify` gives ``layer``: the one that it had, or one with masks."""
    plain: type[nn.Module] = nn.Linear if isinstance(layer, SparseLinear) else nn.Conv2d
    if is_powered(layer):
        return POWERED[plain]
    former = layer.__dict__.get("_dense_class", Masked)
    return MASKED[plain] if issubclass(former, Masked) else plain
