"""Launchers of op `power_linear`, for NVIDIA and AMD GPUs.

Notation: φ ``weight`` [N, K], θ its power, masked where ``words`` are given; x ``input`` [M, K];
g ``grad_output`` [M, N]. The launchers have the signatures of the op's schemas (op.py) and its
contract; nothing waits for the device, no value of α causes a compilation. Each product is computed
in one of two ways, which model.py chooses between:

- fused (kernels.py): θ exists in registers only, tile by tile;
- by a buffer: `power` writes θ (or reads its gradient) once, and cuBLAS or hipBLAS multiplies.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
from torch import Tensor

from ppkernels.ops._device import is_amd
from ppkernels.ops._layout import as_rows, same_layout
from ppkernels.ops.power import gpu as power_gpu
from ppkernels.ops.power_linear.kernels import (
    add_up_kernel,
    grad_weight_kernel,
    product_kernel,
)
from ppkernels.ops.power_linear.model import Product, machine_of
from ppkernels.ops.power_linear.tiles import (
    LARGEST_TILE,
    Plan,
    input_precision,
    plan_gradient,
    plan_product,
    sum_choices,
)

# ---- launchers


Way = Literal["fused", "buffer"]


def power_linear(
    input: Tensor,
    weight: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    words: Tensor | None,
    way: Way | None = None,
) -> Tensor:
    """y = x·θᵀ + b, in the ``way`` that is named, else in the one that the model finds faster."""
    return _multiply(input, weight, alpha, bias, words, False, way)


def power_linear_grad_input(
    grad_output: Tensor,
    weight: Tensor,
    alpha: Tensor,
    words: Tensor | None,
    way: Way | None = None,
) -> Tensor:
    """∂L/∂x = g·θ."""
    return _multiply(grad_output, weight, alpha, None, words, True, way)


def power_linear_grad_weight(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    alpha: Tensor,
    words: Tensor | None,
    way: Way | None = None,
) -> Tensor:
    """∂L/∂φ = mask·gᵀx·α|φ|^(α−1)."""
    g, x, out = as_rows(grad_output), as_rows(input), torch.empty_like(weight)
    with torch.cuda.device_of(weight):
        plan = _fused_gradient(x, weight, way) if same_layout(weight, out) else None
        if plan is not None:
            _launch_gradient(plan, _aligned(g), _aligned(x), weight, alpha, words, out)
        else:
            power_gpu.power_backward_out(_gradient_of_theta(g, x), weight, alpha, out, words)
    return out


def _multiply(
    input: Tensor,
    weight: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    words: Tensor | None,
    is_across: bool,
    way: Way | None,
) -> Tensor:
    """input·θᵀ + bias, or input·θ for a product ``is_across``."""
    rows, contracted = weight.shape[::-1] if is_across else weight.shape
    x = as_rows(input)
    out = x.new_empty(x.shape[0], rows)
    with torch.cuda.device_of(weight):
        plan = _fused_product(x, weight, rows, contracted, words is not None, way)
        if plan is not None:
            _launch_product(plan, _aligned(x), weight, alpha, bias, words, out, is_across)
        else:
            theta = torch.empty_like(weight, dtype=x.dtype)
            power_gpu.power_out(weight, alpha, theta, words)
            _multiply_by(theta if is_across else theta.t(), x, bias, out)
    return out.view(*input.shape[:-1], rows)


def _multiply_by(theta: Tensor, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    # With out=, autocast leaves the dtypes alone.
    if bias is None:
        torch.mm(x, theta, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, theta, out=out)


def _gradient_of_theta(g: Tensor, x: Tensor) -> Tensor:
    """gᵀx; of half types in float32 where the library can, not rounded before it is scaled."""
    if x.element_size() == 2 and x.is_cuda and not is_amd():
        return torch.mm(g.t(), x, out_dtype=torch.float32)
    return torch.mm(g.t(), x, out=x.new_empty(g.shape[1], x.shape[1]))


# ---- which way


def _product(x: Tensor, weight: Tensor, rows: int, contracted: int) -> Product:
    sizes = (weight.element_size(), x.element_size())
    allows_tf32 = input_precision(x.dtype, is_amd()) == "tf32"
    return Product(x.shape[0], rows, contracted, *sizes, allows_tf32)


def _fused_product(
    x: Tensor, weight: Tensor, rows: int, contracted: int, is_masked: bool, way: Way | None
) -> Plan | None:
    """How to launch the fused kernel; None where a buffer is the way."""
    if not _may_be_fused(weight, x, way):
        return None
    machine = machine_of(weight.device)
    plan = plan_product(x.dtype, x.shape[0], rows, contracted, is_masked, machine)
    product = _product(x, weight, rows, contracted)
    fused = product.fused_seconds(plan.choices["BATCH"], plan.programs, plan.splits, machine)
    return plan if way == "fused" or fused < product.buffered_seconds(machine) else None


def _fused_gradient(x: Tensor, weight: Tensor, way: Way | None) -> Plan | None:
    """As `_fused_product`, for the gradient of the weight."""
    if not _may_be_fused(weight, x, way):
        return None
    machine, product = machine_of(weight.device), _product(x, weight, *weight.shape)
    plan = plan_gradient(x.dtype, x.shape[0], weight.shape[0], weight.shape[1], machine)
    fused = product.fused_gradient_seconds(plan.programs, machine)
    return plan if way == "fused" or fused < product.buffered_gradient_seconds(machine) else None


def _may_be_fused(weight: Tensor, x: Tensor, way: Way | None) -> bool:
    """Whether the choice is open, or the ``way`` that is named is "fused"."""
    if way is None:
        return _can_be_fused(weight, x)
    return way == "fused" and x.numel() > 0 and weight.numel() > 0


def _can_be_fused(weight: Tensor, x: Tensor) -> bool:
    """Whether the kernels take the product without narrow accesses to the weight.

    Sizes are multiples of 16, which Triton knows of its arguments, and so are strides but for one
    of 1. Within a tile the kernels count elements in 32 bits.
    """
    is_aligned = weight.data_ptr() % 16 == 0 and sorted(weight.stride())[0] == 1
    multiples = (*weight.shape, sorted(weight.stride())[1])
    return (
        x.dtype != torch.float64
        and x.numel() > 0
        and weight.numel() > 0
        and is_aligned
        and all(size % 16 == 0 for size in multiples)
        and max(multiples) * LARGEST_TILE < 2**31
    )


def _aligned(operand: Tensor) -> Tensor:
    """x or g in memory as the kernels read it without narrow accesses."""
    far = operand.stride(0)
    is_aligned = operand.stride(1) == 1 and far % 16 == 0 and operand.data_ptr() % 16 == 0
    if is_aligned and far * LARGEST_TILE < 2**31:
        return operand
    return operand.clone(memory_format=torch.contiguous_format)


# ---- launches of the fused kernels


def _launch_product(
    plan: Plan,
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    words: Tensor | None,
    out: Tensor,
    is_across: bool,
) -> None:
    (batch, rows), contracted = out.shape, x.shape[1]
    is_split = plan.splits > 1
    bias = None if bias is None else bias.contiguous()
    parts = out.new_empty(plan.splits, batch, rows, dtype=torch.float32) if is_split else out
    # Strides of the weight and of its bits along the product's rows and what is contracted.
    strides: list[tuple[int, ...]] = [weight.stride(), (weight.shape[1], 1)]
    weight_strides, bit_strides = (pair[::-1] if is_across else pair for pair in strides)
    product_kernel[plan.tiles[0], plan.tiles[1], plan.splits](
        x,
        weight,
        words,
        power_gpu.exponent_argument(alpha, x.device),
        None if is_split else bias,
        parts,
        batch,
        rows,
        contracted,
        *x.stride(),
        *weight_strides,
        *bit_strides,
        plan.length,
        **plan.choices,
    )
    if is_split:
        fixed = sum_choices(is_amd())
        programs = triton.cdiv(out.numel(), fixed["BLOCK"])
        add_up_kernel[(programs,)](parts, bias, out, out.numel(), rows, plan.splits, **fixed)


def _launch_gradient(
    plan: Plan,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    words: Tensor | None,
    out: Tensor,
) -> None:
    rows, columns = weight.shape
    grad_weight_kernel[(plan.programs,)](
        g,
        x,
        weight,
        words,
        power_gpu.exponent_argument(alpha, x.device),
        out,
        x.shape[0],
        rows,
        columns,
        *g.stride(),
        *x.stride(),
        *weight.stride(),
        **plan.choices,
    )
