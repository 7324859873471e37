"""Triton kernels of op `bitmask` and their launchers, for NVIDIA and AMD GPUs.

A program takes BLOCK words as a tile [BLOCK, 8] of entries: a word is loaded once, and its eight
entries are one row. Everything is done on integers, weights included, so that no value is rounded
or quieted. The launchers have the signatures of the op's schemas (op.py) and its contract; nothing
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppkernels.ops._tile import tile_bits, tile_offsets

# Words of a program: 4096 entries. Not tuned on hardware; results do not depend on it, and tests in
# Triton's interpreter, where a program costs about a millisecond, raise it.
BLOCK_WORDS = 512


def launch_choices() -> dict[str, int]:
    """What every launch fixes; the compiled code depends on it."""
    return {"BLOCK": BLOCK_WORDS, "num_warps": 4}


@triton.jit
def _entries(start, BLOCK: tl.constexpr):
    """Numbers of the entries of BLOCK words from word ``start`` on, [BLOCK, 8]."""
    return start * 8 + tile_offsets(BLOCK)


# Only the last block has a mask: one of unknown length would narrow every access to one element.


@triton.jit
def _load(values, entries, end, numel):
    """The values of a block of entries that ends at ``end``; 0 from entry ``numel`` on."""
    if end <= numel:
        return tl.load(values + entries)
    else:
        return tl.load(values + entries, mask=entries < numel, other=0)


@triton.jit
def _store(out, entries, block, end, numel):
    """Writes a block of entries that ends at ``end``, up to entry ``numel``."""
    if end <= numel:
        tl.store(out + entries, block)
    else:
        tl.store(out + entries, block, mask=entries < numel)


@triton.jit(do_not_specialize=["numel"])
def pack_kernel(mask, words, numel, BLOCK: tl.constexpr):
    """words [W] of the bytes ``mask`` [N]: bit set where the byte is not 0."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    entries = _entries(start, BLOCK)
    is_set = _load(mask, entries, (start + BLOCK) * 8, numel) != 0
    word = tl.sum(is_set.to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    offsets = start + tl.arange(0, BLOCK)
    tl.store(words + offsets, word.to(tl.uint8), mask=offsets * 8 < numel)


@triton.jit(do_not_specialize=["numel"])
def unpack_kernel(words, mask, numel, BLOCK: tl.constexpr):
    """Bytes 0 and 1 ``mask`` [N] of words [W]."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    entries = _entries(start, BLOCK)
    bits = tile_bits(words + start, (numel + 7) // 8 - start, 0, BLOCK)
    _store(mask, entries, bits.to(tl.uint8), (start + BLOCK) * 8, numel)


@triton.jit(do_not_specialize=["size"])
def count_kernel(words, counts, size, BLOCK: tl.constexpr):
    """counts[program] = bits set in the program's words; ``words`` has ``size`` bytes."""
    program = tl.program_id(0).to(tl.int64)
    start = program * BLOCK
    bits = tile_bits(words + start, size - start, 0, BLOCK)
    tl.store(counts + program, tl.sum(tl.sum(bits.to(tl.int32), axis=1), axis=0))


@triton.jit(do_not_specialize=["numel"])
def apply_kernel(weight, words, out, numel, BLOCK: tl.constexpr):
    """out [N] = weight [N], both as integers, where the bit is set, and 0 elsewhere."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    entries = _entries(start, BLOCK)
    bits = tile_bits(words + start, (numel + 7) // 8 - start, 0, BLOCK)
    block = _load(weight, entries, (start + BLOCK) * 8, numel)
    _store(out, entries, tl.where(bits, block, 0), (start + BLOCK) * 8, numel)


# ---- launchers


def pack_bits(mask: Tensor) -> Tensor:
    """The words of a bool tensor."""
    numel = mask.numel()
    words = mask.new_empty((numel + 7) // 8, dtype=torch.uint8)
    _launch(pack_kernel, words, mask.contiguous().view(torch.uint8), words, numel)
    return words


def unpack_bits(words: Tensor, shape: Sequence[int]) -> Tensor:
    """The bool tensor of ``shape`` that the words stand for."""
    mask = words.new_empty(shape, dtype=torch.bool)
    _launch(unpack_kernel, words, words, mask.view(torch.uint8), mask.numel())
    return mask


def count_bits(words: Tensor) -> Tensor:
    """How many bits are set, 0-dim int64."""
    counts = words.new_empty(triton.cdiv(words.numel(), BLOCK_WORDS), dtype=torch.int32)
    _launch(count_kernel, words, words, counts, words.numel())
    return counts.sum()


def apply_mask(weight: Tensor, words: Tensor) -> Tensor:
    """``weight`` where its bit is set, and 0 elsewhere."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    source = weight.contiguous()
    masked = torch.empty_like(source)
    _launch(
        apply_kernel, words, source.view(integers), words, masked.view(integers), weight.numel()
    )
    out = torch.empty_like(weight)
    return masked if masked.stride() == out.stride() else out.copy_(masked)


def _launch(kernel: Any, words: Tensor, *args: Any) -> None:
    """Runs ``kernel`` over all words of a mask."""
    if words.numel() == 0:
        return
    # A kernel goes to the current device, which need not be that of the tensors.
    with torch.cuda.device_of(words):
        grid = (triton.cdiv(words.numel(), BLOCK_WORDS),)
        kernel[grid](*args, **launch_choices())
