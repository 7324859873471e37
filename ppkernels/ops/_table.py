"""A table of tensors in Triton, for the kernels of every room that takes lists of them.

A table is int64 on the device: a row for each tensor, stored column by column, so that entry i of a
column stands beside entry i + 1. A launch takes some rows that stand together, in blocks of
elements; one column holds the block that each row begins with.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows that a program looks through at once.
SEARCHED = 128


@triton.jit
def _begun(firsts, begin, block, rows, LANES: tl.constexpr):
    """How many of LANES rows from ``begin`` on begin at or before ``block``."""
    lanes = begin + tl.arange(0, LANES)
    first = tl.load(firsts + lanes, mask=lanes < rows, other=block + 1)
    return (first <= block).to(tl.int32)


@triton.jit
def row_of(firsts, block, rows, LANES: tl.constexpr):
    """The row of a launch that ``block`` belongs to: the last that begins at or before it.

    ``firsts`` points at the rows' first blocks. All are looked at, LANES at a time: for a model's
    hundred weights that is one access, where a binary search takes seven, one after the other.
    """
    found = _begun(firsts, 0, block, rows, LANES)
    if rows > LANES:
        for begin in range(LANES, rows, LANES):
            found += _begun(firsts, begin, block, rows, LANES)
    return tl.sum(found) - 1


@triton.jit
def word_in(row, all_rows, COLUMN: tl.constexpr):
    """What stands in a column, ``row`` being in the first of a table of ``all_rows`` rows."""
    return tl.load(row + COLUMN * all_rows)


@triton.jit
def memory_in(
    row, all_rows, COLUMN: tl.constexpr, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr
):
    """Element ``start`` of the tensor whose address stands in COLUMN.

    ALIGNED: the address is a multiple of 16.
    """
    memory = word_in(row, all_rows, COLUMN).to(tl.pointer_type(TYPE))
    if ALIGNED:
        memory = tl.multiple_of(memory, 16)
    return memory + start
