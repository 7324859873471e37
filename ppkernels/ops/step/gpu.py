"""Triton kernels of op `step` and their launchers, for NVIDIA and AMD GPUs.
Longer than 350 lines: forms, optimizers and the pass are one kernel, read together.

A call is a table on the device (table.py), `prepare_kernel`, which makes constants for each weight
out of it (constants.py), and `step_kernel` once for all weights of the same dtypes. The launchers
have the signatures of the op's schemas (op.py) and its contract; nothing waits for the device. No
value of α or of an option causes a compilation: a compiled kernel is chosen by the words of a call
(rule, decay of what), optimizer and states, dtypes, alignment, and whether there are masks and
masters.

# Note [A step on θ alone, on a GPU]
The formulas are those of csrc/kernels/step.cpp, Note [A step on θ alone]: with φ' = c·φ + δ,

    θ' = c^α·θ·Ψ(1 + r),    r = δ/(cφ)
    virtual: r = rate·u·sign(θ)·|θ|^e,  e = (α−2)/α,  rate = −lr·α/c
    chain:   r = rate·u·sign(θ)·|θ|^e,  e = −1/α,     rate = −lr/c

While |r| ≤ near, Ψ(1 + r) = 1 + x by six terms of the binomial series. A block in which some |r| is
larger, or no number, also takes the full way for those (`_far`): φ, then 1 + δ/(cφ) or cφ + δ,
then its power, corrected for what 1 + δ/(cφ) lost by being rounded. float64 takes the full way for
all. What depends on α alone (exponents, factors, terms, near) is computed once a weight in float64,
by `prepare_kernel`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppkernels.ops._device import warp_size
from ppkernels.ops._point import scaled_power, signed_power, times_sign, with_sign
from ppkernels.ops._table import SEARCHED, memory_in, row_of, word_in
from ppkernels.ops._tile import tile_bits, tile_offsets
from ppkernels.ops.step.constants import (
    COLUMN_FIRST_BLOCK,
    COLUMN_GRAD,
    COLUMN_MASK,
    COLUMN_MASTER,
    COLUMN_NUMEL,
    COLUMN_STATE,
    COLUMN_WEIGHT,
    CONSTANTS,
    CONSTANTS_SIZE,
    FACTOR_SCALE,
    HEAD_SIZE,
    IN_HEAD_BETA2,
    IN_HEAD_EPS,
    IN_HEAD_MOMENTUM,
    IN_HEAD_REST1,
    IN_HEAD_REST2,
    IN_HEAD_UNDAMPED,
    OF_ALPHA,
    OF_DECAY_EXPONENT,
    OF_DECAY_RATE,
    OF_EXPONENT,
    OF_GOES,
    OF_GRAD_FACTOR,
    OF_KEEP,
    OF_KEEP_PHI,
    OF_LR,
    OF_NEAR,
    OF_PLAIN,
    OF_RATE,
    OF_ROOT2,
    OF_TERMS,
    PREPARED,
    TERM_COUNT,
    constant,
    number_in,
    prepare_kernel,
)
from ppkernels.ops.step.kept import table_for
from ppkernels.ops.step.table import (
    Lists,
    Table,
    bits,
    block_of,
    check_followed,
    check_number,
    count_steps,
    lies_on,
)

# Threads of a program: with the blocks of table.py, a 128-bit access of half types each.
_THREADS = 128

# ---- the maths of a point; ``own`` points at the weight's constants


@triton.jit
def _decayed(grad, weight, own, PRECISE: tl.constexpr):
    """The gradient with coupled decay: plus λ times the weight or a power of it."""
    rate = constant(own, OF_DECAY_RATE, weight.dtype)
    if rate != 0.0:
        exponent = constant(own, OF_DECAY_EXPONENT, tl.float64)
        penalty = weight
        if exponent != 1.0:
            penalty = signed_power(weight, exponent, PRECISE)
        grad = grad + rate * penalty
    return grad


@triton.jit
def _factor(weight, own, CHAIN: tl.constexpr, PRECISE: tl.constexpr):
    """|θ|^e of the Note, and 0 at θ = 0; under the chain rule FACTOR_SCALE times that."""
    factor = tl.zeros_like(weight) + 1.0
    exponent = constant(own, OF_EXPONENT, tl.float64)
    # e = 0 is a plain step, or the virtual rule at α = 2.
    if exponent != 0.0:
        scale = tl.full((), FACTOR_SCALE, tl.float64) if CHAIN else None
        factor = scaled_power(weight, exponent, scale, PRECISE)
    return factor


@triton.jit
def _kept(weight, own):
    """What decoupled decay leaves of the weight.

    A factor close to 1, rounded to float32, would be off by the same in every step; as the little
    that it takes away it is exact enough.
    """
    DTYPE: tl.constexpr = weight.dtype
    factor = constant(own, OF_KEEP, tl.float64)
    kept = weight
    if DTYPE == tl.float64 or factor <= 0.5:
        kept = weight * factor.to(DTYPE)
    elif factor != 1.0:
        kept = weight + weight * (factor - 1.0).to(DTYPE)
    return kept


@triton.jit
def _far(weight, u, own, CHAIN: tl.constexpr, PRECISE: tl.constexpr):
    """θ' by way of φ, whatever r is."""
    DTYPE: tl.constexpr = weight.dtype
    alpha = constant(own, OF_ALPHA, tl.float64)
    size = tl.abs(weight)
    phi = scaled_power(weight, 1.0 / alpha, None, PRECISE)
    delta = -constant(own, OF_LR, DTYPE) * u
    if not CHAIN:
        delta = delta * (alpha.to(DTYPE) * (size / phi))
    # At φ = 0 momentum would move a weight that has no gradient: the slope there, 0, stops it.
    delta = tl.where(size == 0.0, 0.0 * u, delta)
    phi = with_sign(constant(own, OF_KEEP_PHI, DTYPE) * phi, weight)
    kept = _kept(weight, own)
    # Where δ is the larger, δ/φ could overflow, and φ + δ is as exact.
    is_near = tl.abs(delta) < tl.abs(phi)
    r = tl.where(is_near, delta / phi, 0.0)
    near = 1.0 + r
    # What 1 + r loses by being rounded, its power would lose α times; nothing below 1/2.
    lost = r - (near - 1.0)
    kept_more = kept + kept * tl.where(lost == 0.0, 0.0, alpha.to(DTYPE) * (lost / near))
    base = tl.where(is_near, near, phi + delta)
    # The power of up to 2 may overflow, which a small θ would bring back: in two parts.
    has_parts = alpha > 126.0
    part = scaled_power(base, tl.where(has_parts, 0.5 * alpha, alpha), None, PRECISE)
    theta = with_sign(part, base) * tl.where(is_near, kept_more, 1.0)
    theta = theta * tl.where(has_parts, part, 1.0)
    return tl.where(delta == 0.0, kept, theta)


@triton.jit
def _multiplied(weight, u, factor, own, CHAIN: tl.constexpr, PRECISE: tl.constexpr):
    """θ' = keep·θ·Ψ(1 + r); see Note [A step on θ alone, on a GPU]."""
    DTYPE: tl.constexpr = weight.dtype
    scaled = u * constant(own, OF_RATE, DTYPE)
    # θ = 0 is multiplied by anything finite; what is not finite must show.
    r = times_sign(scaled * factor, weight)
    kept = _kept(weight, own)
    x = constant(own, OF_TERMS + TERM_COUNT - 1, DTYPE) * r
    for i in tl.static_range(2, TERM_COUNT + 1):
        x = (x + constant(own, OF_TERMS + TERM_COUNT - i, DTYPE)) * r
    # Near, the sign of θ stays; written back, for the sum makes +0 of −0.
    moved = with_sign(tl.abs(kept + kept * x), weight)
    # As integers, sizes compare as they do as numbers, and NaN is the largest.
    size = tl.abs(r).to(tl.int32, bitcast=True)
    near = constant(own, OF_NEAR, DTYPE).to(tl.int32, bitcast=True)
    if tl.max(size) > near:
        moved = tl.where(size > near, _far(weight, u, own, CHAIN, PRECISE), moved)
    return moved


@triton.jit
def _moved(weight, u, factor, own, CHAIN: tl.constexpr, PRECISE: tl.constexpr):
    """The weight after the direction ``u``."""
    DTYPE: tl.constexpr = weight.dtype
    if tl.load(own + OF_PLAIN) != 0.0:
        moved = _kept(weight, own) - constant(own, OF_LR, DTYPE) * u
    elif DTYPE == tl.float64:
        moved = _far(weight, u, own, CHAIN, PRECISE)
    else:
        moved = _multiplied(weight, u, factor, own, CHAIN, PRECISE)
    return moved


# ---- optimizers: from gradient and states to a direction


@triton.jit
def _momentum(grad, buffer, table, NESTEROV: tl.constexpr):
    """Direction and new buffer."""
    momentum = number_in(table + IN_HEAD_MOMENTUM).to(grad.dtype)
    buffer = grad * number_in(table + IN_HEAD_UNDAMPED).to(grad.dtype) + buffer * momentum
    if NESTEROV:
        return buffer * momentum + grad, buffer
    else:
        return buffer, buffer


@triton.jit
def _moments(grad, first, second, table):
    """Adam's two moments."""
    DTYPE: tl.constexpr = grad.dtype
    first = first + number_in(table + IN_HEAD_REST1).to(DTYPE) * (grad - first)
    squares = second * number_in(table + IN_HEAD_BETA2).to(DTYPE)
    return first, squares + number_in(table + IN_HEAD_REST2).to(DTYPE) * (grad * grad)


@triton.jit
def _adam_direction(first, second, table, own):
    DTYPE: tl.constexpr = first.dtype
    # The plain sqrt takes subnormal float32 for 0.
    root = tl.sqrt(second) if DTYPE == tl.float64 else tl.sqrt_rn(second)
    eps = number_in(table + IN_HEAD_EPS).to(DTYPE)
    return first / (root * constant(own, OF_ROOT2, DTYPE) + eps)


# ---- the pass: load, point, store


# Only the last block has a mask: one of unknown length would narrow every access to one element.


@triton.jit
def _load(memory, tile, left, BLOCK: tl.constexpr):
    if left >= BLOCK:
        block = tl.load(memory + tile)
    else:
        block = tl.load(memory + tile, mask=tile < left, other=0.0)
    return block


@triton.jit
def _store(memory, values, tile, left, BLOCK: tl.constexpr):
    """Writes values, which are of the memory's type."""
    if left >= BLOCK:
        tl.store(memory + tile, values)
    else:
        tl.store(memory + tile, values, mask=tile < left)


@triton.jit
def _free(row, all_rows, start, left, BLOCK: tl.constexpr):
    """Whether the elements may move, [BLOCK/8, 8]; true where the weight has no mask."""
    address = word_in(row, all_rows, COLUMN_MASK)
    words = address.to(tl.pointer_type(tl.uint8)) + start // 8
    return tile_bits(words, tl.where(address == 0, 0, (left + 7) // 8), 255, BLOCK // 8)


@triton.jit
def _step_block(
    table,
    row,
    all_rows,
    own,
    block,
    WEIGHT: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ADAM: tl.constexpr,
    STATES: tl.constexpr,
    NESTEROV: tl.constexpr,
    CHAIN: tl.constexpr,
    DECAY_OF_PHI: tl.constexpr,
    MASTERS: tl.constexpr,
    MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Steps one block of one weight: the tile [BLOCK/8, 8] of elements, a row for each mask byte.

    Selected and stored are the numbers in the types they have in memory, so that what is frozen
    keeps its bits, whatever they are.
    """
    COMPUTE: tl.constexpr = tl.float64 if WEIGHT == tl.float64 else tl.float32
    PRECISE: tl.constexpr = STATE.primitive_bitwidth > 16
    tile = tile_offsets(BLOCK // 8)
    start = (block - word_in(row, all_rows, COLUMN_FIRST_BLOCK)) * BLOCK
    left = tl.minimum(word_in(row, all_rows, COLUMN_NUMEL) - start, BLOCK).to(tl.int32)

    weights = memory_in(row, all_rows, COLUMN_WEIGHT, start, WEIGHT, ALIGNED)
    stored = _load(weights, tile, left, BLOCK)
    weight = stored.to(COMPUTE)
    if MASTERS:
        masters = memory_in(row, all_rows, COLUMN_MASTER, start, tl.float32, ALIGNED)
        master = _load(masters, tile, left, BLOCK)
        # Where a weight is not its copy rounded, somebody has overwritten it, and it counts.
        weight = tl.where(master.to(WEIGHT).to(COMPUTE) == weight, master, weight)
    grads = memory_in(row, all_rows, COLUMN_GRAD, start, WEIGHT, ALIGNED)
    grad = _load(grads, tile, left, BLOCK).to(COMPUTE)
    if STATES > 0:
        states0 = memory_in(row, all_rows, COLUMN_STATE, start, STATE, ALIGNED)
        before0 = _load(states0, tile, left, BLOCK)
    if STATES > 1:
        states1 = memory_in(row, all_rows, COLUMN_STATE + 1, start, STATE, ALIGNED)
        before1 = _load(states1, tile, left, BLOCK)
    if STATES > 2:
        states2 = memory_in(row, all_rows, COLUMN_STATE + 2, start, STATE, ALIGNED)
        before2 = _load(states2, tile, left, BLOCK)

    grad = grad * constant(own, OF_GRAD_FACTOR, COMPUTE)
    # Under the chain rule, λφ joins the gradient of φ.
    if not (CHAIN and DECAY_OF_PHI):
        grad = _decayed(grad, weight, own, PRECISE)
    factor = _factor(weight, own, CHAIN, PRECISE)
    if CHAIN:
        if tl.load(own + OF_PLAIN) == 0.0:
            alpha = constant(own, OF_ALPHA, COMPUTE)
            grad = grad * ((alpha / FACTOR_SCALE) * (tl.abs(weight) * factor))
        if DECAY_OF_PHI:
            grad = _decayed(grad, weight, own, PRECISE)

    u = grad
    if ADAM:
        state0, state1 = _moments(grad, before0.to(COMPUTE), before1.to(COMPUTE), table)
        largest = state1
        if STATES > 2:
            largest = before2.to(COMPUTE)
            # A NaN must show, whichever of the two it is in.
            largest = tl.where((state1 <= largest) | (largest != largest), largest, state1)
        u = _adam_direction(state0, largest, table, own)
    elif STATES > 0:
        u, state0 = _momentum(grad, before0.to(COMPUTE), table, NESTEROV)
    moved = _moved(weight, u, factor, own, CHAIN, PRECISE)

    shown = moved.to(WEIGHT)
    if MASKS:
        free = _free(row, all_rows, start, left, BLOCK)
        shown = tl.where(free, shown, stored)
        if MASTERS:
            # Its own bits too, also where the weight was overwritten.
            moved = tl.where(free, moved, master)
    _store(weights, shown, tile, left, BLOCK)
    if MASTERS:
        _store(masters, moved, tile, left, BLOCK)
    if STATES > 0:
        after0 = state0.to(STATE)
        if MASKS:
            after0 = tl.where(free, after0, before0)
        _store(states0, after0, tile, left, BLOCK)
    if STATES > 1:
        after1 = state1.to(STATE)
        if MASKS:
            after1 = tl.where(free, after1, before1)
        _store(states1, after1, tile, left, BLOCK)
    if STATES > 2:
        after2 = largest.to(STATE)
        if MASKS:
            after2 = tl.where(free, after2, before2)
        _store(states2, after2, tile, left, BLOCK)


@triton.jit(do_not_specialize=["begin", "rows", "all_rows"])
def step_kernel(
    table,
    constants,
    begin,
    rows,
    all_rows,
    WEIGHT: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ADAM: tl.constexpr,
    STATES: tl.constexpr,
    NESTEROV: tl.constexpr,
    CHAIN: tl.constexpr,
    DECAY_OF_PHI: tl.constexpr,
    MASTERS: tl.constexpr,
    MASKS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of the weights in rows ``begin`` to ``begin + rows − 1`` of ``all_rows``.

    WEIGHT is the type of weights and gradients, STATE that of their STATES states; with MASTERS
    each weight has a float32 copy, with MASKS some have masks. ALIGNED: all addresses but those of
    masks are multiples of 16.
    """
    block = tl.program_id(0).to(tl.int64)
    first = table + HEAD_SIZE + begin
    at = begin + row_of(first + COLUMN_FIRST_BLOCK * all_rows, block, rows, LANES)
    own = constants + at * CONSTANTS_SIZE
    if tl.load(own + OF_GOES) != 0.0:
        _step_block(
            table,
            table + HEAD_SIZE + at,
            all_rows,
            own,
            block,
            WEIGHT,
            STATE,
            ALIGNED,
            ADAM,
            STATES,
            NESTEROV,
            CHAIN,
            DECAY_OF_PHI,
            MASTERS,
            MASKS,
            BLOCK,
        )


# ---- launchers

Tensors = Sequence[Tensor]


def sgd_step_(
    weights: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors,
    masters: Tensors,
    masks: Tensors,
    alphas: Tensors,
    holds_phi: Sequence[int],
    lr: Tensor,
    momentum: float,
    dampening: float,
    nesterov: bool,
    *words: Any,
) -> None:
    """One step of SGD in place; ``words`` are the schema's last seven arguments."""
    op = "sgd_step_"
    states = {"momentum_buffers": momentum_buffers} if momentum_buffers else {}
    lists = Lists(op, weights, grads, states, masters, masks, alphas, holds_phi)
    options = {"momentum": momentum, "undamped": 1 - dampening}
    _step(lists, options, lr, *words, ADAM=False, NESTEROV=bool(nesterov))


def adam_step_(
    weights: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    steps: Tensors,
    masters: Tensors,
    masks: Tensors,
    alphas: Tensors,
    holds_phi: Sequence[int],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    *words: Any,
) -> None:
    """One step of Adam in place; ``words`` are the schema's last seven arguments.

    Steps on the CPU are counted there. Whether they may be is then asked of ``found_inf`` first,
    and if that is on the GPU, the answer is waited for.
    """
    op = "adam_step_"
    states = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if max_exp_avg_sqs:
        states["max_exp_avg_sqs"] = max_exp_avg_sqs
    lists = Lists(op, weights, grads, states, masters, masks, alphas, holds_phi, steps)
    options = {"rest1": 1 - beta1, "beta2": beta2, "rest2": 1 - beta2, "eps": eps}
    options["beta1_halvings"] = -math.log2(beta1) if beta1 > 0 else math.inf
    options["beta2_halvings"] = -math.log2(beta2) if beta2 > 0 else math.inf
    _step(lists, options, lr, *words, ADAM=True, NESTEROV=False)


def _step(
    lists: Lists,
    options: dict[str, float],
    lr: Tensor,
    weight_decay: float,
    decay: str,
    decay_of: str,
    rule: str,
    maximize: bool,
    *scaling: Tensor | None,
    **variant: bool,
) -> None:
    if not lists.weights:
        return
    options["decoupled_rate"] = weight_decay if decay == "decoupled" else 0.0
    options["decay_rate"] = 0.0 if decay == "decoupled" else weight_decay
    options["grad_factor"] = -1.0 if maximize else 1.0
    variant |= {"CHAIN": rule == "chain", "DECAY_OF_PHI": decay_of == "phi"}
    check_followed(lists, *scaling)
    # A kernel goes to the current device, which need not be that of the tensors.
    with torch.cuda.device_of(lists.weights[0]):
        table = table_for(lists)
        head = _head(lists, options, lr, *scaling)
        if head is None:
            return
        if variant["ADAM"]:
            count_steps(lists, table)
        _launch(table, table.on_device(head, lists), len(lists.states), **variant)
        table.write_back()


def _head(
    lists: Lists,
    options: dict[str, float],
    lr: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> dict[str, int] | None:
    """The words of the table's head; None where an overflow is known to the host."""
    device = lists.weights[0].device
    check_number(lists.op, "lr", lr, device, torch.float64)
    for name, number in (("grad_scale", grad_scale), ("found_inf", found_inf)):
        if number is not None:
            check_number(lists.op, name, number, device)
    addresses = {}
    if lies_on(lr, device):
        addresses["lr_double" if lr.dtype == torch.float64 else "lr_single"] = lr.data_ptr()
    else:
        options["lr"] = _rate(lists.op, lr, options["decoupled_rate"])
    if found_inf is not None and _is_asked_here(found_inf, lists, device):
        if found_inf.item() != 0:
            return None
    elif found_inf is not None:
        addresses["found_inf"] = found_inf.data_ptr()
    if grad_scale is not None and lies_on(grad_scale, device):
        addresses["grad_scale"] = grad_scale.data_ptr()
    elif grad_scale is not None:
        options["grad_factor"] /= grad_scale.item()
    return addresses | {name: bits(value) for name, value in options.items()}


def _rate(op: str, lr: Tensor, decoupled_rate: float) -> float:
    """The value of a learning rate on the CPU, checked as the compiled kernels check it."""
    rate = lr.item()
    if not 0 <= rate < math.inf:
        raise RuntimeError(f"{op}: lr must be a finite number >= 0, got {rate}")
    if not rate * decoupled_rate < 1:
        raise RuntimeError(
            f"{op}: decoupled decay multiplies weights by 1 - lr * weight_decay, which must be "
            f"positive; got lr {rate} and weight_decay {decoupled_rate}"
        )
    return rate


def _is_asked_here(found_inf: Tensor, lists: Lists, device: torch.device) -> bool:
    """Whether the host must know if there was an overflow: to count steps that are on the CPU."""
    on_device = (lies_on(number, device) for number in (found_inf, *lists.steps))
    return not all(on_device)


def _launch(table: Table, on_device: Tensor, states: int, **variant: bool) -> None:
    rows = len(table.rows)
    constants = on_device.new_empty((rows, CONSTANTS), dtype=torch.float64)
    prepared = {name: variant[name] for name in ("ADAM", "CHAIN", "DECAY_OF_PHI")}
    grid = (triton.cdiv(rows, PREPARED),)
    prepare_kernel[grid](on_device, constants, rows, **prepared, **prepare_choices())
    warp = warp_size(on_device.device)
    for group in table.groups:
        if group.blocks == 0:
            continue
        step_kernel[(group.blocks,)](
            on_device,
            constants,
            group.begin,
            group.rows,
            rows,
            ALIGNED=group.is_aligned,
            STATES=states,
            MASTERS=group.has_masters,
            MASKS=group.has_masks,
            **step_choices(group.weight_dtype, group.state_dtype, warp),
            **variant,
        )


def prepare_choices() -> dict[str, Any]:
    """What every launch of `prepare_kernel` fixes; the compiled code depends on it."""
    return {"LANES": PREPARED, "num_warps": 1}


def step_choices(weight_dtype: torch.dtype, state_dtype: torch.dtype, warp: int) -> dict[str, Any]:
    """What a launch of `step_kernel` fixes by these types, on a GPU with such warps."""
    return {
        "WEIGHT": _TYPES[weight_dtype],
        "STATE": _TYPES[state_dtype],
        "LANES": SEARCHED,
        "BLOCK": block_of(weight_dtype),
        "num_warps": _THREADS // warp,
    }


_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
