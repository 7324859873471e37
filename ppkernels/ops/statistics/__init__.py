"""One-pass statistics of the powered weights."""

from ppkernels.ops.statistics.op import Statistics, statistics

__all__ = ["Statistics", "statistics"]
