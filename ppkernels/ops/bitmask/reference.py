"""Masks of one bit an entry in pure PyTorch: the specification of every other implementation.

A mask is its ``words``: 1-dim uint8, one bit for each entry of a shape in row-major order; entry i
is bit i % 8 of byte i // 8. The bits behind the last entry are 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ppkernels.ops._bits import each_bit, kept, unpacked


def pack_bits(mask: Tensor) -> Tensor:
    """The words of a bool tensor."""
    entries = torch.nn.functional.pad(mask.reshape(-1), (0, -mask.numel() % 8))
    each = entries.view(-1, 8) * each_bit(mask.device)  # [W, 8]
    return each.sum(1, dtype=torch.uint8)  # [W]


def unpack_bits(words: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor of ``shape`` that the words stand for."""
    return unpacked(words, shape)


def count_bits(words: Tensor) -> Tensor:
    """How many bits are set, 0-dim int64."""
    return unpacked(words, (8 * words.numel(),)).sum()


def apply_mask(weight: Tensor, words: Tensor) -> Tensor:
    """``weight`` where its bit is set, and 0 elsewhere."""
    return kept(weight, words)
