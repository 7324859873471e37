"""Selection of the largest weights, over one tensor or many."""

from ppkernels.ops.select.op import topk_mask

__all__ = ["topk_mask"]
