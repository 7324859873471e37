"""The bits of a mask's words in pure PyTorch, for the references of the rooms.

A mask is its ``words``: 1-dim uint8, one bit for each entry of a shape in row-major order; entry i
is bit i % 8 of byte i // 8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def each_bit(device: torch.device) -> Tensor:
    """1, 2, 4, ..., 128: uint8 [8]."""
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)


def unpacked(words: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor of ``shape`` that the words stand for; bits behind its end are not read."""
    entries = (words.unsqueeze(1) & each_bit(words.device)) != 0  # [W, 8]
    return entries.view(-1)[: math.prod(shape)].view(shape)
