"""The powered weight as PyTorch ops: public functions, schemas, kernels, autograd.
Longer than 350 lines: seven ops of one formula, a third of it their docstrings.

The CPU kernels register themselves from csrc/bindings.cpp when ppkernels._C is loaded.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from ppkernels import _backend
from ppkernels._checks import alpha_tensor, check_alpha, check_floating, check_like
from ppkernels.ops.power import reference

# ---- public functions


def power(weight: Tensor, alpha: float | Tensor, *, out: Tensor | None = None) -> Tensor:
    """The powered weight θ = φ·|φ|^(α−1), element by element, in one pass.

    Differentiable with respect to ``weight`` twice (`pp.autograd.Power`); not with respect to
    ``alpha``.

    Args:
        weight: φ, any shape and strides; float32, float64, bfloat16 or float16.
        alpha: α ≥ 1, a float or a 0-dim float64 tensor (on the CPU or on ``weight``'s device). A
            tensor may change its value between calls without a recompilation under torch.compile;
            on a GPU its value is not checked, since that would wait for the device.
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
        ValueError: α < 1 or not finite, shapes or devices that differ, a gradient asked of α. (The
            value of an α given as a tensor is checked by the compiled kernel: RuntimeError.)

    Source: Schwarz et al., "Powerpropagation: A sparsity inducing weight reparameterisation",
    2021, section 2 (Ψ).
    """
    check_floating("power", "weight", weight)
    alpha = alpha_tensor("power", alpha)
    if out is None:
        return Power.apply(weight, alpha)
    _check_out("power", out, weight)
    if _backend.uses_reference():
        return out.copy_(_on_reference("power", weight, alpha))
    torch.ops.ppkernels.power_out(weight, alpha, out)
    return _written(out)


def power_backward(
    grad_theta: Tensor, weight: Tensor, alpha: float | Tensor, *, out: Tensor | None = None
) -> Tensor:
    """The gradient of `power` with respect to its weight: ∂L/∂φ = ∂L/∂θ · α|φ|^(α−1), in one pass.

    At φ = 0 the factor is 0 for α > 1 and 1 for α = 1; an infinite or NaN gradient stays not
    finite there, so that loss scaling sees it. Differentiable once.

    Args:
        grad_theta: ∂L/∂θ, of ``weight``'s shape, dtype and device.
        weight: φ, as in `power`.
        alpha: α, as in `power`.
        out: an existing tensor to write into, as in `power`; may be ``grad_theta`` or ``weight``.

    Returns:
        ∂L/∂φ, of ``weight``'s shape, dtype and memory layout; or ``out``.

    Raises:
        TypeError, ValueError: as `power`.

    Source: Schwarz et al. 2021, equation 1.
    """
    check_floating("power_backward", "weight", weight)
    check_like("power_backward", "grad_theta", grad_theta, "weight", weight)
    alpha = alpha_tensor("power_backward", alpha)
    if out is None:
        return _PowerBackward.apply(grad_theta, weight, alpha)
    _check_out("power_backward", out, weight, grad_theta)
    if _backend.uses_reference():
        return out.copy_(_on_reference("power_backward", grad_theta, weight, alpha))
    torch.ops.ppkernels.power_backward_out(grad_theta, weight, alpha, out)
    return _written(out)


def power_double_backward(
    grad_grad_weight: Tensor, grad_theta: Tensor, weight: Tensor, alpha: float | Tensor
) -> Tensor:
    """The gradient of `power_backward` with respect to its weight, for gradient penalties.

    h·g·α(α−1)·sign(φ)|φ|^(α−2) with h ``grad_grad_weight`` and g ``grad_theta``. At φ = 0, where
    the second derivative of Ψ is infinite for 1 < α < 2 and jumps at α = 2, it is defined as 0; for
    α = 1 it is 0 everywhere. Not differentiable.

    Args and errors are those of `power_backward`.
    """
    check_floating("power_double_backward", "weight", weight)
    for name, tensor in (("grad_grad_weight", grad_grad_weight), ("grad_theta", grad_theta)):
        check_like("power_double_backward", name, tensor, "weight", weight)
    alpha = alpha_tensor("power_double_backward", alpha)
    _check_no_grad("power_double_backward", grad_grad_weight, grad_theta, weight)
    return _power_double_backward(grad_grad_weight, grad_theta, weight, alpha)


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
    alpha = alpha_tensor("inverse_power", alpha)
    _check_no_grad("inverse_power", theta)
    if _backend.uses_reference():
        return _on_reference("inverse_power", theta, alpha)
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
    alpha_from = alpha_tensor("rebase", alpha_from, "alpha_from")
    alpha_to = alpha_tensor("rebase", alpha_to, "alpha_to")
    _check_no_grad("rebase", weight)
    if _backend.uses_reference():
        return _on_reference("rebase", weight, alpha_from, alpha_to)
    return torch.ops.ppkernels.rebase(weight, alpha_from, alpha_to)


def _check_out(op: str, out: Tensor, weight: Tensor, *inputs: Tensor) -> None:
    check_like(op, "out", out, "weight", weight)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, weight, *inputs)):
        raise RuntimeError(
            f"{op}: out= has no gradient; call it under torch.no_grad(), or leave out= away"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(
            f"{op}: out has several elements in one place (shape {tuple(out.shape)}, strides "
            f"{out.stride()}); pass a tensor with a place for each"
        )


def _written(out: Tensor) -> Tensor:
    # An op that writes to its argument does not tell autograd; graph capture tracks it by itself.
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(out)
    return out


def _check_no_grad(op: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{op}: this op has no gradient; call it under torch.no_grad() or on detached tensors"
        )


def _on_reference(name: str, *args: Tensor) -> Tensor:
    # The compiled kernels check the exponent's value themselves. A GPU is not waited for.
    for alpha in args[-2:] if name == "rebase" else args[-1:]:
        if alpha.device.type == "cpu" and not torch.compiler.is_compiling():
            check_alpha(name, alpha.item())
    result: Tensor = getattr(reference, name)(*args)
    return result


# ---- schemas

_SCHEMAS = {
    "power": "(Tensor weight, Tensor alpha) -> Tensor",
    "power_out": "(Tensor weight, Tensor alpha, Tensor(a!) out) -> ()",
    "power_backward": "(Tensor grad_theta, Tensor weight, Tensor alpha) -> Tensor",
    "power_backward_out": (
        "(Tensor grad_theta, Tensor weight, Tensor alpha, Tensor(a!) out) -> ()"
    ),
    "power_double_backward": (
        "(Tensor grad_grad_weight, Tensor grad_theta, Tensor weight, Tensor alpha) -> Tensor"
    ),
    "inverse_power": "(Tensor theta, Tensor alpha) -> Tensor",
    "rebase": "(Tensor weight, Tensor alpha_from, Tensor alpha_to) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"ppkernels::{_name}", _schema, tags=(torch.Tag.pt2_compliant_tag,))

# ---- shapes


@torch.library.register_fake("ppkernels::power")
def _(weight: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(weight)


@torch.library.register_fake("ppkernels::power_out")
def _(weight: Tensor, alpha: Tensor, out: Tensor) -> None:
    return None


@torch.library.register_fake("ppkernels::power_backward")
def _(grad_theta: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(weight)


@torch.library.register_fake("ppkernels::power_backward_out")
def _(grad_theta: Tensor, weight: Tensor, alpha: Tensor, out: Tensor) -> None:
    return None


@torch.library.register_fake("ppkernels::power_double_backward")
def _(grad_grad_weight: Tensor, grad_theta: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(weight)


@torch.library.register_fake("ppkernels::inverse_power")
def _(theta: Tensor, alpha: Tensor) -> Tensor:
    return torch.empty_like(theta)


@torch.library.register_fake("ppkernels::rebase")
def _(weight: Tensor, alpha_from: Tensor, alpha_to: Tensor) -> Tensor:
    return torch.empty_like(weight)


# ---- kernels: the reference wherever nothing better is registered, Triton on CUDA and ROCm


def _like(result: Tensor, weight: Tensor) -> Tensor:
    """``result`` in the memory layout that the schema promises."""
    out = torch.empty_like(weight)
    return result if result.stride() == out.stride() else out.copy_(result)


@torch.library.impl("ppkernels::power", "CompositeExplicitAutograd")
def _(weight: Tensor, alpha: Tensor) -> Tensor:
    return _like(_on_reference("power", weight, alpha), weight)


@torch.library.impl("ppkernels::power_out", "CompositeExplicitAutograd")
def _(weight: Tensor, alpha: Tensor, out: Tensor) -> None:
    out.copy_(_on_reference("power", weight, alpha))


@torch.library.impl("ppkernels::power_backward", "CompositeExplicitAutograd")
def _(grad_theta: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
    return _like(_on_reference("power_backward", grad_theta, weight, alpha), weight)


@torch.library.impl("ppkernels::power_backward_out", "CompositeExplicitAutograd")
def _(grad_theta: Tensor, weight: Tensor, alpha: Tensor, out: Tensor) -> None:
    out.copy_(_on_reference("power_backward", grad_theta, weight, alpha))


@torch.library.impl("ppkernels::power_double_backward", "CompositeExplicitAutograd")
def _(grad_grad_weight: Tensor, grad_theta: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
    product = _on_reference("power_double_backward", grad_grad_weight, grad_theta, weight, alpha)
    return _like(product, weight)


@torch.library.impl("ppkernels::inverse_power", "CompositeExplicitAutograd")
def _(theta: Tensor, alpha: Tensor) -> Tensor:
    return _like(_on_reference("inverse_power", theta, alpha), theta)


@torch.library.impl("ppkernels::rebase", "CompositeExplicitAutograd")
def _(weight: Tensor, alpha_from: Tensor, alpha_to: Tensor) -> Tensor:
    return _like(_on_reference("rebase", weight, alpha_from, alpha_to), weight)


def _gpu(name: str) -> Any:
    def launch(*args: Tensor) -> Any:
        # Triton is imported by the first call on a GPU, never by `import ppkernels`.
        from ppkernels.ops.power import gpu

        return getattr(gpu, name)(*args)

    return launch


if importlib.util.find_spec("triton") is not None:
    for _name in _SCHEMAS:
        torch.library.impl(f"ppkernels::{_name}", "CUDA", _gpu(_name))


# ---- vmap: every op is elementwise, so a batch dimension is one more dimension


def _register_elementwise_vmap(name: str, exponents: int) -> None:
    op = getattr(torch.ops.ppkernels, name).default

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Tensor, int]:
        values, alphas = args[:-exponents], args[-exponents:]
        if any(dim is not None for dim in in_dims[-exponents:]):
            raise RuntimeError(
                f"vmap over {name}: the exponent cannot be batched; batch the weights instead"
            )
        batched = [
            value.expand(info.batch_size, *value.shape) if dim is None else value.movedim(dim, 0)
            for value, dim in zip(values, in_dims, strict=False)
        ]
        return op(*batched, *alphas), 0

    torch.library.register_vmap(f"ppkernels::{name}", rule)


for _name, _exponents in (
    ("power", 1),
    ("power_backward", 1),
    ("power_double_backward", 1),
    ("inverse_power", 1),
    ("rebase", 2),
):
    _register_elementwise_vmap(_name, _exponents)

# ---- autograd

# Looked up once: the attribute chain costs half a microsecond, and a layer makes two calls a step.
_POWER = torch.ops.ppkernels.power.default
_POWER_BACKWARD = torch.ops.ppkernels.power_backward.default
_POWER_DOUBLE_BACKWARD = torch.ops.ppkernels.power_double_backward.default


def _power(weight: Tensor, alpha: Tensor) -> Tensor:
    if _backend.uses_reference():
        return _on_reference("power", weight, alpha)
    return _POWER(weight, alpha)


def _power_backward(grad_theta: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
    if _backend.uses_reference():
        return _on_reference("power_backward", grad_theta, weight, alpha)
    return _POWER_BACKWARD(grad_theta, weight, alpha)


def _power_double_backward(
    grad_grad_weight: Tensor, grad_theta: Tensor, weight: Tensor, alpha: Tensor
) -> Tensor:
    if _backend.uses_reference():
        return _on_reference("power_double_backward", grad_grad_weight, grad_theta, weight, alpha)
    return _POWER_DOUBLE_BACKWARD(grad_grad_weight, grad_theta, weight, alpha)


class Power(torch.autograd.Function):
    """θ = φ·|φ|^(α−1) with the hand-written gradient ∂L/∂θ · α|φ|^(α−1).

    ``Power.apply(weight, alpha)``: φ of any shape and a 0-dim float64 tensor α; returns θ. Plain
    autograd over ``w * w.abs().pow(alpha - 1)`` gives NaN at φ = 0 for 1 < α < 2; this does not.
    Differentiable twice, works under torch.func.vmap, grad and jacrev and in
    torch.compile(fullgraph=True); forward-mode differentiation is refused with PyTorch's error.
    Arguments are not checked: `pp.power` is the checked way in.
    """

    @classmethod
    def apply(cls, weight: Tensor, alpha: Tensor) -> Tensor:
        # torch.func needs a Function with setup_context, and for those PyTorch binds the signature
        # anew in every call: 15 µs instead of 5 for a weight of 64 × 64.
        if torch._C._are_functorch_transforms_active():
            return _TransformablePower.apply(weight, alpha)
        return _apply_power(weight, alpha)

    @staticmethod
    def forward(ctx: Any, weight: Tensor, alpha: Tensor) -> Tensor:
        ctx.save_for_backward(weight, alpha)
        return _power(weight, alpha)

    @staticmethod
    def backward(ctx: Any, grad_theta: Tensor) -> tuple[Tensor, None]:
        weight, alpha = ctx.saved_tensors
        # The second Function costs some µs; without a double backward the op alone will do.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _PowerBackward.apply(grad_theta, weight, alpha), None
        return _power_backward(grad_theta, weight, alpha), None


_apply_power = super(Power, Power).apply


class _TransformablePower(torch.autograd.Function):
    """`Power` in the form that torch.func's transforms take."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, alpha: Tensor) -> Tensor:
        return _power(weight, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_theta: Tensor) -> tuple[Tensor, None]:
        weight, alpha = ctx.saved_tensors
        return _PowerBackward.apply(grad_theta, weight, alpha), None


class _PowerBackward(torch.autograd.Function):
    """g·α|φ|^(α−1) as a function of g and φ."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad_theta: Tensor, weight: Tensor, alpha: Tensor) -> Tensor:
        return _power_backward(grad_theta, weight, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_grad_weight: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        grad_theta, weight, alpha = ctx.saved_tensors
        return (
            _PowerBackward.apply(grad_grad_weight, weight, alpha),
            _PowerDoubleBackward.apply(grad_grad_weight, grad_theta, weight, alpha),
            None,
        )


class _PowerDoubleBackward(torch.autograd.Function):
    """h·g·α(α−1)·sign(φ)|φ|^(α−2), the end of the line: asking for its gradient is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_grad_weight: Tensor, grad_theta: Tensor, weight: Tensor, alpha: Tensor
    ) -> Tensor:
        return _power_double_backward(grad_grad_weight, grad_theta, weight, alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        raise RuntimeError(
            "power: the third derivative is not implemented; it is infinite at 0 for every "
            "exponent below 3 but 1 and 2"
        )
