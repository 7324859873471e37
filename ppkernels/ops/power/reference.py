"""The powered weight in pure PyTorch: the specification of every other implementation.

Notation: φ ``weight``, θ ``theta``, α ``alpha``. Half precisions are computed in float32 and
rounded once. α is a float or a 0-dim float64 tensor; it is not checked here. ``words`` are those of
a mask: where its bit is 0, the result is +0, whatever stands there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ppkernels.ops._bits import kept


def _compute(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _signed_power(x: Tensor, exponent: float | Tensor) -> Tensor:
    """sign(x)·|x|^exponent, exponent > 0."""
    magnitude = _compute(x).abs().pow(exponent)
    return magnitude.copysign(_compute(x)).to(x.dtype)


def _masked(result: Tensor, words: Tensor | None) -> Tensor:
    return result if words is None else kept(result, words)


def power(weight: Tensor, alpha: float | Tensor, words: Tensor | None = None) -> Tensor:
    """θ = φ·|φ|^(α−1)."""
    phi = _compute(weight)
    return _masked((phi * phi.abs().pow(alpha - 1)).to(weight.dtype), words)


def power_backward(
    grad_theta: Tensor, weight: Tensor, alpha: float | Tensor, words: Tensor | None = None
) -> Tensor:
    """∂L/∂φ = ∂L/∂θ · α|φ|^(α−1)."""
    scale = alpha * _compute(weight).abs().pow(alpha - 1)
    return _masked((_compute(grad_theta) * scale).to(weight.dtype), words)


def power_double_backward(
    grad_grad_weight: Tensor,
    grad_theta: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    words: Tensor | None = None,
) -> Tensor:
    """h·g·α(α−1)·sign(φ)|φ|^(α−2), and 0 where φ = 0 or α = 1."""
    phi = _compute(weight)
    # copysign and not sign, which is 0 at NaN: a NaN weight must show.
    curvature = (alpha * (alpha - 1) * phi.abs().pow(alpha - 2)).copysign(phi)
    curvature = torch.where(phi.isnan(), phi, curvature)
    product = _compute(grad_grad_weight) * _compute(grad_theta) * curvature
    is_flat = (phi == 0) | torch.as_tensor(alpha == 1, device=phi.device)
    return _masked(torch.where(is_flat, torch.zeros_like(phi), product).to(weight.dtype), words)


def inverse_power(theta: Tensor, alpha: float | Tensor) -> Tensor:
    """φ = sign(θ)·|θ|^(1/α)."""
    return _signed_power(theta, 1 / alpha)


def rebase(weight: Tensor, alpha_from: float | Tensor, alpha_to: float | Tensor) -> Tensor:
    """φ' = sign(φ)·|φ|^(α/α'): the weight that gives the same θ under another α."""
    return _signed_power(weight, alpha_from / alpha_to)
