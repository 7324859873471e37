"""The ops, one room each. Public names only; see README.md for how a room is built."""

from ppkernels.ops.bitmask import BitMask, apply_mask, count_bits, pack_bits, unpack_bits
from ppkernels.ops.power import (
    inverse_power,
    power,
    power_backward,
    power_double_backward,
    rebase,
)

__all__ = [
    "BitMask",
    "apply_mask",
    "count_bits",
    "inverse_power",
    "pack_bits",
    "power",
    "power_backward",
    "power_double_backward",
    "rebase",
    "unpack_bits",
]
