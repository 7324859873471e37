"""ppkernels: fused kernels, layers and optimizers for Powerpropagation, θ = φ·|φ|^(α−1)."""

from ppkernels import _extension as _extension  # loads the kernels before any op is called
from ppkernels import autograd, nn, ops, optim, reference, sparsity
from ppkernels._backend import backend
from ppkernels._extension import cpu_capability
from ppkernels.nn import fold, powerize, set_alpha
from ppkernels.ops import (
    BitMask,
    Statistics,
    adam_step_,
    apply_mask,
    count_bits,
    inverse_power,
    pack_bits,
    power,
    power_backward,
    power_double_backward,
    power_linear,
    power_linear_grad_input,
    power_linear_grad_weight,
    rebase,
    sgd_step_,
    statistics,
    topk_mask,
    unpack_bits,
)
from ppkernels.sparsity import AdaptiveAlpha, AlphaRecord, LayerReport, Report, report

__version__ = "0.1.0"

__all__ = [
    "AdaptiveAlpha",
    "AlphaRecord",
    "BitMask",
    "LayerReport",
    "Report",
    "Statistics",
    "adam_step_",
    "apply_mask",
    "autograd",
    "backend",
    "count_bits",
    "cpu_capability",
    "fold",
    "inverse_power",
    "nn",
    "ops",
    "optim",
    "pack_bits",
    "power",
    "power_backward",
    "power_double_backward",
    "power_linear",
    "power_linear_grad_input",
    "power_linear_grad_weight",
    "powerize",
    "rebase",
    "reference",
    "report",
    "set_alpha",
    "sgd_step_",
    "sparsity",
    "statistics",
    "topk_mask",
    "unpack_bits",
]
