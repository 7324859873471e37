"""Masks of one bit an entry: `BitMask`, and the ops on its words."""

from ppkernels.ops.bitmask.bitmask import BitMask, words_within
from ppkernels.ops.bitmask.op import (
    ApplyMask,
    apply_mask,
    checked_shape,
    count_bits,
    pack_bits,
    unpack_bits,
)

__all__ = [
    "ApplyMask",
    "BitMask",
    "apply_mask",
    "checked_shape",
    "count_bits",
    "pack_bits",
    "unpack_bits",
    "words_within",
]
