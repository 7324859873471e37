"""The linear layer of a powered weight as PyTorch ops: functions, schemas, kernels, autograd.
Longer than 350 lines: three ops, a third of it their docstrings.

On the CPU, and wherever there is no Triton, the ops power the weight into a buffer and multiply.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppkernels import _backend
from ppkernels._checks import alpha_tensor, check_floating, check_words_for
from ppkernels.ops._layout import as_rows, laid_out_as
from ppkernels.ops.power import Power, power_backward
from ppkernels.ops.power_linear import reference

# ---- public functions


def power_linear(
    input: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    bias: Tensor | None = None,
    *,
    words: Tensor | None = None,
) -> Tensor:
    """The linear layer y = x·θᵀ + b of a powered weight, θ = m·φ·|φ|^(α−1).

    θ is not kept for the backward pass, which computes it again from φ: less memory than
    ``F.linear(input, pp.power(weight, alpha))``. On a GPU, small batches do not even write it:
    each tile is powered and masked in registers on its way into the matrix units
    (ops/power_linear/README.md says when). On the CPU, where the buffer is written each time, keep
    θ instead if memory allows: it saves a pass.

    Differentiable with respect to ``input``, ``weight`` (φ) and ``bias``, twice; not with respect
    to ``alpha``. Under autocast, ``input`` is cast as F.linear's would be, and φ stays as it is.

    Args:
        input: x, [..., K]; float32, float64, bfloat16 or float16.
        weight: φ, [N, K], of ``input``'s dtype, or float32 beside an input of a half type.
        alpha: α ≥ 1, as in `power`.
        bias: b, [N], of any of the dtypes; None, no bias.
        words: the ``words`` of a `pp.BitMask` of ``weight``'s shape, as in `power`; None, no mask.

    Returns:
        y, [..., N], contiguous, of ``input``'s dtype.

    Exactness: θ is rounded to ``input``'s dtype, half types from a power that is good to 2^-16;
    products are summed up in float32 for them. float32 on a GPU follows
    torch.backends.cuda.matmul.fp32_precision: in full (where fused on NVIDIA, as three products of
    TF32 parts), unless TF32 is allowed.

    Raises:
        TypeError: a dtype that is not supported, or dtypes that do not go together.
        ValueError: shapes, sizes, devices or an α that do not fit.

    Source: Schwarz et al. 2021, section 2 (Ψ inside a layer).
    """
    check_floating("power_linear", "input", input)
    alpha = _checked("power_linear", weight, alpha, words)
    input, weight = _cast(input, weight)
    _check_operand("power_linear", "input", input, weight, 1)
    if bias is not None:
        check_floating("power_linear", "bias", bias)
        if bias.shape != weight.shape[:1] or bias.device != weight.device:
            raise ValueError(
                f"power_linear: bias must have shape ({weight.shape[0]},) on {weight.device}, got "
                f"{tuple(bias.shape)} on {bias.device}"
            )
    return PowerLinear.apply(input, weight, alpha, bias, words)


def power_linear_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    *,
    words: Tensor | None = None,
) -> Tensor:
    """The gradient of `power_linear` with respect to its input: ∂L/∂x = ∂L/∂y·θ.

    Args:
        grad_output: ∂L/∂y, [..., N], of the input's dtype.
        weight, alpha, words: as in `power_linear`.

    Returns:
        ∂L/∂x, [..., K], contiguous, of ``grad_output``'s dtype.

    Raises:
        TypeError, ValueError: as `power_linear`.
    """
    check_floating("power_linear_grad_input", "grad_output", grad_output)
    alpha = _checked("power_linear_grad_input", weight, alpha, words)
    _check_operand("power_linear_grad_input", "grad_output", grad_output, weight, 0)
    return _grad_input(grad_output.detach(), weight.detach(), alpha, words)


def power_linear_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    alpha: float | Tensor,
    *,
    words: Tensor | None = None,
) -> Tensor:
    """The gradient of `power_linear` with respect to φ. Not differentiable.

    ∂L/∂φ = m·(∂L/∂y)ᵀx·α|φ|^(α−1), summed over all leading dimensions.

    Args:
        grad_output: ∂L/∂y, [..., N], of ``input``'s dtype.
        input: x, [..., K], with the leading dimensions of ``grad_output``.
        weight, alpha, words: as in `power_linear`.

    Returns:
        ∂L/∂φ, [N, K], of ``weight``'s dtype and memory layout.

    Raises:
        TypeError, ValueError: as `power_linear`.
    """
    op = "power_linear_grad_weight"
    check_floating(op, "grad_output", grad_output)
    check_floating(op, "input", input)
    alpha = _checked(op, weight, alpha, words)
    _check_operand(op, "grad_output", grad_output, weight, 0)
    _check_operand(op, "input", input, weight, 1)
    if grad_output.shape[:-1] != input.shape[:-1] or grad_output.dtype != input.dtype:
        raise ValueError(
            f"{op}: grad_output and input must agree in dtype and in all dimensions but the last, "
            f"got {tuple(grad_output.shape)} {grad_output.dtype} and {tuple(input.shape)} "
            f"{input.dtype}"
        )
    return _grad_weight(grad_output.detach(), input.detach(), weight.detach(), alpha, words)


def _checked(op: str, weight: Tensor, alpha: float | Tensor, words: Tensor | None) -> Tensor:
    """α as a tensor, once weight, exponent and mask are what they should be."""
    check_floating(op, "weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"{op}: weight must have two dimensions, got shape {tuple(weight.shape)}")
    if words is not None:
        check_words_for(op, words, weight)
    return alpha_tensor(op, alpha, weight.device)


def _cast(input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``input`` as autocast gives it to a linear layer, and a weight that goes with it."""
    device = input.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (input.dtype, weight.dtype):
        return input, weight
    dtype = torch.get_autocast_dtype(device)
    # A float32 weight stays what it is; one of the other half type is cast as well.
    return input.to(dtype), weight if weight.dtype == torch.float32 else weight.to(dtype)


def _check_operand(op: str, name: str, operand: Tensor, weight: Tensor, dim: int) -> None:
    """``operand`` fits dimension ``dim`` of the weight."""
    features = weight.shape[dim]
    if operand.dim() == 0 or operand.shape[-1] != features:
        came = f"{operand.shape[-1]} features" if operand.dim() else "no dimension"
        raise ValueError(
            f"{op}: {name} has {came}, weight {tuple(weight.shape)} expects {features}"
        )
    is_half = operand.dtype in (torch.bfloat16, torch.float16)
    if operand.dtype != weight.dtype and not (is_half and weight.dtype == torch.float32):
        raise TypeError(
            f"{op}: {name} must have the dtype of weight, {weight.dtype}, or be of a half type "
            f"beside a float32 weight, got {operand.dtype}"
        )
    if operand.device != weight.device:
        raise ValueError(
            f"{op}: {name} must be on the device of weight, {weight.device}, got {operand.device}"
        )


# ---- schemas, shapes, and the kernels of every device

_SCHEMAS = {
    "power_linear": "(Tensor input, Tensor weight, Tensor alpha, Tensor? bias, Tensor? words)",
    "power_linear_grad_input": ("(Tensor grad_output, Tensor weight, Tensor alpha, Tensor? words)"),
    "power_linear_grad_weight": (
        "(Tensor grad_output, Tensor input, Tensor weight, Tensor alpha, Tensor? words)"
    ),
}
_SHAPES: dict[str, Callable[..., Tensor]] = {
    "power_linear": lambda input, weight, alpha, bias, words: input.new_empty(
        (*input.shape[:-1], weight.shape[0])
    ),
    "power_linear_grad_input": lambda grad_output, weight, alpha, words: grad_output.new_empty(
        (*grad_output.shape[:-1], weight.shape[1])
    ),
    "power_linear_grad_weight": lambda grad_output, input, weight, alpha, words: torch.empty_like(
        weight
    ),
}


# θ is powered into a buffer by the best kernel there is for the device, and multiplied.


def _power_linear(
    input: Tensor, weight: Tensor, alpha: Tensor, bias: Tensor | None, words: Tensor | None
) -> Tensor:
    theta = torch.ops.ppkernels.power(weight, alpha, words).to(input.dtype)
    return F.linear(input, theta, None if bias is None else bias.to(input.dtype))


def _power_linear_grad_input(
    grad_output: Tensor, weight: Tensor, alpha: Tensor, words: Tensor | None
) -> Tensor:
    theta = torch.ops.ppkernels.power(weight, alpha, words).to(grad_output.dtype)
    return grad_output @ theta


def _power_linear_grad_weight(
    grad_output: Tensor, input: Tensor, weight: Tensor, alpha: Tensor, words: Tensor | None
) -> Tensor:
    return _grad_weight_by(
        torch.ops.ppkernels.power_backward, grad_output, input, weight, alpha, words
    )


def _grad_weight_by(
    scale: Callable[..., Tensor],
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    alpha: Tensor,
    words: Tensor | None,
) -> Tensor:
    """``scale`` is op power_backward. The gradient of θ is not rounded to a half type: the slope,
    which is small, may bring back what would overflow there."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    grad_theta = as_rows(grad_output).to(wide).t() @ as_rows(input).to(wide)
    return scale(grad_theta, weight.to(wide), alpha, words=words).to(weight.dtype)


_KERNELS: dict[str, Callable[..., Tensor]] = {
    "power_linear": _power_linear,
    "power_linear_grad_input": _power_linear_grad_input,
    "power_linear_grad_weight": _power_linear_grad_weight,
}


def _define(name: str) -> None:
    """Schema, shapes, and the kernels of one op."""

    def kernel(*args: Any) -> Tensor:
        # Its caller has cast what autocast would cast.
        with torch.autocast(args[0].device.type, enabled=False):
            return laid_out_as(_KERNELS[name](*args), _SHAPES[name](*args))

    def launch(*args: Any) -> Tensor:
        # Triton is imported by the first call on a GPU, never by `import ppkernels`.
        from ppkernels.ops.power_linear import gpu

        return getattr(gpu, name)(*args)

    tags = (torch.Tag.pt2_compliant_tag,)
    torch.library.define(f"ppkernels::{name}", f"{_SCHEMAS[name]} -> Tensor", tags=tags)
    torch.library.register_fake(f"ppkernels::{name}", _SHAPES[name])
    torch.library.impl(f"ppkernels::{name}", "CompositeExplicitAutograd", kernel)
    if importlib.util.find_spec("triton") is not None:
        torch.library.impl(f"ppkernels::{name}", "CUDA", launch)


for _name in _SCHEMAS:
    _define(_name)

# ---- autograd


def _forward(
    input: Tensor, weight: Tensor, alpha: Tensor, bias: Tensor | None, words: Tensor | None
) -> Tensor:
    if _backend.uses_reference():
        return reference.power_linear(input, weight, alpha, bias, words)
    return torch.ops.ppkernels.power_linear.default(input, weight, alpha, bias, words)


def _grad_input(grad_output: Tensor, weight: Tensor, alpha: Tensor, words: Tensor | None) -> Tensor:
    if _backend.uses_reference():
        return reference.power_linear_grad_input(grad_output, weight, alpha, words)
    return torch.ops.ppkernels.power_linear_grad_input.default(grad_output, weight, alpha, words)


def _grad_weight(
    grad_output: Tensor, input: Tensor, weight: Tensor, alpha: Tensor, words: Tensor | None
) -> Tensor:
    args = (grad_output, input, weight, alpha, words)
    if _backend.uses_reference():
        out = reference.power_linear_grad_weight(*args)
        return laid_out_as(out, torch.empty_like(weight))
    return torch.ops.ppkernels.power_linear_grad_weight.default(*args)


class PowerLinear(torch.autograd.Function):
    """y = x·θᵀ + b with θ = m·φ·|φ|^(α−1), and its gradients, without keeping θ.

    ``PowerLinear.apply(input, weight, alpha, bias=None, words=None)``, the arguments of
    `pp.power_linear`, which is the checked way in. Differentiable twice; works in
    torch.compile(fullgraph=True) and under torch.func's transforms, where it is the composition of
    `Power` and F.linear.
    """

    @classmethod
    def apply(
        cls,
        input: Tensor,
        weight: Tensor,
        alpha: Tensor,
        bias: Tensor | None = None,
        words: Tensor | None = None,
    ) -> Tensor:
        if torch._C._are_functorch_transforms_active():
            theta = Power.apply(weight, alpha, words).to(input.dtype)
            return F.linear(input, theta, None if bias is None else bias.to(input.dtype))
        return _apply_function(input, weight, alpha, bias, words)

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        words: Tensor | None,
    ) -> Tensor:
        for_input, for_weight, *_ = ctx.needs_input_grad
        is_powered = for_input or for_weight
        ctx.save_for_backward(
            input if for_weight else None, *((weight, alpha, words) if is_powered else (None,) * 3)
        )
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(input, weight, alpha, bias, words)

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor | None, None]:
        input, weight, alpha, words = ctx.saved_tensors
        for_input, for_weight, _, for_bias, _ = ctx.needs_input_grad
        grad_input = grad_weight = grad_bias = None
        # With a double backward in view, in ops that have gradients themselves.
        is_differentiated = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if for_input and is_differentiated:
            grad_input = grad_output @ Power.apply(weight, alpha, words).to(grad_output.dtype)
        elif for_input:
            grad_input = _grad_input(grad_output, weight, alpha, words)
        if for_weight and is_differentiated:
            args = (grad_output, input, weight, alpha, words)
            grad_weight = _grad_weight_by(power_backward, *args)
        elif for_weight:
            grad_weight = _grad_weight(grad_output, input, weight, alpha, words)
        if for_bias:
            grad_bias = as_rows(grad_output).sum(0, dtype=ctx.bias_dtype)
        return grad_input, grad_weight, None, grad_bias, None


_apply_function = super(PowerLinear, PowerLinear).apply
