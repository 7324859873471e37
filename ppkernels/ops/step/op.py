"""The fused step as PyTorch ops: public functions, schemas, kernels.
Longer than 350 lines: two ops of the same many options, a third of it their docstrings.

The CPU kernels register themselves from csrc/bindings/step.cpp when ppkernels._C is loaded.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppkernels import _backend
from ppkernels._checks import alpha_tensor, check_no_grad, check_not_captured, check_word
from ppkernels.ops.step import lists

Tensors = Sequence[Tensor]

# ---- public functions


def sgd_step_(
    weights: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors = (),
    *,
    masters: Tensors = (),
    masks: Tensors = (),
    alphas: Sequence[float | Tensor],
    holds_phi: Sequence[bool | int] = (),
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decay: str = "coupled",
    decay_of: str = "theta",
    rule: str = "virtual",
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of SGD for a list of weights, in place, all of them in one pass and one call.

    For a weight that holds θ, with φ = sign(θ)·|θ|^(1/α) computed on the way and never stored::

        virtual: m ← μ·m + (1−τ)·g                   φ ← c·φ − lr·u·α|φ|^(α−1)
        chain:   m ← μ·m + (1−τ)·g·α|φ|^(α−1)        φ ← c·φ − lr·u

    u = m, or g + μ·m with Nesterov's momentum, or g without buffers. At α = 1, and for weights that
    hold φ with their own gradient ∂L/∂φ, it is plain SGD: w ← c·w − lr·u.

    Weight decay λ: ``"coupled"`` adds λ·θ to ∂L/∂θ, or λ·φ to the gradient that is averaged;
    ``"decoupled"`` multiplies θ, or φ, by 1 − lr·λ (c is that, or its α-th root).

    Args:
        weights: θ or φ, float32, float64, bfloat16 or float16, of any shape; overwritten.
        grads: ∂L/∂θ or ∂L/∂φ, each of its weight's shape and dtype; read only.
        momentum_buffers: m, each like its weight, or float32 beside a half type; overwritten. An
            empty list: no momentum.
        masters: float32 copies of weights of a half type, which are stepped in their place and then
            rounded into them; a tensor of no elements for a weight without. Where a weight is not
            its copy rounded, it has been overwritten, and the step starts from the weight.
        masks: for each weight the ``words`` of a `pp.BitMask`, or a tensor of no elements: where
            the bit is 0, weight, master and state keep their bits.
        alphas: α ≥ 1 of each weight; 1 for plain ones.
        holds_phi: which weights hold φ; none by default.
        lr: η ≥ 0, a number, or a tensor of one, float32 or float64, on the CPU or on the weights'
            device. A tensor's value is read at the step: by the kernel where it lies on a GPU, so
            that a CUDA graph sees it change (and nothing checks it there; a graph records no step
            with a tensor on the CPU, whose value it would keep). torch.compile takes numbers for
            constants: another one, as another ``momentum`` and the like, compiles again, another
            value in the tensor does not.
        momentum, dampening, nesterov: as in torch.optim.SGD; but a buffer of zeros is averaged like
            any other, where torch takes the first gradient whole.
        weight_decay, decay, decay_of: λ ≥ 0, ``"coupled"`` or ``"decoupled"``, ``"theta"`` or
            ``"phi"``.
        rule: ``"virtual"`` or ``"chain"``, for the weights that hold θ.
        maximize: step against the gradient's sign.
        grad_scale: gradients are divided by it. One float32 number, as torch.amp.GradScaler has it.
        found_inf: where it is not 0, nothing at all is done.

    Exactness: float32 and the half types in float32, float64 in float64. What φ moves by is good to
    2^-20 of itself, and 2^-24 more for each power of two between |θ| and 1; twice that by the chain
    rule. θ' is rounded from there, within 2 ULP. A step of zero leaves θ bit-equal, and θ = 0 stays
    0 for α > 1. What is not finite stays so. On GPUs the bound of φ's move in float32 is for |θ|
    from 2^-102 to 2^102: beyond, a factor of it may be subnormal and lose bits, or the move all.

    Raises:
        TypeError, ValueError, RuntimeError: tensors that do not go together, options out of range.

    Source: Schwarz et al. 2021, section 2 and appendix (the virtual rule).
    """
    rate, value = _rate("sgd_step_", lr, weights)
    _check_options("sgd_step_", weight_decay, value, decay, decay_of, rule, momentum=momentum)
    if momentum and not momentum_buffers and len(weights):
        raise ValueError(f"sgd_step_: momentum {momentum} needs momentum_buffers, got none")
    forms = _forms("sgd_step_", weights, masters, masks, alphas, holds_phi)
    options = (rate, float(momentum), float(dampening), nesterov, float(weight_decay))
    words = (decay, decay_of, rule, maximize, grad_scale, found_inf)
    step: Any = lists.sgd_step_ if _backend.uses_reference() else torch.ops.ppkernels.sgd_step_
    with torch.no_grad():
        step(list(weights), list(grads), list(momentum_buffers), *forms, *options, *words)
    _written(found_inf, weights, momentum_buffers, masters)


def adam_step_(
    weights: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors = (),
    *,
    steps: Tensors,
    masters: Tensors = (),
    masks: Tensors = (),
    alphas: Sequence[float | Tensor],
    holds_phi: Sequence[bool | int] = (),
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay: str = "decoupled",
    decay_of: str = "theta",
    rule: str = "virtual",
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of Adam for a list of weights, in place, all of them in one pass and one call.

    With g the gradient as `sgd_step_` sees it (for ``rule="chain"`` multiplied by α|φ|^(α−1))::

        m ← m + (1−β₁)(g − m)        v ← β₂·v + (1−β₂)·g²
        u = m / (√(v/(1−β₂^t)) + ε)

    and the weight moves by u as there, at the learning rate lr/(1−β₁^t). With
    ``decay="decoupled"`` it is AdamW.

    Args:
        weights, grads, masters, masks, alphas, holds_phi: as in `sgd_step_`.
        exp_avgs, exp_avg_sqs: m and v, each like its weight, or float32 beside a half type;
            overwritten.
        max_exp_avg_sqs: the largest v so far, which takes the place of v in u: AMSGrad. Empty: not.
        steps: t of each weight, a float32 tensor of one number; counted up first. For a CUDA graph
            they have to be on the weights' device, as ``grad_scale`` and ``found_inf`` do.
        beta1, beta2, eps: as in torch.optim.AdamW.
        lr, weight_decay, decay, decay_of, rule, maximize, grad_scale, found_inf: as in `sgd_step_`.

    Exactness and errors: as `sgd_step_`.

    Source: Kingma & Ba 2015; Loshchilov & Hutter 2019; Reddi et al. 2018; the powered step: Schwarz
    et al. 2021.
    """
    rate, value = _rate("adam_step_", lr, weights)
    _check_options("adam_step_", weight_decay, value, decay, decay_of, rule, eps=eps)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"adam_step_: {name} must be a number >= 0 and < 1, got {beta}")
    forms = _forms("adam_step_", weights, masters, masks, alphas, holds_phi)
    states = (list(exp_avgs), list(exp_avg_sqs), list(max_exp_avg_sqs), list(steps))
    options = (rate, float(beta1), float(beta2), float(eps), float(weight_decay))
    words = (decay, decay_of, rule, maximize, grad_scale, found_inf)
    step: Any = lists.adam_step_ if _backend.uses_reference() else torch.ops.ppkernels.adam_step_
    with torch.no_grad():
        step(list(weights), list(grads), *states, *forms, *options, *words)
    _written(found_inf, weights, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, masters, steps)


def _forms(
    op: str,
    weights: Tensors,
    masters: Tensors,
    masks: Tensors,
    alphas: Sequence[float | Tensor],
    holds_phi: Sequence[bool | int],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
    """What both ops take about the weights. The tensors are checked by the kernel."""
    device = weights[0].device if len(weights) else None
    exponents = [
        alpha if isinstance(alpha, Tensor) else alpha_tensor(op, alpha, device, "alphas")
        for alpha in alphas
    ]
    return list(masters), list(masks), exponents, list(map(int, holds_phi))


def _rate(op: str, lr: float | Tensor, weights: Tensors) -> tuple[Tensor, float]:
    """A learning rate as the ops take it, and its value.

    The value is 0 where asking for it would wait for a GPU or break a graph: there the kernel
    checks it.
    """
    if not isinstance(lr, Tensor):
        number = _number(op, lr)
        # The device is named because `with torch.device("meta")` would lose the value.
        return torch.scalar_tensor(number, dtype=torch.float64, device="cpu"), number
    if lr.dtype not in (torch.float32, torch.float64) or lr.numel() != 1:
        raise TypeError(
            f"{op}: lr as a tensor must hold one float32 or float64 number, got "
            f"{tuple(lr.shape)} {lr.dtype}"
        )
    check_no_grad(op, "lr", lr)
    device = weights[0].device if len(weights) else lr.device
    is_here = lr.device.type == "cpu"
    if not is_here and lr.device != device:
        raise ValueError(
            f"{op}: lr must be on the CPU or on the device of the weights, {device}, "
            f"got {lr.device}"
        )
    if not is_here or torch.compiler.is_compiling():
        return lr, 0.0
    check_not_captured(op, "lr", device)
    return lr, lr.item()


def _number(op: str, lr: Any) -> float:
    # Words are turned away, though float() would read some.
    if not isinstance(lr, (str, bytes)):
        try:
            return float(lr)
        except TypeError:
            pass
    raise TypeError(f"{op}: lr must be a number, or a tensor of one, got {lr!r}")


def _check_options(
    op: str,
    weight_decay: float,
    lr: float,
    decay: str,
    decay_of: str,
    rule: str,
    **more: float,
) -> None:
    check_word(op, "rule", rule, "virtual", "chain")
    check_word(op, "decay", decay, "coupled", "decoupled")
    check_word(op, "decay_of", decay_of, "theta", "phi")
    for name, number in {"lr": lr, "weight_decay": weight_decay, **more}.items():
        # Written so that NaN fails.
        if not 0 <= number < math.inf:
            raise ValueError(f"{op}: {name} must be a finite number >= 0, got {number}")
    if decay == "decoupled" and not lr * weight_decay < 1:
        raise ValueError(
            f"{op}: decoupled decay multiplies weights by 1 - lr * weight_decay, which must be "
            f"positive; got lr {lr} and weight_decay {weight_decay}"
        )


def _written(found_inf: Tensor | None, *written: Tensors) -> None:
    # An op that writes to its arguments does not tell autograd; graph capture tracks it by itself.
    if torch.compiler.is_compiling():
        return
    # A GPU is not asked whether the step was left out.
    if found_inf is not None and found_inf.device.type == "cpu" and found_inf.item() != 0:
        return
    for tensors in written:
        torch.autograd.graph.increment_version(tensors)


# ---- schemas, and the kernels of every device but the CPU

_FORM = (
    "Tensor(m!)[] masters, Tensor[] masks, Tensor[] alphas, int[] holds_phi, Tensor lr, {own}, "
    "float weight_decay, str decay, str decay_of, str rule, bool maximize, Tensor? grad_scale, "
    "Tensor? found_inf"
)
_SCHEMAS = {
    "sgd_step_": "(Tensor(w!)[] weights, Tensor[] grads, Tensor(s!)[] momentum_buffers, "
    + _FORM.format(own="float momentum, float dampening, bool nesterov")
    + ") -> ()",
    "adam_step_": "(Tensor(w!)[] weights, Tensor[] grads, Tensor(s!)[] exp_avgs, "
    "Tensor(v!)[] exp_avg_sqs, Tensor(x!)[] max_exp_avg_sqs, Tensor(t!)[] steps, "
    + _FORM.format(own="float beta1, float beta2, float eps")
    + ") -> ()",
}


def _define(name: str, kernel: Any) -> None:
    # Inductor ends its CUDA graphs before a step: what their trial runs allocate has to be let go,
    # and a table is kept (kept.py). A graph of one's own can record a step.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    torch.library.define(f"ppkernels::{name}", _SCHEMAS[name], tags=tags)
    torch.library.register_fake(f"ppkernels::{name}", lambda *args: None)
    # The reference, wherever nothing better is registered for a device.
    torch.library.impl(f"ppkernels::{name}", "CompositeExplicitAutograd", kernel)


def _define_on_gpu(name: str) -> None:
    def launch(*args: Any) -> None:
        # Triton is imported by the first call on a GPU, never by `import ppkernels`.
        from ppkernels.ops.step import gpu

        getattr(gpu, name)(*args)

    torch.library.impl(f"ppkernels::{name}", "CUDA", launch)


_define("sgd_step_", lists.sgd_step_)
_define("adam_step_", lists.adam_step_)
if importlib.util.find_spec("triton") is not None:
    for _name in _SCHEMAS:
        _define_on_gpu(_name)
