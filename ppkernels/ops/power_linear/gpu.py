"""Triton kernels of op `power_linear` and their launchers, for NVIDIA and AMD GPUs.

Notation: φ ``weight`` [N, K], θ its power, masked where ``words`` are given; x ``input`` [M, K];
g ``grad_output`` [M, N]. The launchers have the signatures of the op's schemas (op.py) and its
contract; nothing waits for the device, no value of α causes a compilation. Each product is computed
in one of two ways, which model.py chooses between:

- fused: θ exists in registers only, tile by tile;
- by a buffer: `power` writes θ (or reads its gradient) once, and cuBLAS or hipBLAS multiplies.

# Note [The powered operand is on the left]
x·θᵀ is computed as the transpose of θ·xᵀ. NVIDIA's matrix instructions from Hopper on take their
left operand from registers, where the power leaves it, and the right one from shared memory, where
the copies put it. With θ on the right, each of its tiles would go back to shared memory, and the
matrix pipeline would wait for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppkernels.ops._layout import same_layout
from ppkernels.ops._point import signed_power
from ppkernels.ops.power import gpu as power_gpu
from ppkernels.ops.power.gpu import exponent_of, power_slope
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
GROUP = 8
# A product that is split along what is contracted has at least so many tiles in each part.
_LEAST_TILES = 4
# Elements of a program that adds up the parts.
SUM_BLOCK = 1024


def stages(is_amd: bool) -> int:
    """Depth of the pipeline of copies: AMD has 64 KiB of shared memory."""
    return 2 if is_amd else 3


def product_tiles(itemsize: int, is_even: bool, is_masked: bool) -> Tiles:
    """Tiles of a product; masks and tiles that stick out take registers from the batch."""
    tiles = PRODUCT_TILES[itemsize]
    return tiles if is_even and not is_masked else replace(tiles, batch=tiles.batch // 2)


def is_even(rows: int, across: int, tiles: Tiles) -> bool:
    """Whether no tile of a weight sticks out."""
    return rows % tiles.rows == 0 and across % tiles.across == 0


# ---- kernels


@triton.jit
def _bits(words, first, offsets, inside):
    """Whether the bits at ``first + offsets`` are set; ``first`` may be beyond 2^31."""
    offsets += (first % 8).to(tl.int32)
    word = tl.load(words + first // 8 + offsets // 8, mask=inside, other=0).to(tl.int32)
    return ((word >> (offsets % 8)) & 1) != 0


@triton.jit(do_not_specialize=["alpha", "batch"])
def product_kernel(
    input,
    weight,
    words,
    alpha,
    bias,
    out,
    batch,
    rows,
    contracted,
    input_stride_batch,
    input_stride_contracted,
    weight_stride_row,
    weight_stride_contracted,
    bit_stride_row,
    bit_stride_contracted,
    contracted_per_split,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    BATCH: tl.constexpr,
    CONTRACTED: tl.constexpr,
):
    """out[s, m, r] = Σ_c input[m, c]·θ[r, c] + bias[r] over the c of split s.

    Forward: r counts the N features of the output, c the K of the input. Gradient of the input: the
    other way round, and θ is read across. Only a product that is not split has a bias. EVEN: no
    tile of the weight sticks out.
    """
    PRECISE: tl.constexpr = COMPUTE == tl.float32
    exponent = exponent_of(alpha)
    first_row = tl.program_id(0) * ROWS
    first_batch = tl.program_id(1) * BATCH
    split = tl.program_id(2)
    begin = split * contracted_per_split
    end = tl.minimum(begin + contracted_per_split, contracted)
    r, m, c = tl.arange(0, ROWS), tl.arange(0, BATCH), tl.arange(0, CONTRACTED)
    is_row, is_batch = r < rows - first_row, m < batch - first_batch

    # The 64-bit part of an address is a scalar; within a tile 32 bits are enough.
    weights = weight + first_row.to(tl.int64) * weight_stride_row
    weights += begin.to(tl.int64) * weight_stride_contracted
    weights += r[:, None] * weight_stride_row + c[None, :] * weight_stride_contracted
    inputs = input + first_batch.to(tl.int64) * input_stride_batch
    inputs += begin.to(tl.int64) * input_stride_contracted
    inputs += c[:, None] * input_stride_contracted + m[None, :] * input_stride_batch

    first_bit = first_row.to(tl.int64) * bit_stride_row
    first_bit += begin.to(tl.int64) * bit_stride_contracted
    total = tl.zeros([ROWS, BATCH], tl.float32)
    for start in range(begin, end, CONTRACTED):
        if EVEN:
            inside = tl.full([ROWS, CONTRACTED], True, tl.int1)
            phi = tl.load(weights)
            x = tl.load(inputs, mask=is_batch[None, :], other=0.0)
        else:
            is_contracted = c < end - start
            inside = is_row[:, None] & is_contracted[None, :]
            phi = tl.load(weights, mask=inside, other=0.0)
            x = tl.load(inputs, mask=is_contracted[:, None] & is_batch[None, :], other=0.0)
        theta = signed_power(phi.to(tl.float32), exponent, PRECISE)
        if words is not None:
            bits = r[:, None] * bit_stride_row + c[None, :] * bit_stride_contracted
            theta = tl.where(_bits(words, first_bit, bits, inside), theta, 0.0)
            first_bit += CONTRACTED * bit_stride_contracted
        total = tl.dot(theta.to(COMPUTE), x.to(COMPUTE), total, input_precision=PRECISION)
        weights += CONTRACTED * weight_stride_contracted
        inputs += CONTRACTED * input_stride_contracted

    if bias is not None:
        total += tl.load(bias + first_row + r, mask=is_row, other=0.0).to(tl.float32)[:, None]
    outs = out + (split.to(tl.int64) * batch + first_batch) * rows + first_row
    outs += m[None, :] * rows + r[:, None]
    inside = is_row[:, None] & is_batch[None, :]
    tl.store(outs, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["numel", "splits"])
def add_up_kernel(partials, bias, out, numel, rows, splits, BLOCK: tl.constexpr):
    """out[m, r] = Σ_s partials[s, m, r] + bias[r] over [M, R] of ``numel`` elements."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(partials + offsets, mask=inside, other=0.0)
        partials += numel
    if bias is not None:
        total += tl.load(bias + offsets % rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store_scaled(
    total,
    weights,
    words,
    alpha,
    outs,
    first_bit,
    rows,
    columns,
    bit_stride_row,
    weight_stride_row,
    weight_stride_column,
    FIRST_COLUMN: tl.constexpr,
    PRECISE: tl.constexpr,
    EVEN: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Writes a tile of the gradient of θ as one of φ, in pieces that fit into registers."""
    ROWS: tl.constexpr = total.shape[0]
    COLUMNS: tl.constexpr = total.shape[1] // PIECES
    if PIECES > 1:
        left, right = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, COLUMNS]), (0, 2, 1)))
        for i in tl.static_range(2):
            _store_scaled(
                left if i == 0 else right,
                weights,
                words,
                alpha,
                outs,
                first_bit,
                rows,
                columns,
                bit_stride_row,
                weight_stride_row,
                weight_stride_column,
                i * COLUMNS,
                PRECISE,
                EVEN,
                1,
            )
    else:
        n, k = tl.arange(0, ROWS), FIRST_COLUMN + tl.arange(0, COLUMNS)
        inside = (n < rows)[:, None] & (k < columns)[None, :]
        places = n[:, None] * weight_stride_row + k[None, :] * weight_stride_column
        if EVEN:
            phi = tl.load(weights + places)
        else:
            phi = tl.load(weights + places, mask=inside, other=1.0)
        grad_weight = total * power_slope(phi.to(tl.float32), exponent_of(alpha), PRECISE)
        if words is not None:
            bits = n[:, None] * bit_stride_row + k[None, :]
            grad_weight = tl.where(_bits(words, first_bit, bits, inside), grad_weight, 0.0)
        rounded = grad_weight.to(outs.dtype.element_ty)
        if EVEN:
            tl.store(outs + places, rounded)
        else:
            tl.store(outs + places, rounded, mask=inside)


@triton.jit(do_not_specialize=["alpha", "batch"])
def grad_weight_kernel(
    grad_output,
    input,
    weight,
    words,
    alpha,
    out,
    batch,
    rows,
    columns,
    grad_stride_batch,
    grad_stride_row,
    input_stride_batch,
    input_stride_column,
    weight_stride_row,
    weight_stride_column,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BATCH: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[n, k] = mask[n, k]·α|φ[n, k]|^(α−1) · Σ_m g[m, n]·x[m, k], laid out as ``weight``.

    The gradient of θ is summed up in float32 registers, scaled there and written once. EVEN: no
    tile of the weight sticks out.
    """
    PRECISE: tl.constexpr = COMPUTE == tl.float32
    # Programs that run at the same time share rows of g and columns of x in the cache.
    program, tiles_across = tl.program_id(0), tl.cdiv(columns, COLUMNS)
    group = program // (GROUP * tiles_across)
    group_rows = tl.minimum(tl.cdiv(rows, ROWS) - group * GROUP, GROUP)
    within = program % (GROUP * tiles_across)
    first_row = (group * GROUP + within % group_rows) * ROWS
    first_column = (within // group_rows) * COLUMNS
    n, k, m = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, BATCH)
    is_row, is_column = n < rows - first_row, k < columns - first_column

    grads = grad_output + first_row.to(tl.int64) * grad_stride_row
    grads += n[:, None] * grad_stride_row + m[None, :] * grad_stride_batch
    inputs = input + first_column.to(tl.int64) * input_stride_column
    inputs += m[:, None] * input_stride_batch + k[None, :] * input_stride_column
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, batch, BATCH):
        is_batch = m < batch - start
        if EVEN:
            g = tl.load(grads, mask=is_batch[None, :], other=0.0)
            x = tl.load(inputs, mask=is_batch[:, None], other=0.0)
        else:
            g = tl.load(grads, mask=is_row[:, None] & is_batch[None, :], other=0.0)
            x = tl.load(inputs, mask=is_batch[:, None] & is_column[None, :], other=0.0)
        total = tl.dot(g.to(COMPUTE), x.to(COMPUTE), total, input_precision=PRECISION)
        grads += BATCH * grad_stride_batch
        inputs += BATCH * input_stride_batch

    first = first_row.to(tl.int64) * weight_stride_row
    first += first_column.to(tl.int64) * weight_stride_column
    _store_scaled(
        total,
        weight + first,
        words,
        alpha,
        out + first,
        first_row.to(tl.int64) * columns + first_column,
        rows - first_row,
        columns - first_column,
        columns,
        weight_stride_row,
        weight_stride_column,
        0,
        PRECISE,
        EVEN,
        PIECES,
    )


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
            grad_theta = torch.mm(g.t(), x, out=x.new_empty(weight.shape))
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


# ---- which way


def _product(x: Tensor, weight: Tensor, rows: int, contracted: int) -> Product:
    sizes = (weight.element_size(), x.element_size())
    return Product(x.shape[0], rows, contracted, *sizes, input_precision(x) == "tf32")


def _is_product_fused(
    x: Tensor, weight: Tensor, rows: int, contracted: int, is_masked: bool
) -> bool:
    if x.numel() == 0 or not _can_be_fused(weight, x.dtype):
        return False
    tiles = PRODUCT_TILES[x.element_size()]
    tiles = product_tiles(x.element_size(), is_even(rows, contracted, tiles), is_masked)
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


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type that matrix instructions take. Triton's interpreter has no bfloat16: tests."""
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return types[dtype]


def input_precision(operand: Tensor) -> str:
    """How float32 products are computed: as PyTorch is told for its own, else in full.

    On NVIDIA that is three products of TF32 parts, on AMD the float32 matrix instructions.
    """
    if operand.dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


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
    even = is_even(rows, contracted, PRODUCT_TILES[x.element_size()])
    tiles = product_tiles(x.element_size(), even, words is not None)
    tile = min(tiles.batch, max(16, triton.next_power_of_2(batch)))
    grid = (triton.cdiv(rows, tiles.rows), triton.cdiv(batch, tile))
    processors = machine_of(weight.device).processors
    splits, length = splits_of(grid[0] * grid[1], contracted, tiles.across, processors)
    is_split = splits > 1
    parts = out.new_empty(splits, batch, rows, dtype=torch.float32) if is_split else out
    # Row and column of the weight, in the order of the product's.
    order = slice(None, None, -1 if is_across else 1)
    product_kernel[(*grid, splits)](
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
        *weight.stride()[order],
        *(weight.shape[1], 1)[order],
        length,
        COMPUTE=dot_type(x.dtype),
        PRECISION=input_precision(x),
        EVEN=even,
        ROWS=tiles.rows,
        BATCH=tile,
        CONTRACTED=tiles.across,
        num_warps=tiles.warps,
        num_stages=stages(torch.version.hip is not None),
    )
    if is_split:
        grid = (triton.cdiv(out.numel(), SUM_BLOCK),)
        add_up_kernel[grid](parts, bias, out, out.numel(), rows, splits, BLOCK=SUM_BLOCK)


def _launch_gradient(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    words: Tensor | None,
    out: Tensor,
    machine: Machine,
) -> None:
    rows, columns = weight.shape

    def programs(tiles: Tiles) -> int:
        return triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.across)

    tiles = GRADIENT_TILES[x.element_size()]
    if programs(tiles) < machine.processors:
        tiles = SMALL_GRADIENT_TILES[x.element_size()]
    grad_weight_kernel[(programs(tiles),)](
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
        COMPUTE=dot_type(x.dtype),
        PRECISION=input_precision(x),
        EVEN=is_even(rows, columns, tiles),
        ROWS=tiles.rows,
        COLUMNS=tiles.across,
        BATCH=min(tiles.batch, max(16, triton.next_power_of_2(x.shape[0]))),
        PIECES=tiles.pieces,
        GROUP=GROUP,
        num_warps=tiles.warps,
        num_stages=stages(torch.version.hip is not None),
    )
