"""θ = φ·|φ|^(α−1), its gradients and its inverse."""

from ppkernels.ops.power.op import (
    Power,
    inverse_power,
    power,
    power_backward,
    power_double_backward,
    rebase,
)

__all__ = [
    "Power",
    "inverse_power",
    "power",
    "power_backward",
    "power_double_backward",
    "rebase",
]
