"""The linear layer of a powered weight in pure PyTorch: the specification of the kernels.

Notation: x ``input`` [..., K], φ ``weight`` [N, K], α ``alpha``, g ``grad_output`` [..., N]; words
are the bits of a mask of [N, K]. θ is rounded to the dtype of x, which may be a half type beside a
float32 φ, as under autocast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ppkernels.ops._layout import as_rows
from ppkernels.ops.power import reference


def power_linear(
    input: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    bias: Tensor | None = None,
    words: Tensor | None = None,
) -> Tensor:
    """y = x·θᵀ + b with θ = mask·φ|φ|^(α−1)."""
    theta = reference.power(weight, alpha, words).to(input.dtype)
    return F.linear(input, theta, None if bias is None else bias.to(input.dtype))


def power_linear_grad_input(
    grad_output: Tensor, weight: Tensor, alpha: float | Tensor, words: Tensor | None = None
) -> Tensor:
    """∂L/∂x = g·θ."""
    return grad_output @ reference.power(weight, alpha, words).to(grad_output.dtype)


def power_linear_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    words: Tensor | None = None,
) -> Tensor:
    """∂L/∂φ = mask·gᵀx·α|φ|^(α−1), summed up in the dtype of φ, in float32 for a half type."""
    wide = weight.dtype if weight.dtype.itemsize > 2 else torch.float32
    grad_theta = as_rows(grad_output).to(wide).t() @ as_rows(input).to(wide)
    return reference.power_backward(grad_theta, weight.to(wide), alpha, words).to(weight.dtype)
