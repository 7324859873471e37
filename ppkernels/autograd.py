"""`pp.autograd`: the public autograd Functions."""

from ppkernels.ops.bitmask import ApplyMask
from ppkernels.ops.power import Power

__all__ = ["ApplyMask", "Power"]
