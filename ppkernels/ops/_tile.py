"""Elements beside the bits of their mask in Triton, for the kernels of every room that needs it.

A mask's words are bytes, entry i being bit i % 8 of byte i // 8. A tile has a row of eight elements
for each of its WORDS words: a word is loaded once and spread over its row, and the elements, which
are neighbours in memory from row to row, go in wide accesses.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_offsets(WORDS: tl.constexpr):
    """Where the elements of a tile are, counted from its first: [WORDS, 8]."""
    return tl.arange(0, WORDS)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def tile_bits(words, size, OTHER: tl.constexpr, WORDS: tl.constexpr):
    """Whether the bits of the WORDS words from ``words`` on are set: [WORDS, 8].

    Words from ``size`` on are not read; OTHER stands for them.
    """
    offsets = tl.arange(0, WORDS)
    word = tl.load(words + offsets, mask=offsets < size, other=OTHER).to(tl.int32)
    # Not shifted, for which each element would take one instruction more.
    return (word[:, None] & (1 << tl.arange(0, 8))[None, :]) != 0
