"""Powered layers, plain layers with masks, and the ways from plain layers to them and back.

Importing this package installs two global hooks of torch.optim: an optimizer that knows nothing of
these layers is refused the step of a weight that holds θ, and keeps frozen entries of all others.
"""

from ppkernels.nn import guard as guard
from ppkernels.nn import init
from ppkernels.nn.conv import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    PowerConv1d,
    PowerConv2d,
    PowerConv3d,
)
from ppkernels.nn.convert import add_masks, fold, powerize
from ppkernels.nn.footprint import Footprint, LayerFootprint, footprint
from ppkernels.nn.linear import MaskedLinear, PowerLinear
from ppkernels.nn.masks import Masked
from ppkernels.nn.plan import PlannedLayer, SparsifyPlan
from ppkernels.nn.powered import Powered, set_alpha
from ppkernels.nn.sparse import Sparse
from ppkernels.nn.sparse_conv import FoldedSparseConv2d, PowerSparseConv2d, SparseConv2d
from ppkernels.nn.sparse_folded import FoldedSparse
from ppkernels.nn.sparse_linear import FoldedSparseLinear, PowerSparseLinear, SparseLinear
from ppkernels.nn.sparsify import densify, sparsify

__all__ = [
    "FoldedSparse",
    "FoldedSparseConv2d",
    "FoldedSparseLinear",
    "Footprint",
    "LayerFootprint",
    "Masked",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedLinear",
    "PlannedLayer",
    "PowerConv1d",
    "PowerConv2d",
    "PowerConv3d",
    "PowerLinear",
    "PowerSparseConv2d",
    "PowerSparseLinear",
    "Powered",
    "Sparse",
    "SparseConv2d",
    "SparseLinear",
    "SparsifyPlan",
    "add_masks",
    "densify",
    "fold",
    "footprint",
    "init",
    "powerize",
    "set_alpha",
    "sparsify",
]
