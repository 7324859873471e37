"""What makes networks sparse, and what says how sparse they are."""

from ppkernels.sparsity.adaptive_alpha import AdaptiveAlpha, AlphaRecord

__all__ = ["AdaptiveAlpha", "AlphaRecord"]
