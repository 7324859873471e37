"""`pp.autograd`: the public autograd Functions."""

from ppkernels.ops.bitmask import ApplyMask
from ppkernels.ops.power import Power
from ppkernels.ops.power_linear import PowerLinear

__all__ = ["ApplyMask", "Power", "PowerLinear"]
