"""From a dense layer, whichever it is, to the sparse one."""

from __future__ import annotations

from torch import nn

from ppkernels.nn.sparse import Sparse
from ppkernels.nn.sparse_conv import SparseConv2d, conv_obstacle
from ppkernels.nn.sparse_linear import SparseLinear, linear_obstacle


def sparse_obstacle(layer: nn.Module) -> str | None:
    """Why ``layer`` cannot be sparse, as a part of a sentence; None if `to_sparse` takes it."""
    return conv_obstacle(layer) if isinstance(layer, nn.Conv2d) else linear_obstacle(layer)


def to_sparse(layer: nn.Module) -> Sparse:
    """`SparseConv2d.from_conv` or `SparseLinear.from_linear`, as ``layer`` needs."""
    if isinstance(layer, nn.Conv2d):
        return SparseConv2d.from_conv(layer)
    return SparseLinear.from_linear(layer)
