"""Triton: what a step needs of each weight beside its elements, computed once a weight in float64.

`prepare_kernel` reads the table of a call (table.py) and writes a table of constants, which
`step_kernel` (gpu.py) reads. Here stand the names of the places in both.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ppkernels.ops._point import scaled_power
from ppkernels.ops.step.table import (
    ALPHA_IS_NUMBER,
    COLUMNS,
    HEAD,
    HEAD_WORDS,
    HOLDS_PHI,
    STEP_IS_NUMBER,
)

# Weights of one program.
PREPARED = 32

# ---- where things are: words of the table's head, its columns, and columns of the constants

HEAD_SIZE = tl.constexpr(HEAD_WORDS)
IN_HEAD_LR = tl.constexpr(HEAD.index("lr"))
IN_HEAD_LR_SINGLE = tl.constexpr(HEAD.index("lr_single"))
IN_HEAD_LR_DOUBLE = tl.constexpr(HEAD.index("lr_double"))
IN_HEAD_DECOUPLED_RATE = tl.constexpr(HEAD.index("decoupled_rate"))
IN_HEAD_DECAY_RATE = tl.constexpr(HEAD.index("decay_rate"))
IN_HEAD_GRAD_FACTOR = tl.constexpr(HEAD.index("grad_factor"))
IN_HEAD_MOMENTUM = tl.constexpr(HEAD.index("momentum"))
IN_HEAD_UNDAMPED = tl.constexpr(HEAD.index("undamped"))
IN_HEAD_REST1 = tl.constexpr(HEAD.index("rest1"))
IN_HEAD_BETA2 = tl.constexpr(HEAD.index("beta2"))
IN_HEAD_REST2 = tl.constexpr(HEAD.index("rest2"))
IN_HEAD_EPS = tl.constexpr(HEAD.index("eps"))
IN_HEAD_HALVINGS1 = tl.constexpr(HEAD.index("beta1_halvings"))
IN_HEAD_HALVINGS2 = tl.constexpr(HEAD.index("beta2_halvings"))
IN_HEAD_GRAD_SCALE = tl.constexpr(HEAD.index("grad_scale"))
IN_HEAD_FOUND_INF = tl.constexpr(HEAD.index("found_inf"))

COLUMN_WEIGHT = tl.constexpr(COLUMNS.index("weight"))
COLUMN_GRAD = tl.constexpr(COLUMNS.index("grad"))
COLUMN_MASTER = tl.constexpr(COLUMNS.index("master"))
COLUMN_STATE = tl.constexpr(COLUMNS.index("state0"))
COLUMN_MASK = tl.constexpr(COLUMNS.index("mask"))
COLUMN_ALPHA = tl.constexpr(COLUMNS.index("alpha"))
COLUMN_STEP = tl.constexpr(COLUMNS.index("step"))
COLUMN_NUMEL = tl.constexpr(COLUMNS.index("numel"))
COLUMN_FIRST_BLOCK = tl.constexpr(COLUMNS.index("first_block"))
COLUMN_FLAGS = tl.constexpr(COLUMNS.index("flags"))
HOLDS_PHI_FLAG = tl.constexpr(HOLDS_PHI)
ALPHA_FLAG = tl.constexpr(ALPHA_IS_NUMBER)
STEP_FLAG = tl.constexpr(STEP_IS_NUMBER)

# Constants of a weight, float64: whether anything is done at all; whether the step is plain; what
# gradients are multiplied by; α; decoupled decay's factors of what is stored and of φ; lr with
# Adam's first bias correction; e (0 for a plain step) and rate of Note [A step on θ alone, on a
# GPU]; λ and the exponent of coupled decay; near; Adam's 1/√(1 − β₂^t); the terms of the series.
OF_GOES, OF_PLAIN, OF_GRAD_FACTOR, OF_ALPHA = map(tl.constexpr, range(4))
OF_KEEP, OF_KEEP_PHI, OF_LR, OF_EXPONENT, OF_RATE = map(tl.constexpr, range(4, 9))
OF_DECAY_RATE, OF_DECAY_EXPONENT, OF_NEAR, OF_ROOT2, OF_TERMS = map(tl.constexpr, range(9, 14))
TERM_COUNT = tl.constexpr(6)
# What |θ|^e is multiplied by under the chain rule: 1/|φ| overflows where θ is subnormal.
FACTOR_SCALE = tl.constexpr(2.0**-24)
# α^6 / 6! is a float32.
LARGEST_ALPHA = tl.constexpr(2.0**21)
CONSTANTS = 13 + 6
CONSTANTS_SIZE = tl.constexpr(CONSTANTS)

# ---- reading the two tables


@triton.jit
def number_in(word):
    """The float64 of a word of the table."""
    return tl.load(word).to(tl.float64, bitcast=True)


@triton.jit
def constant(own, COLUMN: tl.constexpr, DTYPE: tl.constexpr):
    """One constant of a weight: ``own`` points at its first."""
    return tl.load(own + COLUMN).to(DTYPE)


# ---- once a weight


@triton.jit
def _number_at(word, none, TYPE: tl.constexpr):
    """The TYPE whose address the word is, as float64; ``none`` where there is no address."""
    address = tl.load(word)
    number = tl.load(address.to(tl.pointer_type(TYPE)), mask=address != 0, other=0.0)
    return tl.where(address != 0, number.to(tl.float64), none)


@triton.jit
def _learning_rate(table):
    """lr: the head's own number, or what stands where the head says."""
    own = number_in(table + IN_HEAD_LR)
    single = _number_at(table + IN_HEAD_LR_SINGLE, own, tl.float32)
    return _number_at(table + IN_HEAD_LR_DOUBLE, single, tl.float64)


@triton.jit
def _number_or_load(words, is_number, inside, TYPE: tl.constexpr):
    """What words stand for: a float64's bits, or the address of a TYPE; 1 for lanes outside."""
    pointers = words.to(tl.pointer_type(TYPE))
    loaded = tl.load(pointers, mask=inside & (is_number == 0), other=1.0).to(tl.float64)
    return tl.where(is_number, words.to(tl.float64, bitcast=True), loaded)


@triton.jit
def _bias_correction(count, halvings):
    """1 − β^count with β = 2^−halvings."""
    half = tl.full(count.shape, 0.5, tl.float64)
    return 1.0 - scaled_power(half, count * halvings, None, True)


@triton.jit
def _put(constants, COLUMN: tl.constexpr, values, rows, lanes):
    tl.store(constants + lanes * CONSTANTS_SIZE + COLUMN, values, mask=lanes < rows)


@triton.jit
def _put_series(constants, alpha, rows, lanes, TERMS: tl.constexpr):
    """The binomial series of (1 + r)^α, and up to where its TERMS terms suffice."""
    coefficient = tl.full(alpha.shape, 1.0, tl.float64)
    for i in tl.static_range(TERMS):
        coefficient = coefficient * (alpha - i) / (i + 1)
        _put(constants, OF_TERMS + i, coefficient, rows, lanes)
    # The first term left away is below 2^-27 there, and 1 + x is 1/4 or more, which leaves the sum
    # most of its bits where a step brings θ close to 0.
    rest = tl.abs(coefficient * (alpha - TERMS) / (TERMS + 1))
    seventh = tl.full((), 1.0, tl.float64) / (TERMS + 1)
    near = scaled_power(2.0**-27 / rest, seventh, None, True)
    limit = tl.where(alpha < 2.0, 0.5, 1.0 / alpha)
    near = tl.where(near < limit, near, limit)
    # Terms beyond float32: no r is near.
    _put(constants, OF_NEAR, tl.where(alpha <= LARGEST_ALPHA, near, -1.0), rows, lanes)


@triton.jit
def _put_counted(constants, table, words, flags, lr, goes, rows, lanes):
    """Counts Adam's steps up, and gives lr and root with their bias corrections."""
    is_number = (flags & STEP_FLAG) != 0
    inside = lanes < rows
    count = _number_or_load(words, is_number, inside, tl.float32)
    count = tl.where(is_number, count, count + 1.0)
    pointers = words.to(tl.pointer_type(tl.float32))
    tl.store(pointers, count.to(tl.float32), mask=inside & goes & (is_number == 0))
    root2 = 1.0 / tl.sqrt(_bias_correction(count, number_in(table + IN_HEAD_HALVINGS2)))
    _put(constants, OF_ROOT2, root2, rows, lanes)
    return lr / _bias_correction(count, number_in(table + IN_HEAD_HALVINGS1))


@triton.jit(do_not_specialize=["rows"])
def prepare_kernel(
    table,
    constants,
    rows,
    ADAM: tl.constexpr,
    CHAIN: tl.constexpr,
    DECAY_OF_PHI: tl.constexpr,
    LANES: tl.constexpr,
):
    """constants [rows, CONSTANTS] of a table of ``rows`` weights; Adam's steps are counted up."""
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = lanes < rows
    columns = table + HEAD_SIZE + lanes
    flags = tl.load(columns + COLUMN_FLAGS * rows, mask=inside, other=0)
    alpha_words = tl.load(columns + COLUMN_ALPHA * rows, mask=inside, other=0)
    is_number = (flags & ALPHA_FLAG) != 0
    alpha = _number_or_load(alpha_words, is_number, inside, tl.float64)
    holds_phi = (flags & HOLDS_PHI_FLAG) != 0

    everywhere = tl.full(alpha.shape, 1.0, tl.float64)
    goes = everywhere * _number_at(table + IN_HEAD_FOUND_INF, 0.0, tl.float32) == 0.0
    scale = _number_at(table + IN_HEAD_GRAD_SCALE, 1.0, tl.float32)
    lr = everywhere * _learning_rate(table)
    # What decoupled decay leaves.
    kept = 1.0 - lr * number_in(table + IN_HEAD_DECOUPLED_RATE)
    if ADAM:
        words = tl.load(columns + COLUMN_STEP * rows, mask=inside, other=0)
        lr = _put_counted(constants, table, words, flags, lr, goes, rows, lanes)

    # What a decay of θ is to φ, and the other way round, differs by the exponent.
    decay_rate = everywhere * number_in(table + IN_HEAD_DECAY_RATE)
    is_plain = holds_phi | (alpha == 1.0)
    if DECAY_OF_PHI:
        keep_phi = kept
        keep = tl.where(is_plain, kept, scaled_power(kept, alpha, None, True))
        decay_exponent = tl.where(holds_phi, 1.0, 1.0 / alpha)
    else:
        keep_phi = scaled_power(kept, 1.0 / alpha, None, True)
        keep = tl.where(holds_phi, keep_phi, kept)
        # The slope of λ/2·|θ|² with respect to φ.
        decay_exponent = tl.where(holds_phi, 2.0 * alpha - 1.0, 1.0)
        decay_rate = tl.where(holds_phi, decay_rate * alpha, decay_rate)

    if CHAIN:
        exponent = -1.0 / alpha
        rate = -lr / keep_phi / FACTOR_SCALE
    else:
        exponent = (alpha - 2.0) / alpha
        rate = -lr * alpha / keep_phi

    _put(constants, OF_GOES, tl.where(goes, everywhere, 0.0), rows, lanes)
    _put(constants, OF_PLAIN, tl.where(is_plain, 1.0, 0.0).to(tl.float64), rows, lanes)
    grad_factor = everywhere * number_in(table + IN_HEAD_GRAD_FACTOR) / scale
    _put(constants, OF_GRAD_FACTOR, grad_factor, rows, lanes)
    _put(constants, OF_ALPHA, alpha, rows, lanes)
    _put(constants, OF_KEEP, keep, rows, lanes)
    _put(constants, OF_KEEP_PHI, keep_phi, rows, lanes)
    _put(constants, OF_LR, lr, rows, lanes)
    _put(constants, OF_EXPONENT, tl.where(is_plain, 0.0, exponent), rows, lanes)
    _put(constants, OF_RATE, rate, rows, lanes)
    _put(constants, OF_DECAY_RATE, decay_rate, rows, lanes)
    _put(constants, OF_DECAY_EXPONENT, decay_exponent, rows, lanes)
    _put_series(constants, alpha, rows, lanes, TERM_COUNT)
