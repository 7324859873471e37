"""How tensors lie in memory: what the rooms ask, the GPU launchers most of all."""

from __future__ import annotations

import math

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


def as_rows(operand: Tensor) -> Tensor:
    """All leading dimensions as one, [..., K] as [M, K]; sizes of 0 too, which -1 does not take."""
    return operand.reshape(math.prod(operand.shape[:-1]), operand.shape[-1])


def laid_out_as(result: Tensor, out: Tensor) -> Tensor:
    """``result`` in the memory layout of ``out``, new memory that it goes into if need be."""
    return result if result.stride() == out.stride() else out.copy_(result)


def arranged_words(op: str, words: Tensor, layout: Tensor) -> Tensor:
    """A mask's words with bit m for the element at offset m of ``layout``, which is dense.

    The words themselves where that is row-major order. Nothing waits for the device.
    """
    size = (layout.numel() + 7) // 8
    fits = words.dtype == torch.uint8 and words.shape == (size,) and words.is_contiguous()
    if not fits or words.device != layout.device:
        raise RuntimeError(
            f"{op}: words must be a contiguous uint8 tensor of {size} bytes on {layout.device}, "
            f"one bit for each of {layout.numel()} entries, got {tuple(words.shape)} "
            f"{str(words.dtype).removeprefix('torch.')} on {words.device}"
        )
    if layout.is_contiguous():
        return words
    mask = torch.ops.ppkernels.unpack_bits(words, list(layout.shape))
    arranged = torch.empty_like(layout, dtype=torch.bool).copy_(mask)
    packed: Tensor = torch.ops.ppkernels.pack_bits(arranged.as_strided((layout.numel(),), (1,)))
    return packed
