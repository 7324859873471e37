"""What makes networks sparse, and what says how sparse they are."""

from ppkernels.sparsity.adaptive_alpha import AdaptiveAlpha, AlphaRecord
from ppkernels.sparsity.report import LayerReport, Report, report

__all__ = ["AdaptiveAlpha", "AlphaRecord", "LayerReport", "Report", "report"]
