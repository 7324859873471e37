"""Triton kernels of the selection, for NVIDIA and AMD GPUs; gpu.py launches them.

# Note [Selection by digits]
An entry's key is an integer that orders as |θ| does. The k-th largest is found digit by digit, from
the highest bits on. `count_kernel` reads the weights and counts, for each value of the next digit,
the entries that agree with the digits found so far; `narrow_kernel` finds the digit of the k-th
among these counts, and how many entries are still to be found among those that have it. Where that
is all of them, the search is over, and the passes that follow end at once. Last, `write_kernel`
reads the weights again and writes the words of the masks, whole bytes.

Where equal keys are left to choose from, `tie_kernel` counts them block by block, the sums over the
blocks before are taken, and `write_kernel` keeps the first of them by index. Everything that is
added up is an integer, so nothing depends on the order in which programs run.

Keys are made in keys.py. An entry that may not be kept, and what lies behind the last one, has a
key below all others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ppkernels.ops._table import memory_in, row_of, word_in
from ppkernels.ops._tile import tile_bits, tile_offsets
from ppkernels.ops.select.keys import infinity_key, key_of, no_key

# ---- where things are

# Addresses of what the tensor stores, of the words of ``within`` (or 0) and of the words to write;
# its elements; its first block of those of its launch, and of those of all tensors in order; its
# index; its selection, and the first block of that; the bits of α.
COLUMNS = (
    *("values", "within", "words", "numel", "first_block", "place", "index", "selection"),
    *("selection_place", "alpha"),
)
_VALUES, _WITHIN, _WORDS, _NUMEL, _FIRST_BLOCK, _PLACE, _INDEX, _SELECTION, _START, _ALPHA = map(
    tl.constexpr, range(len(COLUMNS))
)

# What is known of a selection: entries still to be found, 0 at the end; the digits found so far,
# as the key shifted by what the next digit is; the least key that is kept whole; how many are kept
# of the entries whose key is one less.
STATE = ("need", "base", "least", "ties")
STATE_SIZE = tl.constexpr(len(STATE))
_NEED, _BASE, _LEAST, _TIES = map(tl.constexpr, range(len(STATE)))

# ---- loading


@triton.jit
def _note_nan(first_nan, keys, index, TYPE: tl.constexpr, KEY: tl.constexpr):
    """``first_nan`` becomes ``index`` if that is less; as an unsigned number, −1 is the largest."""
    if tl.max(keys) > infinity_key(TYPE, KEY):
        tl.atomic_min(first_nan, index.to(tl.uint64))


@triton.jit
def _load(values, tile, left, BLOCK: tl.constexpr):
    # Only the last block has a mask: one of unknown length would narrow every access to one
    # element.
    if left >= BLOCK:
        block = tl.load(values + tile)
    else:
        block = tl.load(values + tile, mask=tile < left, other=0)
    return block


@triton.jit
def _block_keys(
    row,
    all_rows,
    start,
    left,
    TYPE: tl.constexpr,
    KEY: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The keys of a block, [BLOCK/8, 8], a row for each of its words."""
    BITS: tl.constexpr = TYPE.primitive_bitwidth
    STORED: tl.constexpr = tl.int16 if BITS == 16 else (tl.int32 if BITS == 32 else tl.int64)
    tile = tile_offsets(BLOCK // 8)
    values = memory_in(row, all_rows, _VALUES, start, STORED, ALIGNED)
    alpha = word_in(row, all_rows, _ALPHA).to(tl.float64, bitcast=True)
    keys = key_of(_load(values, tile, left, BLOCK), alpha, TYPE, KEY)
    if left < BLOCK:
        keys = tl.where(tile < left, keys, no_key(KEY))
    if MASKS:
        address = word_in(row, all_rows, _WITHIN)
        words = address.to(tl.pointer_type(tl.uint8)) + start // 8
        size = tl.where(address == 0, 0, (left + 7) // 8)
        keys = tl.where(tile_bits(words, size, 255, BLOCK // 8), keys, no_key(KEY))
    return keys


@triton.jit
def _start_and_left(row, all_rows, block, BLOCK: tl.constexpr):
    """Where a block of a launch begins in its tensor, and how many elements it has, up to BLOCK."""
    start = (block - word_in(row, all_rows, _FIRST_BLOCK)) * BLOCK
    left = tl.minimum(word_in(row, all_rows, _NUMEL) - start, BLOCK).to(tl.int32)
    return start, left


@triton.jit
def _place(row, all_rows, block):
    """A block's number among those of all tensors in order."""
    first = word_in(row, all_rows, _FIRST_BLOCK)
    return word_in(row, all_rows, _PLACE) + block - first


# ---- the passes


@triton.jit(do_not_specialize=["begin", "rows", "all_rows", "shift", "values"])
def count_kernel(
    table,
    state,
    bins,
    first_nan,
    begin,
    rows,
    all_rows,
    shift,
    values,
    FIRST: tl.constexpr,
    TYPE: tl.constexpr,
    KEY: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):
    """bins[selection, d] += entries whose key, shifted, is d < ``values`` more than the base.

    Of rows ``begin`` to ``begin + rows − 1``. In the FIRST pass, tensors with a NaN are noted.
    """
    block = tl.program_id(0).to(tl.int64)
    at = begin + row_of(table + begin + _FIRST_BLOCK * all_rows, block, rows, LANES)
    row = table + at
    selection = word_in(row, all_rows, _SELECTION)
    own = state + selection * STATE_SIZE
    if tl.load(own + _NEED) >= (0 if FIRST else 1):
        start, left = _start_and_left(row, all_rows, block, BLOCK)
        keys = _block_keys(row, all_rows, start, left, TYPE, KEY, ALIGNED, MASKS, BLOCK)
        if FIRST:
            _note_nan(first_nan, keys, word_in(row, all_rows, _INDEX), TYPE, KEY)
        digits = (keys >> shift) - tl.load(own + _BASE).to(keys.dtype)
        if KEY > 31:
            digits = tl.where((digits >= 0) & (digits < values), digits, -1).to(tl.int32)
        # In any order: nothing moves between threads.
        digits = tl.reshape(digits, [BLOCK], can_reorder=True)
        is_counted = digits.to(tl.uint32, bitcast=True) < values
        found = tl.histogram(digits, BINS, mask=is_counted)
        pointers = bins + selection * BINS + tl.arange(0, BINS)
        tl.atomic_add(pointers, found.to(tl.int64), mask=found != 0, sem="relaxed")


@triton.jit(do_not_specialize=["first", "shift", "next_shift"])
def narrow_kernel(
    state, bins, first, shift, next_shift, KEY: tl.constexpr, LAST: tl.constexpr, BINS: tl.constexpr
):
    """Takes the next digit of selection ``first + program`` into its state, and clears its bins.

    LAST: there is no digit after this one.
    """
    selection = first + tl.program_id(0).to(tl.int64)
    own = state + selection * STATE_SIZE
    digits = tl.arange(0, BINS)
    pointers = bins + selection * BINS + digits
    found = tl.load(pointers)
    tl.store(pointers, tl.zeros_like(found))
    need = tl.load(own + _NEED)
    if need > 0:
        at_least = tl.cumsum(found, 0, reverse=True)
        digit = tl.max(tl.where(at_least >= need, digits, -1))
        with_digit = tl.sum(tl.where(digits == digit, found, 0))
        above = tl.sum(tl.where(digits == digit, at_least, 0)) - with_digit
        need = need - above
        value = tl.load(own + _BASE) + digit
        # Fewer than are wanted, which leaves no digit: all are kept.
        is_all = (with_digit == need) | (digit < 0)
        least = tl.where(is_all, value << shift, value + 1)
        least = tl.maximum(tl.where(digit < 0, no_key(KEY), least), no_key(KEY) + 1)
        is_over = is_all | LAST
        tl.store(own + _NEED, tl.where(is_over, 0, need))
        tl.store(own + _BASE, value << (shift - next_shift))
        tl.store(own + _LEAST, least, mask=is_over)
        # Nor is anything kept of what may not be, however many are wanted.
        has_ties = is_over & (is_all == 0) & (least > no_key(KEY) + 1)
        tl.store(own + _TIES, need, mask=has_ties)


@triton.jit(do_not_specialize=["begin", "rows", "all_rows"])
def tie_kernel(
    table,
    state,
    ties,
    begin,
    rows,
    all_rows,
    TYPE: tl.constexpr,
    KEY: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """ties[place + 1] = entries of a block of which only some may be kept; 0 is not written."""
    block = tl.program_id(0).to(tl.int64)
    at = begin + row_of(table + begin + _FIRST_BLOCK * all_rows, block, rows, LANES)
    row = table + at
    own = state + word_in(row, all_rows, _SELECTION) * STATE_SIZE
    if tl.load(own + _TIES) > 0:
        start, left = _start_and_left(row, all_rows, block, BLOCK)
        keys = _block_keys(row, all_rows, start, left, TYPE, KEY, ALIGNED, MASKS, BLOCK)
        is_tied = keys == (tl.load(own + _LEAST) - 1).to(keys.dtype)
        count = tl.sum(is_tied.to(tl.int32)).to(tl.int64)
        tl.store(ties + 1 + _place(row, all_rows, block), count)


@triton.jit
def _ranks(is_tied):
    """How many of a tile [WORDS, 8] come before each entry."""
    tied = is_tied.to(tl.int32)
    in_row = tl.sum(tied, axis=1)
    before_row = tl.cumsum(in_row, 0) - in_row
    return before_row[:, None] + tl.cumsum(tied, 1) - tied


@triton.jit
def _store_words(words, is_kept, left, BLOCK: tl.constexpr):
    """Writes the words of the bits [BLOCK/8, 8], as many as ``left`` entries have."""
    word = tl.sum(is_kept.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    offsets = tl.arange(0, BLOCK // 8)
    tl.store(words + offsets, word.to(tl.uint8), mask=offsets * 8 < left)


@triton.jit(do_not_specialize=["begin", "rows", "all_rows"])
def write_kernel(
    table,
    state,
    ties,
    begin,
    rows,
    all_rows,
    TYPE: tl.constexpr,
    KEY: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The words of the masks; ties[place] are those of all blocks before."""
    block = tl.program_id(0).to(tl.int64)
    at = begin + row_of(table + begin + _FIRST_BLOCK * all_rows, block, rows, LANES)
    row = table + at
    own = state + word_in(row, all_rows, _SELECTION) * STATE_SIZE
    start, left = _start_and_left(row, all_rows, block, BLOCK)
    keys = _block_keys(row, all_rows, start, left, TYPE, KEY, ALIGNED, MASKS, BLOCK)
    least = tl.load(own + _LEAST)
    is_kept = keys >= least.to(keys.dtype)
    kept_ties = tl.load(own + _TIES)
    if kept_ties > 0:
        place = _place(row, all_rows, block)
        first = tl.load(ties + word_in(row, all_rows, _START))
        room = kept_ties - (tl.load(ties + place) - first)
        if room > 0:
            is_tied = keys == (least - 1).to(keys.dtype)
            is_kept = is_kept | (is_tied & (_ranks(is_tied) < room))
    words = word_in(row, all_rows, _WORDS).to(tl.pointer_type(tl.uint8)) + start // 8
    _store_words(words, is_kept, left, BLOCK)
