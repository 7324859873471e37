"""Pruning: four choices that do not know each other, and a `Pruner` that knows when."""

from ppkernels._shares import entries_of
from ppkernels.sparsity.adaptive_alpha import AdaptiveAlpha, AlphaRecord
from ppkernels.sparsity.distributions import ERK, Distribution, Global, PerLayer, Uniform
from ppkernels.sparsity.entries import Kept
from ppkernels.sparsity.norms import reestimate_batch_norm
from ppkernels.sparsity.pruner import Pruner
from ppkernels.sparsity.report import LayerReport, Report, report
from ppkernels.sparsity.schedules import Cosine, Cubic, Iterative, OneShot, Schedule
from ppkernels.sparsity.scores import Gradient, Magnitude, Random, Score, Sensitivity
from ppkernels.sparsity.types import ConstantFanIn, NofM, Type, Unstructured
from ppkernels.sparsity.weights import Counts, Shares, Size, Weight

__all__ = [
    "ERK",
    "AdaptiveAlpha",
    "AlphaRecord",
    "ConstantFanIn",
    "Cosine",
    "Counts",
    "Cubic",
    "Distribution",
    "Global",
    "Gradient",
    "Iterative",
    "Kept",
    "LayerReport",
    "Magnitude",
    "NofM",
    "OneShot",
    "PerLayer",
    "Pruner",
    "Random",
    "Report",
    "Schedule",
    "Score",
    "Sensitivity",
    "Shares",
    "Size",
    "Type",
    "Uniform",
    "Unstructured",
    "Weight",
    "entries_of",
    "reestimate_batch_norm",
    "report",
]
