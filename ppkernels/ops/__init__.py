"""The ops, one room each. Public names only; see README.md for how a room is built."""

from ppkernels.ops.power import (
    inverse_power,
    power,
    power_backward,
    power_double_backward,
    rebase,
)

__all__ = ["inverse_power", "power", "power_backward", "power_double_backward", "rebase"]
