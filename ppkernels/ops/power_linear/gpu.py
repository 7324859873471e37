"""Launchers of op `power_linear`, for NVIDIA and AMD GPUs.

Notation: φ ``weight`` [N, K], θ its power, masked where ``words`` are given; x ``input`` [M, K];
g ``grad_output`` [M, N]. The launchers have the signatures of the op's schemas (op.py) and its
contract; nothing waits for the device, no value of α causes a compilation. Each product is computed
in one of two ways, which model.py chooses between:

- fused (kernels.py): θ exists in registers only, tile by tile;
- by a buffer: `power` writes θ (or reads its gradient) once, and cuBLAS or hipBLAS multiplies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppkernels.ops._device import is_amd
from ppkernels.ops._layout import same_layout
from ppkernels.ops.power import gpu as power_gpu
from ppkernels.ops.power_linear.kernels import (
    add_up_kernel,
    grad_weight_kernel,
    product_kernel,
)
from ppkernels.ops.power_linear.model import Machine, Product, machine_of

# ---- the tiles. With them no kernel spills, and none takes more than the 99 KiB of shared memory
# that every supported NVIDIA GPU has (`python -m bench.gpu_static`); not tuned on hardware.


@dataclass(frozen=True)
class Tiles:
    """Elements of a program's tile.

    Attributes:
        rows: along the rows of the product or of the weight.
        across: along what is contracted or, for the gradient of the weight, along its columns.
        batch: along the batch, at most.
        warps: of 32 threads, on AMD of 64.
        pieces: in which a tile of the gradient is scaled and written.
    """

    rows: int
    across: int
    batch: int
    warps: int
    pieces: int = 1


# By the bytes of an element of the operands.
PRODUCT_TILES = {2: Tiles(64, 64, 128, 4), 4: Tiles(64, 32, 64, 4)}
GRADIENT_TILES = {2: Tiles(128, 128, 64, 8, pieces=2), 4: Tiles(128, 64, 32, 8)}
# For weights that have few of the above.
SMALL_GRADIENT_TILES = {2: Tiles(64, 64, 64, 4), 4: Tiles(64, 64, 32, 4)}
# Rows of tiles of the gradient that are worked on at the same time.
_GROUP = 8
# A product that is split along what is contracted has at least so many tiles in each part.
_LEAST_TILES = 4


def is_even(rows: int, across: int, tiles: Tiles) -> bool:
    """Whether no tile of a weight sticks out."""
    return rows % tiles.rows == 0 and across % tiles.across == 0


def product_tiles(itemsize: int, rows: int, contracted: int, is_masked: bool) -> Tiles:
    """Tiles of a product; masks and tiles that stick out take registers from the batch."""
    tiles = PRODUCT_TILES[itemsize]
    has_room = is_even(rows, contracted, tiles) and not is_masked
    return tiles if has_room else replace(tiles, batch=tiles.batch // 2)


def product_choices(
    dtype: torch.dtype, batch: int, rows: int, contracted: int, is_masked: bool, for_amd: bool
) -> dict[str, Any]:
    """What a launch of `product_kernel` fixes; the compiled code depends on it."""
    tiles = product_tiles(dtype.itemsize, rows, contracted, is_masked)
    return {
        "EVEN": is_even(rows, contracted, tiles),
        "ROWS": tiles.rows,
        "BATCH": _tile(batch, tiles),
        "CONTRACTED": tiles.across,
        **_choices(dtype, tiles, for_amd),
    }


def gradient_choices(
    dtype: torch.dtype, batch: int, rows: int, columns: int, processors: int, for_amd: bool
) -> dict[str, Any]:
    """What a launch of `grad_weight_kernel` fixes; the compiled code depends on it."""
    tiles = GRADIENT_TILES[dtype.itemsize]
    if programs_of_gradient(rows, columns, tiles.rows, tiles.across) < processors:
        tiles = SMALL_GRADIENT_TILES[dtype.itemsize]
    return {
        "EVEN": is_even(rows, columns, tiles),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.across,
        "BATCH": _tile(batch, tiles),
        "PIECES": tiles.pieces,
        "GROUP": _GROUP,
        **_choices(dtype, tiles, for_amd),
    }


def programs_of_gradient(rows: int, columns: int, tile_rows: int, tile_columns: int) -> int:
    """Tiles of a weight."""
    return -(-rows // tile_rows) * -(-columns // tile_columns)


def sum_choices(for_amd: bool) -> dict[str, Any]:
    """What a launch of `add_up_kernel` fixes: 128 threads, each a 128-bit access of half types."""
    return {"BLOCK": 1024, "num_warps": 2 if for_amd else 4}


def _tile(batch: int, tiles: Tiles) -> int:
    return min(tiles.batch, max(16, 1 << (batch - 1).bit_length()))


def _choices(dtype: torch.dtype, tiles: Tiles, for_amd: bool) -> dict[str, Any]:
    return {
        "COMPUTE": dot_type(dtype),
        "PRECISION": input_precision(dtype, for_amd),
        "num_warps": tiles.warps,
        # Depth of the pipeline of copies: AMD has 64 KiB of shared memory.
        "num_stages": 2 if for_amd else 3,
    }


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type that matrix instructions take. Triton's interpreter has no bfloat16: tests."""
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return types[dtype]


def input_precision(dtype: torch.dtype, for_amd: bool) -> str:
    """How float32 products are computed: as PyTorch is told for its own, else in full.

    On NVIDIA that is three products of TF32 parts, on AMD the float32 matrix instructions.
    """
    if dtype != torch.float32 or for_amd:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


# ---- launchers


def power_linear(
    input: Tensor, weight: Tensor, alpha: Tensor, bias: Tensor | None, words: Tensor | None
) -> Tensor:
    """y = x·θᵀ + b."""
    return _multiply(input, weight, alpha, bias, words, is_across=False)


def power_linear_grad_input(
    grad_output: Tensor, weight: Tensor, alpha: Tensor, words: Tensor | None
) -> Tensor:
    """∂L/∂x = g·θ."""
    return _multiply(grad_output, weight, alpha, None, words, is_across=True)


def power_linear_grad_weight(
    grad_output: Tensor, input: Tensor, weight: Tensor, alpha: Tensor, words: Tensor | None
) -> Tensor:
    """∂L/∂φ = mask·gᵀx·α|φ|^(α−1)."""
    g, x, out = _as_rows(grad_output), _as_rows(input), torch.empty_like(weight)
    product = _product(x, weight, *weight.shape)
    machine = machine_of(weight.device)
    is_faster = product.fused_gradient_seconds(machine) < product.buffered_gradient_seconds(machine)
    with torch.cuda.device_of(weight):
        is_possible = x.numel() > 0 and _can_be_fused(weight, x.dtype) and same_layout(weight, out)
        if is_faster and is_possible:
            _launch_gradient(_aligned(g), _aligned(x), weight, alpha, words, out, machine)
        else:
            grad_theta = _gradient_of_theta(g, x, weight.dtype)
            power_gpu.power_backward_out(grad_theta, weight, alpha, out, words)
    return out


def _multiply(
    input: Tensor,
    weight: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    words: Tensor | None,
    is_across: bool,
) -> Tensor:
    """input·θᵀ + bias, or input·θ for a product ``is_across``."""
    rows, contracted = weight.shape[::-1] if is_across else weight.shape
    x = _as_rows(input)
    out = x.new_empty(x.shape[0], rows)
    with torch.cuda.device_of(weight):
        if _is_product_fused(x, weight, rows, contracted, words is not None):
            _launch_product(_aligned(x), weight, alpha, bias, words, out, is_across)
        else:
            theta = torch.empty_like(weight, dtype=x.dtype)
            power_gpu.power_out(weight, alpha, theta, words)
            _multiply_by(theta if is_across else theta.t(), x, bias, out)
    return out.view(*input.shape[:-1], rows)


def _as_rows(operand: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return operand.reshape(math.prod(operand.shape[:-1]), operand.shape[-1])


def _multiply_by(theta: Tensor, x: Tensor, bias: Tensor | None, out: Tensor) -> None:
    # With out=, autocast leaves the dtypes alone.
    if bias is None:
        torch.mm(x, theta, out=out)
    else:
        torch.addmm(bias.to(x.dtype), x, theta, out=out)


def _gradient_of_theta(g: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """gᵀx; where φ is wider than x and the library can, in the dtype of φ: not rounded between."""
    if wide != x.dtype and x.is_cuda and not is_amd():
        return torch.mm(g.t(), x, out_dtype=wide)
    return torch.mm(g.t(), x, out=x.new_empty(g.shape[1], x.shape[1]))


# ---- which way


def _product(x: Tensor, weight: Tensor, rows: int, contracted: int) -> Product:
    sizes = (weight.element_size(), x.element_size())
    allows_tf32 = input_precision(x.dtype, is_amd()) == "tf32"
    return Product(x.shape[0], rows, contracted, *sizes, allows_tf32)


def _is_product_fused(
    x: Tensor, weight: Tensor, rows: int, contracted: int, is_masked: bool
) -> bool:
    if x.numel() == 0 or not _can_be_fused(weight, x.dtype):
        return False
    tiles = product_tiles(x.element_size(), rows, contracted, is_masked)
    product, machine = _product(x, weight, rows, contracted), machine_of(weight.device)
    return product.fused_seconds(tiles.batch, machine) < product.buffered_seconds(machine)


def _can_be_fused(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take a product of ``dtype`` with the weight without narrow accesses.

    Sizes are multiples of 16, which Triton knows of its arguments, and so are strides but for one
    of 1. Within a tile the kernels count elements in 32 bits.
    """
    is_aligned = weight.data_ptr() % 16 == 0 and sorted(weight.stride())[0] == 1
    multiples = (*weight.shape, sorted(weight.stride())[1])
    return (
        dtype != torch.float64
        and weight.numel() > 0
        and is_aligned
        and all(size % 16 == 0 for size in multiples)
        and max(multiples) * (GRADIENT_TILES[2].rows + 1) < 2**31
    )


def _aligned(operand: Tensor) -> Tensor:
    """x or g in memory as the kernels read it without narrow accesses."""
    is_aligned = operand.stride(1) == 1 and operand.stride(0) % 16 == 0
    if is_aligned and operand.data_ptr() % 16 == 0:
        return operand
    return operand.clone(memory_format=torch.contiguous_format)


def splits_of(tiles: int, contracted: int, step: int, processors: int) -> tuple[int, int]:
    """Parts that a product of few tiles is cut into along what is contracted, and their length.

    Two programs for each processor hide each other's waits; a part has some tiles to pipeline.
    """
    steps = triton.cdiv(contracted, step)
    wanted = min(triton.cdiv(2 * processors, tiles), steps // _LEAST_TILES)
    length = triton.cdiv(steps, max(1, wanted)) * step
    return triton.cdiv(contracted, length), length


# ---- launches of the fused kernels


def _launch_product(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    words: Tensor | None,
    out: Tensor,
    is_across: bool,
) -> None:
    (batch, rows), contracted = out.shape, x.shape[1]
    choices = product_choices(x.dtype, batch, rows, contracted, words is not None, is_amd())
    tiles = (triton.cdiv(rows, choices["ROWS"]), triton.cdiv(batch, choices["BATCH"]))
    processors = machine_of(weight.device).processors
    splits, length = splits_of(math.prod(tiles), contracted, choices["CONTRACTED"], processors)
    is_split = splits > 1
    parts = out.new_empty(splits, batch, rows, dtype=torch.float32) if is_split else out
    # Strides of the weight and of its bits along the product's rows and what is contracted.
    strides: list[tuple[int, ...]] = [weight.stride(), (weight.shape[1], 1)]
    weight_strides, bit_strides = (pair[::-1] if is_across else pair for pair in strides)
    product_kernel[tiles[0], tiles[1], splits](
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
        length,
        **choices,
    )
    if is_split:
        fixed = sum_choices(is_amd())
        programs = triton.cdiv(out.numel(), fixed["BLOCK"])
        add_up_kernel[(programs,)](parts, bias, out, out.numel(), rows, splits, **fixed)


def _launch_gradient(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    words: Tensor | None,
    out: Tensor,
    machine: Machine,
) -> None:
    (rows, columns), batch = weight.shape, x.shape[0]
    choices = gradient_choices(x.dtype, batch, rows, columns, machine.processors, is_amd())
    programs = programs_of_gradient(rows, columns, choices["ROWS"], choices["COLUMNS"])
    grad_weight_kernel[(programs,)](
        g,
        x,
        weight,
        words,
        power_gpu.exponent_argument(alpha, x.device),
        out,
        batch,
        rows,
        columns,
        *g.stride(),
        *x.stride(),
        *weight.stride(),
        **choices,
    )
