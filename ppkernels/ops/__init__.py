"""The ops, one room each. Public names only; see README.md for how a room is built."""

from ppkernels.ops.bitmask import BitMask, apply_mask, count_bits, pack_bits, unpack_bits
from ppkernels.ops.power import (
    inverse_power,
    power,
    power_backward,
    power_double_backward,
    rebase,
)
from ppkernels.ops.power_linear import (
    power_linear,
    power_linear_grad_input,
    power_linear_grad_weight,
)
from ppkernels.ops.select import topk_mask
from ppkernels.ops.sparse_conv import (
    Geometry,
    sparse_conv2d,
    sparse_conv2d_grad_input,
    sparse_conv2d_grad_values,
)
from ppkernels.ops.spmm import spmm, spmm_grad_input, spmm_grad_values
from ppkernels.ops.statistics import Statistics, statistics
from ppkernels.ops.step import adam_step_, sgd_step_
from ppkernels.ops.topology import Topology

__all__ = [
    "BitMask",
    "Geometry",
    "Statistics",
    "Topology",
    "adam_step_",
    "apply_mask",
    "count_bits",
    "inverse_power",
    "pack_bits",
    "power",
    "power_backward",
    "power_double_backward",
    "power_linear",
    "power_linear_grad_input",
    "power_linear_grad_weight",
    "rebase",
    "sgd_step_",
    "sparse_conv2d",
    "sparse_conv2d_grad_input",
    "sparse_conv2d_grad_values",
    "spmm",
    "spmm_grad_input",
    "spmm_grad_values",
    "statistics",
    "topk_mask",
    "unpack_bits",
]
