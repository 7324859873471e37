"""Triton kernels of op `power` and their launchers, for NVIDIA and AMD GPUs.

Notation: φ ``weight``, θ ``theta``, α ``alpha``; N is the number of elements; ``words`` are a
mask's, or None. A block of elements is [BLOCK]; under a mask [BLOCK/8, 8], a row for each word.

The launchers have the signatures of the op's schemas (op.py) and its contract: results are laid out
as ``torch.empty_like(weight)``, nothing waits for the device, no value of α causes a compilation.
The power itself is ops/_point.py's.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppkernels.ops._device import warp_size
from ppkernels.ops._layout import arranged_words, is_dense, same_layout
from ppkernels.ops._point import scaled_power, signed_power
from ppkernels.ops._tile import tile_bits, tile_offsets

# Bytes of ``weight`` per program, a power of two: two 128-bit accesses for each of its 128 threads.
# Chosen for bytes in flight, not tuned on hardware. Results do not depend on it; tests in Triton's
# interpreter, where a program costs about a millisecond, raise it.
BLOCK_BYTES = 4096


def launch_choices(element_size: int, is_masked: bool, warp: int) -> dict[str, int]:
    """What a launch fixes for elements of so many bytes, on a GPU with such warps.

    The compiled code depends on it. Twice the block under a mask: what a thread does once for the
    words is shared by more elements, or the power would not be bound by memory.
    """
    block = (2 if is_masked else 1) * BLOCK_BYTES // element_size
    return {"BLOCK": block, "num_warps": 128 // warp}


# ---- the derivatives of a point


@triton.jit
def power_slope(weight, alpha, PRECISE: tl.constexpr):
    """dθ/dφ = α·|φ|^(α−1): 0 at φ = 0 for α > 1, and 1 everywhere for α = 1."""
    return scaled_power(weight, alpha - 1.0, alpha, PRECISE)


@triton.jit
def power_curvature(weight, alpha, PRECISE: tl.constexpr):
    """d²θ/dφ² = α(α−1)·sign(φ)·|φ|^(α−2) for φ ≠ 0 and α > 1; NaN at NaN."""
    exponent = alpha - 2.0
    power = scaled_power(weight, exponent, alpha * (alpha - 1.0), PRECISE)
    infinite = tl.where(exponent < 0.0, 0.0, power)
    power = tl.where(tl.abs(weight) == float("inf"), infinite, power)
    return tl.where(weight != weight, weight, tl.where(weight < 0.0, -power, power))


# ---- kernels: load, point, store


@triton.jit
def exponent_of(alpha):
    """α as a float64 scalar, from a pointer, from the bits of a float64, or 1 from None."""
    if alpha is None:
        return tl.full((), 1.0, tl.float64)
    elif alpha.dtype.is_ptr():
        return tl.load(alpha)
    else:
        return alpha.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _offsets(words, BLOCK: tl.constexpr):
    """Where the elements of a block are, counted from its first."""
    if words is None:
        return tl.arange(0, BLOCK)
    else:
        return tile_offsets(BLOCK // 8)


@triton.jit
def _load(values, offsets, start, numel, BLOCK: tl.constexpr):
    """The block at ``start``, half types as float32.

    Only the last block has a mask: one of unknown length would narrow every access to one element.
    """
    if start + BLOCK <= numel:
        block = tl.load(values + start + offsets)
    else:
        block = tl.load(values + start + offsets, mask=start + offsets < numel, other=1.0)
    if block.dtype.primitive_bitwidth == 16:
        return block.to(tl.float32)
    else:
        return block


@triton.jit
def _store(out, block, words, offsets, start, numel, BLOCK: tl.constexpr):
    """Writes the block at ``start``, rounded to nearest even, and +0 where its bit is 0."""
    if words is not None:
        bits = tile_bits(words + start // 8, (numel - start + 7) // 8, 0, BLOCK // 8)
        block = tl.where(bits, block, 0.0)
    rounded = block.to(out.dtype.element_ty)
    if start + BLOCK <= numel:
        tl.store(out + start + offsets, rounded)
    else:
        tl.store(out + start + offsets, rounded, mask=start + offsets < numel)


@triton.jit(do_not_specialize=["numerator", "denominator", "numel"])
def signed_power_kernel(x, out, words, numerator, denominator, numel, BLOCK: tl.constexpr):
    """out = sign(x)·|x|^(numerator/denominator) over [N] values in memory order, masked by words.

    The exponent is α, 1/α or α/α'; each of the two is what `exponent_of` takes. ``out`` may be
    ``x``, or of another dtype.
    """
    IN: tl.constexpr = x.dtype.element_ty.primitive_bitwidth
    OUT: tl.constexpr = out.dtype.element_ty.primitive_bitwidth
    PRECISE: tl.constexpr = min(IN, OUT) > 16
    start = tl.program_id(0).to(tl.int64) * BLOCK
    exponent = exponent_of(numerator)
    if denominator is not None:
        exponent = exponent / exponent_of(denominator)
    offsets = _offsets(words, BLOCK)
    power = signed_power(_load(x, offsets, start, numel, BLOCK), exponent, PRECISE)
    _store(out, power, words, offsets, start, numel, BLOCK)


@triton.jit(do_not_specialize=["alpha", "numel"])
def power_backward_kernel(grad_theta, weight, out, words, alpha, numel, BLOCK: tl.constexpr):
    """out = grad_theta·α|weight|^(α−1) over [N] values in memory order, masked by words."""
    PRECISE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth > 16
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = _offsets(words, BLOCK)
    grad = _load(grad_theta, offsets, start, numel, BLOCK)
    phi = _load(weight, offsets, start, numel, BLOCK)
    slope = power_slope(phi, exponent_of(alpha), PRECISE)
    _store(out, grad * slope, words, offsets, start, numel, BLOCK)


@triton.jit(do_not_specialize=["alpha", "numel"])
def power_double_backward_kernel(
    grad_grad_weight, grad_theta, weight, out, words, alpha, numel, BLOCK: tl.constexpr
):
    """out = grad_grad_weight·grad_theta·(second derivative), masked by words.

    0 where the second derivative is 0 by definition.
    """
    PRECISE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth > 16
    start = tl.program_id(0).to(tl.int64) * BLOCK
    exponent = exponent_of(alpha)
    offsets = _offsets(words, BLOCK)
    phi = _load(weight, offsets, start, numel, BLOCK)
    product = _load(grad_grad_weight, offsets, start, numel, BLOCK)
    product = product * _load(grad_theta, offsets, start, numel, BLOCK)
    product = product * power_curvature(phi, exponent, PRECISE)
    product = tl.where(exponent == 1.0, 0.0, tl.where(phi == 0.0, 0.0, product))
    _store(out, product, words, offsets, start, numel, BLOCK)


# ---- launchers


def power(weight: Tensor, alpha: Tensor, words: Tensor | None = None) -> Tensor:
    """θ = φ·|φ|^(α−1)."""
    return _signed_power("power", weight, alpha, None, words)


def power_out(weight: Tensor, alpha: Tensor, out: Tensor, words: Tensor | None = None) -> None:
    """θ into ``out``, which may overlap ``weight`` in any way."""
    if is_dense(out) and not _overlap_partly(weight, out):
        _launch("power", signed_power_kernel, [weight], out, words, alpha, None)
    else:
        out.copy_(power(weight, alpha, words))


def power_backward(
    grad_theta: Tensor, weight: Tensor, alpha: Tensor, words: Tensor | None = None
) -> Tensor:
    """∂L/∂φ = ∂L/∂θ · α|φ|^(α−1)."""
    out = torch.empty_like(weight)
    _launch("power_backward", power_backward_kernel, [grad_theta, weight], out, words, alpha)
    return out


def power_backward_out(
    grad_theta: Tensor, weight: Tensor, alpha: Tensor, out: Tensor, words: Tensor | None = None
) -> None:
    """∂L/∂φ into ``out``, which may overlap the inputs in any way."""
    overlaps = _overlap_partly(grad_theta, out) or _overlap_partly(weight, out)
    if is_dense(out) and not overlaps:
        _launch("power_backward", power_backward_kernel, [grad_theta, weight], out, words, alpha)
    else:
        out.copy_(power_backward(grad_theta, weight, alpha, words))


def power_double_backward(
    grad_grad_weight: Tensor,
    grad_theta: Tensor,
    weight: Tensor,
    alpha: Tensor,
    words: Tensor | None = None,
) -> Tensor:
    """h·g·α(α−1)·sign(φ)|φ|^(α−2), and 0 where φ = 0 or α = 1."""
    out = torch.empty_like(weight)
    inputs = [grad_grad_weight, grad_theta, weight]
    _launch("power_double_backward", power_double_backward_kernel, inputs, out, words, alpha)
    return out


def inverse_power(theta: Tensor, alpha: Tensor) -> Tensor:
    """φ = sign(θ)·|θ|^(1/α)."""
    return _signed_power("inverse_power", theta, None, alpha)


def rebase(weight: Tensor, alpha_from: Tensor, alpha_to: Tensor) -> Tensor:
    """φ' = sign(φ)·|φ|^(α/α')."""
    return _signed_power("rebase", weight, alpha_from, alpha_to)


def _signed_power(
    op: str,
    x: Tensor,
    numerator: Tensor | None,
    denominator: Tensor | None,
    words: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(x)
    _launch(op, signed_power_kernel, [x], out, words, numerator, denominator)
    return out


def _launch(
    op: str,
    kernel: Any,
    inputs: list[Tensor],
    out: Tensor,
    words: Tensor | None,
    *exponents: Tensor | None,
) -> None:
    """Runs ``kernel`` over the memory of ``out`` (dense), after copying inputs of other layouts."""
    numel = out.numel()
    if words is not None:
        words = arranged_words(op, words, out)
    if numel == 0:
        return
    arranged = [
        value if same_layout(value, out) else torch.empty_like(out, dtype=value.dtype).copy_(value)
        for value in inputs
    ]
    alphas = [exponent_argument(alpha, out.device) for alpha in exponents]
    choices = launch_choices(out.element_size(), words is not None, warp_size(out.device))
    # A kernel goes to the current device, which need not be that of the tensors.
    with torch.cuda.device_of(out):
        grid = (triton.cdiv(numel, choices["BLOCK"]),)
        kernel[grid](*arranged, out, words, *alphas, numel, **choices)


def exponent_argument(alpha: Tensor | None, device: torch.device) -> Tensor | int | None:
    """α as a kernel takes it: where it lies on the device, its address; from the CPU, its bits.

    Reading a CPU tensor waits for nothing, and passing its bits along with the launch spares a copy
    to the device, which CUDA graphs could not record. A float argument would be rounded to float32.
    """
    if alpha is None or alpha.device == device:
        return alpha
    if alpha.device.type == "cpu":
        return int(alpha.view(torch.int64).item())
    return alpha.to(device, non_blocking=True)


def _overlap_partly(value: Tensor, out: Tensor) -> bool:
    """Whether two tensors may share memory without being the same elements in the same places."""
    if value.data_ptr() == out.data_ptr() and same_layout(value, out):
        return False
    return value.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
