"""ppkernels: fused kernels, layers and optimizers for Powerpropagation, θ = φ·|φ|^(α−1)."""

from ppkernels import _extension as _extension  # loads the kernels before any op is called
from ppkernels import autograd, nn, ops, optim, reference
from ppkernels._backend import backend
from ppkernels._extension import cpu_capability
from ppkernels.nn import fold, powerize, set_alpha
from ppkernels.ops import (
    inverse_power,
    power,
    power_backward,
    power_double_backward,
    rebase,
)

__version__ = "0.1.0"

__all__ = [
    "autograd",
    "backend",
    "cpu_capability",
    "fold",
    "inverse_power",
    "nn",
    "ops",
    "optim",
    "power",
    "power_backward",
    "power_double_backward",
    "powerize",
    "rebase",
    "reference",
    "set_alpha",
]
