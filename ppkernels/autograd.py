"""`pp.autograd`: the public autograd Functions."""

from ppkernels.ops.power import Power

__all__ = ["Power"]
