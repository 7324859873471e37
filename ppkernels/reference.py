"""`pp.reference`: every op in pure PyTorch, under one name. They are the specification."""

from ppkernels.ops.power.reference import (
    inverse_power,
    power,
    power_backward,
    power_double_backward,
    rebase,
)

__all__ = ["inverse_power", "power", "power_backward", "power_double_backward", "rebase"]
