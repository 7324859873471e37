"""`pp.reference`: every op in pure PyTorch, under one name. They are the specification."""

from ppkernels.ops.bitmask.reference import apply_mask, count_bits, pack_bits, unpack_bits
from ppkernels.ops.power.reference import (
    inverse_power,
    power,
    power_backward,
    power_double_backward,
    rebase,
)
from ppkernels.ops.power_linear.reference import (
    power_linear,
    power_linear_grad_input,
    power_linear_grad_weight,
)
from ppkernels.ops.select.reference import topk_bits
from ppkernels.ops.sparse_conv.reference import (
    sparse_conv2d,
    sparse_conv2d_grad_input,
    sparse_conv2d_grad_values,
)
from ppkernels.ops.spmm.reference import spmm, spmm_grad_input, spmm_grad_values
from ppkernels.ops.statistics.reference import statistics
from ppkernels.ops.topology.reference import (
    change_topology,
    gather_kept,
    mask_of_topology,
    scatter_kept,
    topology_fault,
    topology_of_mask,
    transpose_topology,
)

__all__ = [
    "apply_mask",
    "change_topology",
    "count_bits",
    "gather_kept",
    "inverse_power",
    "mask_of_topology",
    "pack_bits",
    "power",
    "power_backward",
    "power_double_backward",
    "power_linear",
    "power_linear_grad_input",
    "power_linear_grad_weight",
    "rebase",
    "scatter_kept",
    "sparse_conv2d",
    "sparse_conv2d_grad_input",
    "sparse_conv2d_grad_values",
    "spmm",
    "spmm_grad_input",
    "spmm_grad_values",
    "statistics",
    "topk_bits",
    "topology_fault",
    "topology_of_mask",
    "transpose_topology",
    "unpack_bits",
]
