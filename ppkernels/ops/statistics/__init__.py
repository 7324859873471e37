"""One-pass statistics of the powered weights."""

from ppkernels.ops.statistics.op import statistics
from ppkernels.ops.statistics.result import Statistics

__all__ = ["Statistics", "statistics"]
