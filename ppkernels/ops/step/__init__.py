"""The optimizer's step, plain or powered, over lists of tensors in one pass."""

from ppkernels.ops.step.op import adam_step_, sgd_step_

__all__ = ["adam_step_", "sgd_step_"]
