"""`pp.autograd`: the public autograd Functions."""

from ppkernels.ops.bitmask import ApplyMask
from ppkernels.ops.power import Power
from ppkernels.ops.power_linear import PowerLinear
from ppkernels.ops.sparse_conv import SparseConv2d
from ppkernels.ops.spmm import Spmm

__all__ = ["ApplyMask", "Power", "PowerLinear", "SparseConv2d", "Spmm"]
