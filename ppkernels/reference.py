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
from ppkernels.ops.statistics.reference import statistics

__all__ = [
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
    "statistics",
    "topk_bits",
    "unpack_bits",
]
