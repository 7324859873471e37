"""Powered layers, and the ways to turn a model's plain layers into them and back.

Importing this package installs the guard that refuses to step θ-storing layers with an optimizer
that knows nothing of them.
"""

from ppkernels.nn import guard as guard
from ppkernels.nn import init
from ppkernels.nn.conv import PowerConv1d, PowerConv2d, PowerConv3d
from ppkernels.nn.convert import fold, powerize
from ppkernels.nn.linear import PowerLinear
from ppkernels.nn.powered import Powered, set_alpha

__all__ = [
    "PowerConv1d",
    "PowerConv2d",
    "PowerConv3d",
    "PowerLinear",
    "Powered",
    "fold",
    "init",
    "powerize",
    "set_alpha",
]
