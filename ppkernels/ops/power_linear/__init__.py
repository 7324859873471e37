"""Op `power_linear`: the linear layer of a powered weight, θ never kept in memory."""

from ppkernels.ops.power_linear.op import (
    PowerLinear,
    power_linear,
    power_linear_grad_input,
    power_linear_grad_weight,
)

__all__ = ["PowerLinear", "power_linear", "power_linear_grad_input", "power_linear_grad_weight"]
