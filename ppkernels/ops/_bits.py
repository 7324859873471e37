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
    """The bool tensor [..., *shape] that words [..., W] stand for; what is left over is not read.

    Dimensions in front of W are a batch of masks.
    """
    entries = (words.unsqueeze(-1) & each_bit(words.device)) != 0  # [..., W, 8]
    return entries.flatten(-2)[..., : math.prod(shape)].reshape((*words.shape[:-1], *shape))


def kept(tensor: Tensor, words: Tensor) -> Tensor:
    """``tensor`` where its bit is set, and +0 elsewhere, whatever stands there."""
    return torch.where(unpacked(words, tensor.shape), tensor, 0.0)
