"""The powered step of one weight: what `PowerSGD` does to each θ."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ppkernels._checks import alpha_tensor, check_floating, check_like
from ppkernels.ops import inverse_power, power, power_backward

Rule = Literal["virtual", "chain"]


def chain_gradient(grad_theta: Tensor, theta: Tensor, alpha: float | Tensor) -> Tensor:
    """∂L/∂φ = ∂L/∂θ · α|φ|^(α−1), with φ = sign(θ)·|θ|^(1/α).

    Args:
        grad_theta: ∂L/∂θ, of ``theta``'s shape, dtype and device.
        theta: θ, of any shape, float32, float64, bfloat16 or float16.
        alpha: α ≥ 1, a float or a 0-dim float64 tensor.

    Returns:
        ∂L/∂φ, of ``theta``'s shape and dtype.

    Raises:
        TypeError, ValueError: tensors that do not go together, an exponent that is none.
    """
    check_floating("chain_gradient", "theta", theta)
    check_like("chain_gradient", "grad_theta", grad_theta, "theta", theta)
    return phi_gradient(grad_theta, theta, alpha_tensor("chain_gradient", alpha, theta.device))


def sgd_step(
    theta: Tensor, direction: Tensor, alpha: float | Tensor, lr: float, rule: Rule = "virtual"
) -> Tensor:
    """θ after one step of φ, computed on θ alone: θ' = Ψ(φ + δ) = θ·Ψ(1 + δ/φ), Ψ(x) = x|x|^(α−1).

    ``"virtual"``: δ = −lr·u·α|φ|^(α−1), u the optimizer's direction in ∂L/∂θ;
    ``"chain"``:   δ = −lr·u, u its direction in ∂L/∂φ.

    Args:
        theta: θ, of any shape, float32, float64, bfloat16 or float16.
        direction: u, of ``theta``'s shape, dtype and device.
        alpha: α ≥ 1, a float or a 0-dim float64 tensor.
        lr: the learning rate, a finite number.
        rule: ``"virtual"`` or ``"chain"``.

    Returns:
        θ', of ``theta``'s shape and dtype.

    Raises:
        TypeError, ValueError: tensors that do not go together, an exponent that is none, a learning
            rate that is not finite, another word in ``rule``.

    Exactness: as if φ were stored in ``theta``'s dtype, in float32 for the half types. δ = 0 gives
    θ bit for bit; α = 1 gives θ − lr·u as torch.optim.SGD computes it; θ = 0 stays 0 for α > 1; a
    direction that is not finite gives a θ' that is not.

    Source: Schwarz et al. 2021, section 2 and appendix (the virtual rule).
    """
    check_floating("sgd_step", "theta", theta)
    check_like("sgd_step", "direction", direction, "theta", theta)
    if not math.isfinite(lr):
        raise ValueError(f"sgd_step: lr must be a finite number, got {lr}")
    check_rule("sgd_step", rule)
    return moved(theta, direction, alpha_tensor("sgd_step", alpha, theta.device), lr, rule)


def check_rule(op: str, rule: str) -> None:
    """``rule`` is one of the two words."""
    if rule not in get_args(Rule):
        raise ValueError(f"{op}: rule must be 'virtual' or 'chain', got {rule!r}")


# ---- the same, unchecked, for an optimizer that has checked before


def phi_gradient(grad_theta: Tensor, theta: Tensor, alpha: Tensor) -> Tensor:
    """`chain_gradient`; a gradient of another dtype is cast to ``theta``'s."""
    return power_backward(grad_theta.to(theta.dtype), inverse_power(theta, alpha), alpha)


def moved(theta: Tensor, direction: Tensor, alpha: Tensor, lr: float, rule: Rule) -> Tensor:
    """`sgd_step`; where a direction's dtype is another, θ' may have the wider of the two."""
    wide = torch.promote_types(theta.dtype, torch.float32)
    old, u = theta.to(wide), direction.to(wide)
    phi = inverse_power(old, alpha)
    if rule == "virtual":
        delta = -lr * power_backward(u, phi, alpha)
    else:
        # At φ = 0 momentum would move a weight that has no gradient: the slope there stops it.
        delta = torch.where(phi == 0, power_backward(-lr * u, phi, alpha), -lr * u)
    # While φ is the larger, θ·Ψ(1 + δ/φ): a rounded φ cancels out of it. Where δ is, δ/φ could
    # overflow, and Ψ(φ + δ) is as exact.
    is_near = delta.abs() < phi.abs()
    base = torch.where(is_near, 1 + delta / phi, phi + delta)
    stepped = power(base, alpha) * torch.where(is_near, old, 1)
    stepped = torch.where(delta == 0, old, stepped)
    # A branch on α would wait for a GPU.
    is_plain = (alpha == 1).to(theta.device)
    return torch.where(is_plain, theta.add(direction, alpha=-lr), stepped.to(theta.dtype))
