"""The optimizer's step of one weight in pure PyTorch: the specification of the fused one.

Notation: φ is the reparameterised weight, θ = Ψ(φ) = φ·|φ|^(α−1) the network's; u is the
optimizer's direction, λ ``weight_decay``. Nothing is written in place, nothing is checked. Half
precisions are computed in float32, and each result is rounded once, to the dtype of what it
replaces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """What a weight holds, and what happens to it besides the optimizer's own formula.

    Attributes:
        alpha: α ≥ 1; 1 is the plain step.
        holds_phi: the weight is φ and its gradient ∂L/∂φ; else it is θ, with ∂L/∂θ.
        rule: ``"virtual"`` or ``"chain"``.
        lr: η.
        weight_decay: λ; ``decay`` is ``"coupled"`` or ``"decoupled"``, ``decay_of`` ``"theta"`` or
            ``"phi"``.
        grad_factor: what gradients are multiplied by first: −1 to maximize, over the loss scale.
    """

    alpha: float
    holds_phi: bool
    rule: str
    lr: float
    weight_decay: float
    decay: str
    decay_of: str
    grad_factor: float = 1.0

    @property
    def is_powered_step(self) -> bool:
        """Whether θ is stored and α > 1, so that the step has to go through φ."""
        return self.alpha != 1 and not self.holds_phi


def power(x: Tensor, exponent: float) -> Tensor:
    """sign(x)·|x|^exponent."""
    return x.abs().pow(exponent).copysign(x)


def kept(x: Tensor, factor: float) -> Tensor:
    """factor·x; a rounded factor close to 1 would be off by the same in every step."""
    return x if factor == 1 else x - (1 - factor) * x


def seen_gradient(weight: Tensor, grad: Tensor, form: Form) -> Tensor:
    """The gradient as the optimizer sees it: scaled, with coupled decay, by the chain rule of φ.

    coupled, of θ: λ·θ joins ∂L/∂θ;    coupled, of φ: λ·φ joins the gradient that is averaged
    """
    grad = grad * form.grad_factor
    rate = form.weight_decay if form.decay == "coupled" else 0.0
    alpha = form.alpha
    if not form.is_powered_step:
        if form.holds_phi and form.decay_of == "theta" and rate:
            # The slope of λ/2·|θ|² with respect to φ.
            return grad + rate * alpha * power(weight, 2 * alpha - 1)
        return grad.add(weight, alpha=rate) if rate else grad
    phi = power(weight, 1 / alpha)
    if rate and form.decay_of == "theta":
        grad = grad.add(weight, alpha=rate)
    if form.rule == "chain":
        grad = grad * (alpha * phi.abs().pow(alpha - 1))
    if rate and form.decay_of == "phi":
        grad = grad.add(phi, alpha=rate)
    return grad


def moved(weight: Tensor, u: Tensor, lr: float, form: Form) -> Tensor:
    """The weight after the direction ``u``.

    plain, and φ stored:  w' = c·w − lr·u
    virtual, θ stored:    θ' = Ψ(c·φ − lr·u·α|φ|^(α−1))
    chain, θ stored:      θ' = Ψ(c·φ − lr·u); but θ = 0 stays 0

    c = 1 − ηλ for decoupled decay, raised to the power that makes it the factor of what decays.
    """
    alpha = form.alpha
    left = 1 - form.lr * form.weight_decay if form.decay == "decoupled" else 1.0
    of_phi = left if form.decay_of == "phi" or alpha == 1 else left ** (1 / alpha)
    if not form.is_powered_step:
        return kept(weight, of_phi).add(u, alpha=-lr)
    theta = kept(weight, left**alpha if form.decay_of == "phi" else left)
    phi = power(weight, 1 / alpha)
    slope = alpha * phi.abs().pow(alpha - 1)
    # At φ = 0 momentum would move a weight that has no gradient: the slope there stops it.
    delta = -lr * u * (slope if form.rule == "virtual" else torch.where(phi == 0, slope, 1.0))
    phi = kept(phi, of_phi)
    r = delta / phi
    # A small step is added to θ, so that neither φ's rounding nor that of 1 + r shows in it.
    near = theta + theta * torch.expm1(alpha * torch.log1p(r))
    far = power(phi + delta, alpha)
    return torch.where(delta == 0, theta, torch.where(r.abs() < 0.5, near, far))


def _compute(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _where_free(mask: Tensor | None, moved: Tensor, before: Tensor) -> Tensor:
    moved = moved.to(before.dtype)
    return moved if mask is None else torch.where(mask, moved, before)


def sgd_step(
    weight: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None,
    mask: Tensor | None,
    form: Form,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> tuple[Tensor, Tensor | None]:
    """Weight and momentum buffer after a step of SGD, kept as they are where ``mask`` is False.

    m' = μ·m + (1 − τ)·g,    u = g + μ·m' with Nesterov's momentum, else m'; without momentum g
    """
    start = _compute(weight)
    seen = seen_gradient(start, _compute(grad), form)
    if momentum_buffer is None:
        return _where_free(mask, moved(start, seen, form.lr, form), weight), None
    buffer = (momentum * _compute(momentum_buffer)).add(seen, alpha=1 - dampening)
    u = seen.add(buffer, alpha=momentum) if nesterov else buffer
    return (
        _where_free(mask, moved(start, u, form.lr, form), weight),
        _where_free(mask, buffer, momentum_buffer),
    )


def adam_step(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    count: float,
    mask: Tensor | None,
    form: Form,
    beta1: float,
    beta2: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Weight, moments and, for AMSGrad, the largest second moment after step ``count`` of Adam.

    m' = m + (1 − β₁)(g − m),    v' = β₂·v + (1 − β₂)·g²,    v̂' = max(v̂, v')
    u = m' / (√(v'/(1 − β₂^t)) + ε), lr = η / (1 − β₁^t); AMSGrad has v̂' for v'
    """
    start = _compute(weight)
    seen = seen_gradient(start, _compute(grad), form)
    first, second = _compute(exp_avg), _compute(exp_avg_sq)
    first = first + (1 - beta1) * (seen - first)
    second = beta2 * second + (1 - beta2) * seen * seen
    largest = second if max_exp_avg_sq is None else torch.maximum(_compute(max_exp_avg_sq), second)
    u = first / (largest.sqrt() / (1 - beta2**count) ** 0.5 + eps)
    return (
        _where_free(mask, moved(start, u, form.lr / (1 - beta1**count), form), weight),
        _where_free(mask, first, exp_avg),
        _where_free(mask, second, exp_avg_sq),
        None if max_exp_avg_sq is None else _where_free(mask, largest, max_exp_avg_sq),
    )
