"""How tensors lie in memory: what the rooms ask, the GPU launchers most of all."""

from __future__ import annotations

import torch
from torch import Tensor


def same_layout(value: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape have their elements in the same order in memory."""
    return all(
        mine == others
        for size, mine, others in zip(value.shape, value.stride(), other.stride(), strict=True)
        if size > 1
    )


def is_dense(value: Tensor) -> bool:
    """Whether the elements fill one piece of memory, each its own place, in any order."""
    expected = 1
    for stride, size in sorted(zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def laid_out_as(result: Tensor, out: Tensor) -> Tensor:
    """``result`` in the memory layout of ``out``, new memory that it goes into if need be."""
    return result if result.stride() == out.stride() else out.copy_(result)
