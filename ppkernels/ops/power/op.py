"""The powered weight as PyTorch ops: public functions, schemas, kernels, autograd.
Longer than 350 lines: seven ops of one formula, a third of it their docstrings.

The CPU kernels register themselves from csrc/bindings/power.cpp when ppkernels._C is loaded.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ppkernels import _backend
from ppkernels._checks import (
    alpha_tensor,
    check_alpha,
    check_floating,
    check_like,
    check_words,
    check_words_for,
)
from ppkernels.ops._bits import unpacked
from ppkernels.ops._layout import laid_out_as
from ppkernels.ops.power import reference

# ---- public functions


def power(
    weight: Tensor,
    alpha: float | Tensor,
    *,
    words: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The powered weight θ = m·φ·|φ|^(α−1), element by element, in one pass.

    m is the bit of a mask, 1 without one. It selects and does not multiply: where it is 0, θ is +0
    whatever φ is, NaN and infinity included.

    Differentiable with respect to ``weight`` twice (`pp.autograd.Power`); not with respect to
    ``alpha``.

    Args:
        weight: φ, any shape and strides; float32, float64, bfloat16 or float16.
        alpha: α ≥ 1, a float or a 0-dim float64 tensor (on the CPU or on ``weight``'s device). A
            tensor may change its value between calls without a recompilation under torch.compile;
            on a GPU its value is not checked, since that would wait for the device.
        words: the ``words`` of a `pp.BitMask` of ``weight``'s shape, as in `apply_mask`; None, no
            mask.
        out: an existing tensor of ``weight``'s shape, dtype and device to write into; may be
            ``weight`` itself. Not with gradients: use it under ``torch.no_grad()``.

    Returns:
        θ, of ``weight``'s shape, dtype and memory layout; or ``out``.

    Exactness: arithmetic in float32 for float32 and the half types, in float64 for float64, rounded
    once. Compiled CPU kernels, float32: within 1 ULP of the exact value wherever that is a normal
    number, 1 ≤ α ≤ 8; α = 1 and α = 2 are correctly rounded. ±0, ±inf and NaN map to themselves.
    float16 underflows where |φ|^α < 3e-8.

    Raises:
        TypeError: a dtype or an argument that is not supported.
        ValueError: α < 1 or not finite, shapes, sizes or devices that do not fit, a gradient asked
            of α. (The value of an α given as a tensor is checked by the compiled kernel:
            RuntimeError.)

    Source: Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation",
    2021, section 2 (Ψ).
    """
    check_floating("power", "weight", weight)
    alpha = alpha_tensor("power", alpha, weight.device)
    if words is not None:
        check_words_for("power", words, weight)
    if out is None:
        return Power.apply(weight, alpha, words)
    _check_out("power", out, weight)
    if _backend.uses_reference():
        return out.copy_(reference.power(weight, alpha, words))
    torch.ops.ppkernels.power_out(weight, alpha, out, words)
    return _written(out)


def power_backward(
    grad_theta: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    *,
    words: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of `power` with respect to its weight: ∂L/∂φ = m·∂L/∂θ·α|φ|^(α−1), in one pass.

    At φ = 0 the factor is 0 for α > 1 and 1 for α = 1; an infinite or NaN gradient stays not
    finite there, so that loss scaling sees it. Where the mask's bit m is 0, the gradient is +0
    whatever ∂L/∂θ and φ are. Differentiable once.

    Args:
        grad_theta: ∂L/∂θ, of ``weight``'s shape, dtype and device.
        weight: φ, as in `power`.
        alpha: α, as in `power`.
        words: those of ``weight``'s mask, as in `power`.
        out: an existing tensor to write into, as in `power`; may be ``grad_theta`` or ``weight``.

    Returns:
        ∂L/∂φ, of ``weight``'s shape, dtype and memory layout; or ``out``.

    Raises:
        TypeError, ValueError: as `power`.

    Source: Schwarz et al. 2021, equation 1.
    """
    check_floating("power_backward", "weight", weight)
    check_like("power_backward", "grad_theta", grad_theta, "weight", weight)
    alpha = alpha_tensor("power_backward", alpha, weight.device)
    if words is not None:
        check_words_for("power_backward", words, weight)
    if out is None:
        return _PowerBackward.apply(grad_theta, weight, alpha, words)
    _check_out("power_backward", out, weight, grad_theta)
    if _backend.uses_reference():
        return out.copy_(reference.power_backward(grad_theta, weight, alpha, words))
    torch.ops.ppkernels.power_backward_out(grad_theta, weight, alpha, out, words)
    return _written(out)


def power_double_backward(
    grad_grad_weight: Tensor,
    grad_theta: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    *,
    words: Tensor | None = None,
) -> Tensor:
    """The gradient of `power_backward` with respect to its weight, for gradient penalties.

    m·h·g·α(α−1)·sign(φ)|φ|^(α−2), h ``grad_grad_weight``, g ``grad_theta``, m the mask's bit. At
    φ = 0, where the second derivative of Ψ is infinite for 1 < α < 2 and jumps at α = 2, it is
    defined as 0; for α = 1 it is 0 everywhere. Where the bit is 0, it is +0. Not differentiable.

    Args and errors are those of `power_backward`.
    """
    check_floating("power_double_backward", "weight", weight)
    for name, tensor in (("grad_grad_weight", grad_grad_weight), ("grad_theta", grad_theta)):
        check_like("power_double_backward", name, tensor, "weight", weight)
    alpha = alpha_tensor("power_double_backward", alpha, weight.device)
    if words is not None:
        check_words_for("power_double_backward", words, weight)
    _check_no_grad("power_double_backward", grad_grad_weight, grad_theta, weight)
    return _power_double_backward(grad_grad_weight, grad_theta, weight, alpha, words)


def inverse_power(theta: Tensor, alpha: float | Tensor) -> Tensor:
    """The weight φ = sign(θ)·|θ|^(1/α) whose power is θ: ``power(inverse_power(θ, α), α) ≈ θ``.

    Not differentiable (its slope is infinite at 0): call it on detached tensors.

    Args:
        theta: θ, any shape and strides; float32, float64, bfloat16 or float16.
        alpha: α ≥ 1, as in `power`.

    Returns:
        φ, of ``theta``'s shape, dtype and memory layout.

    Raises:
        TypeError, ValueError: as `power`; RuntimeError where ``theta`` requires a gradient.
    """
    check_floating("inverse_power", "theta", theta)
    alpha = alpha_tensor("inverse_power", alpha, theta.device)
    _check_no_grad("inverse_power", theta)
    if _backend.uses_reference():
        return reference.inverse_power(theta, alpha)
    return torch.ops.ppkernels.inverse_power(theta, alpha)


def rebase(weight: Tensor, alpha_from: float | Tensor, alpha_to: float | Tensor) -> Tensor:
    """The weight that gives the same θ under another exponent: φ' = sign(φ)·|φ|^(α/α').

    Not differentiable: call it on detached tensors.

    Args:
        weight: φ under ``alpha_from``; dtypes and shapes as in `power`.
        alpha_from: α ≥ 1 of ``weight``.
        alpha_to: α' ≥ 1 of the result.

    Returns:
        φ', of ``weight``'s shape, dtype and memory layout.

    Raises:
        TypeError, ValueError: as `power`; RuntimeError where ``weight`` requires a gradient.
    """
    check_floating("rebase", "weight", weight)
    alpha_from = alpha_tensor("rebase", alpha_from, weight.device, "alpha_from")
    alpha_to = alpha_tensor("rebase", alpha_to, weight.device, "alpha_to")
    _check_no_grad("rebase", weight)
    if _backend.uses_reference():
        return reference.rebase(weight, alpha_from, alpha_to)
    return torch.ops.ppkernels.rebase(weight, alpha_from, alpha_to)


def _check_out(op: str, out: Tensor, weight: Tensor, *inputs: Tensor) -> None:
    check_like(op, "out", out, "weight", weight)
    if _is_differentiated(out, weight, *inputs):
        raise RuntimeError(
            f"{op}: out= has no gradient; call it under torch.no_grad(), or leave out= away"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(
            f"{op}: out has several elements in one place (shape {tuple(out.shape)}, strides "
            f"{out.stride()}); pass a tensor with a place for each"
        )
    if not torch.compiler.is_compiling() and out.is_neg():
        raise ValueError(f"{op}: out is a negated view of other memory; pass out.resolve_neg()")


def _check_no_grad(op: str, *tensors: Tensor) -> None:
    if _is_differentiated(*tensors):
        raise RuntimeError(
            f"{op}: this op has no gradient; call it under torch.no_grad() or on detached tensors"
        )


def _is_differentiated(*tensors: Tensor) -> bool:
    """Whether a gradient is asked of any of them, backward or (with a tangent) forward."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True
    if torch.compiler.is_compiling():
        return False
    unpack: Any = forward_ad.unpack_dual
    return any(unpack(tensor).tangent is not None for tensor in tensors)


def _written(out: Tensor) -> Tensor:
    # An op that writes to its argument does not tell autograd; graph capture tracks it by itself.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)
    return out


# ---- schemas, shapes, and the kernels of every device but the CPU

# Tensors and exponents of each op. The last tensor gives the result its shape, dtype and layout.
_ARGUMENTS = {
    "power": (("weight",), ("alpha",)),
    "power_backward": (("grad_theta", "weight"), ("alpha",)),
    "power_double_backward": (("grad_grad_weight", "grad_theta", "weight"), ("alpha",)),
    "inverse_power": (("theta",), ("alpha",)),
    "rebase": (("weight",), ("alpha_from", "alpha_to")),
}
# Ops that also come as <op>_out(..., Tensor(a!) out) -> ().
_WITH_OUT = ("power", "power_backward")
# Ops whose last argument is the words of a mask, or None, which may be left away.
_WITH_MASK = ("power", "power_backward", "power_double_backward")


def _define(name: str) -> None:
    """Schema, shapes and reference kernel of one op, and what vmap makes of it."""
    tensors, exponents = _ARGUMENTS[name]
    arguments = ", ".join(f"Tensor {argument}" for argument in (*tensors, *exponents))
    mask = ", Tensor? words=None" if name in _WITH_MASK else ""
    numbers = slice(len(tensors), len(tensors) + len(exponents))
    tags = (torch.Tag.pt2_compliant_tag,)

    def shape(*args: Tensor) -> Tensor:
        return torch.empty_like(args[len(tensors) - 1])

    def kernel(*args: Any) -> Tensor:
        # The compiled kernels check the exponent's value themselves. A GPU is not waited for.
        for exponent in args[numbers]:
            if exponent.device.type == "cpu":
                check_alpha(name, exponent.item())
        for words in args[numbers.stop :]:
            if words is not None:
                check_words(name, words, args[len(tensors) - 1].numel())
        return laid_out_as(getattr(reference, name)(*args), shape(*args))

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        # Elementwise: a batch dimension is one more dimension.
        if any(dim is not None for dim in in_dims[numbers]):
            raise RuntimeError(
                f"vmap over {name}: the exponent cannot be batched; batch the weights instead, "
                "with one exponent for all"
            )
        values = [
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip(args[: len(tensors)], in_dims, strict=False)
        ]
        result = getattr(torch.ops.ppkernels, name).default(*values, *args[numbers])
        for words, dim in zip(args[numbers.stop :], in_dims[numbers.stop :], strict=True):
            # A mask's bits are in the order of one weight, not of a batch of them.
            if words is not None:
                bits = unpacked(words if dim is None else words.movedim(dim, 0), result.shape[1:])
                result = torch.where(bits, result, 0.0)
        return result, 0

    torch.library.define(f"ppkernels::{name}", f"({arguments}{mask}) -> Tensor", tags=tags)
    torch.library.register_fake(f"ppkernels::{name}", shape)
    # The reference, wherever nothing better is registered for a device.
    torch.library.impl(f"ppkernels::{name}", "CompositeExplicitAutograd", kernel)
    torch.library.register_vmap(f"ppkernels::{name}", batched)
    if name in _WITH_OUT:

        def kernel_into(*args: Any) -> None:
            args[numbers.stop].copy_(kernel(*args[: numbers.stop], *args[numbers.stop + 1 :]))

        into = f"ppkernels::{name}_out"
        torch.library.define(into, f"({arguments}, Tensor(a!) out{mask}) -> ()", tags=tags)
        torch.library.register_fake(into, lambda *args: None)
        torch.library.impl(into, "CompositeExplicitAutograd", kernel_into)


def _define_on_gpu(name: str) -> None:
    def launch(*args: Tensor) -> Any:
        # Triton is imported by the first call on a GPU, never by `import ppkernels`.
        from ppkernels.ops.power import gpu

        return getattr(gpu, name)(*args)

    torch.library.impl(f"ppkernels::{name}", "CUDA", launch)


for _name in _ARGUMENTS:
    _define(_name)
if importlib.util.find_spec("triton") is not None:
    for _name in (*_ARGUMENTS, *(f"{_name}_out" for _name in _WITH_OUT)):
        _define_on_gpu(_name)

# ---- autograd

_POWER = torch.ops.ppkernels.power.default
_POWER_BACKWARD = torch.ops.ppkernels.power_backward.default
_POWER_DOUBLE_BACKWARD = torch.ops.ppkernels.power_double_backward.default
# What an overload's __call__ forwards to, which takes a third of a microsecond; a layer makes two
# calls a step. Tracers need the overload itself.
_POWER_NOW = getattr(_POWER, "_op", _POWER)
_POWER_BACKWARD_NOW = getattr(_POWER_BACKWARD, "_op", _POWER_BACKWARD)

# Note [torch.func inside torch.compile]
#
# Under torch.func's gradients torch.compile looks into a Function's forward and ignores its
# backward, and the op by itself has no gradient: the result would be zero. So the tracer is stopped
# there; without fullgraph=True it then leaves that part to eager mode, which is right.


def _is_transformed_by_gradients() -> bool:
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key().name in ("Grad", "Jvp") for level in stack)


# torch.compiler.assume_constant_result by hand: the decorator would import the compiler now.
_is_transformed_by_gradients._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse_untraceable_gradients() -> None:
    if torch._C._are_functorch_transforms_active() and _is_transformed_by_gradients():
        raise RuntimeError(
            "power: gradients of torch.func cannot be traced inside torch.compile; leave "
            "torch.func.grad outside of it, or use backward()"
        )


# Words may be None or left away. Each None that is passed along costs a layer's call a fraction of
# a microsecond: `Power` leaves it away. (Dynamo does not: it calls `Power.forward` with all that
# `Power.apply` was called with, so that a Function of its own for masks would not do.)


def _power(weight: Tensor, alpha: Tensor, *words: Tensor | None) -> Tensor:
    if _backend.uses_reference():
        return laid_out_as(reference.power(weight, alpha, *words), torch.empty_like(weight))
    if torch.compiler.is_compiling():
        _refuse_untraceable_gradients()
        return _POWER(weight, alpha, *words)
    return _POWER_NOW(weight, alpha, *words)


def _power_backward(
    grad_theta: Tensor, weight: Tensor, alpha: Tensor, *words: Tensor | None
) -> Tensor:
    if _backend.uses_reference():
        result = reference.power_backward(grad_theta, weight, alpha, *words)
        return laid_out_as(result, torch.empty_like(weight))
    if torch.compiler.is_compiling():
        _refuse_untraceable_gradients()
        return _POWER_BACKWARD(grad_theta, weight, alpha, *words)
    return _POWER_BACKWARD_NOW(grad_theta, weight, alpha, *words)


def _power_double_backward(
    grad_grad_weight: Tensor,
    grad_theta: Tensor,
    weight: Tensor,
    alpha: Tensor,
    words: Tensor | None,
) -> Tensor:
    inputs = (grad_grad_weight, grad_theta, weight, alpha, words)
    if _backend.uses_reference():
        return laid_out_as(reference.power_double_backward(*inputs), torch.empty_like(weight))
    return _POWER_DOUBLE_BACKWARD(*inputs)


class Power(torch.autograd.Function):
    """θ = m·φ·|φ|^(α−1) with the hand-written gradient m·∂L/∂θ·α|φ|^(α−1).

    ``Power.apply(weight, alpha, words=None)``: φ of any shape, a 0-dim float64 tensor α, and the
    words of a mask with the bits m; returns θ. Where m is 0, θ and the gradient are +0, whatever φ
    and ∂L/∂θ are. Plain autograd over ``w * w.abs().pow(alpha - 1)`` gives NaN at φ = 0 for
    1 < α < 2; this does not.
    Differentiable twice, works under torch.func.vmap, grad and jacrev and in
    torch.compile(fullgraph=True), though gradients of torch.func inside torch.compile break the
    graph (Note [torch.func inside torch.compile]); forward-mode differentiation is refused with
    PyTorch's error. Arguments are not checked: `pp.power` is the checked way in.
    """

    @classmethod
    def apply(cls, weight: Tensor, alpha: Tensor, words: Tensor | None = None) -> Tensor:
        # torch.func needs a Function with setup_context, and for those PyTorch binds the signature
        # anew in every call: 15 µs instead of 5 for a weight of 64 × 64.
        if torch._C._are_functorch_transforms_active():
            return _TransformablePower.apply(weight, alpha, words)
        if words is None:
            return _apply_power(weight, alpha)
        return _apply_power(weight, alpha, words)

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor, *words: Tensor) -> Tensor:
        ctx.save_for_backward(weight, alpha, *words)
        return _power(weight, alpha, *words)

    @staticmethod
    def backward(ctx: Any, grad_theta: Tensor) -> tuple[Tensor | None, ...]:
        weight, alpha, *words = ctx.saved_tensors
        # The second Function costs some µs; without a double backward the op alone will do.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grad_weight = _PowerBackward.apply(
                grad_theta, weight, alpha, words[0] if words else None
            )
        else:
            grad_weight = _power_backward(grad_theta, weight, alpha, *words)
        return (grad_weight, None, None) if words else (grad_weight, None)


_apply_power = super(Power, Power).apply


class _TransformablePower(torch.autograd.Function):
    """`Power` in the form that torch.func's transforms take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, alpha: Tensor, words: Tensor | None) -> Tensor:
        return _power(weight, alpha, words)

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor
    ) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_theta: Tensor) -> tuple[Tensor, None, None]:
        return _PowerBackward.apply(grad_theta, *ctx.saved_tensors), None, None


class _PowerBackward(torch.autograd.Function):
    """m·g·α|φ|^(α−1) as a function of g and φ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_theta: Tensor, weight: Tensor, alpha: Tensor, words: Tensor | None) -> Tensor:
        return _power_backward(grad_theta, weight, alpha, words)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(
        ctx: Any, grad_grad_weight: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        grad_theta, *rest = ctx.saved_tensors
        for_grad, for_weight, *_ = ctx.needs_input_grad
        return (
            _PowerBackward.apply(grad_grad_weight, *rest) if for_grad else None,
            _PowerDoubleBackward.apply(grad_grad_weight, grad_theta, *rest) if for_weight else None,
            None,
            None,
        )


class _PowerDoubleBackward(torch.autograd.Function):
    """m·h·g·α(α−1)·sign(φ)|φ|^(α−2), the end of the line: asking for its gradient is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_grad_weight: Tensor,
        grad_theta: Tensor,
        weight: Tensor,
        alpha: Tensor,
        words: Tensor | None,
    ) -> Tensor:
        return _power_double_backward(grad_grad_weight, grad_theta, weight, alpha, words)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(
            "power: the third derivative is not implemented; it is infinite at 0 for every "
            "exponent below 3 but 1 and 2"
        )
