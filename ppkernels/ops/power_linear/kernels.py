"""Triton kernels of op `power_linear`, for NVIDIA and AMD GPUs; gpu.py launches them.

# Note [The powered operand is on the left]
x·θᵀ is computed as the transpose of θ·xᵀ. NVIDIA's matrix instructions from Hopper on take their
left operand from registers, where the power leaves it, and the right one from shared memory, where
the copies put it. With θ on the right, each of its tiles would go back to shared memory, and the
matrix pipeline would wait for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ppkernels.ops._point import signed_power
from ppkernels.ops.power.gpu import exponent_of, power_slope


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
    # As a block of one element: for a scalar the power would branch, with a tile in registers.
    exponent = tl.full([1, 1], 0.0, tl.float64) + exponent_of(alpha)
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


@triton.jit
def _add_up(
    partials, bias, out, offsets, numel, rows, splits, BLOCK: tl.constexpr, IS_FULL: tl.constexpr
):
    """`add_up_kernel` for one block, with a mask if it is not full."""
    inside = offsets < numel
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        if IS_FULL:
            total += tl.load(partials + offsets)
        else:
            total += tl.load(partials + offsets, mask=inside, other=0.0)
        partials += numel
    if bias is not None:
        total += tl.load(bias + offsets % rows, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(out.dtype.element_ty)
    if IS_FULL:
        tl.store(out + offsets, rounded)
    else:
        tl.store(out + offsets, rounded, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def add_up_kernel(partials, bias, out, numel, rows, splits, BLOCK: tl.constexpr):
    """out[m, r] = Σ_s partials[s, m, r] + bias[r] over [M, R] of ``numel`` elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        _add_up(partials, bias, out, offsets, numel, rows, splits, BLOCK, True)
    else:
        _add_up(partials, bias, out, offsets, numel, rows, splits, BLOCK, False)


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
        n, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS) + FIRST_COLUMN
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
