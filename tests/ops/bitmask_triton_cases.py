"""Tests of the Triton kernels of op `bitmask`, run in a process of their own.

With TRITON_INTERPRET=1 they run on CPU tensors in Triton's interpreter, else on the current GPU.
The interpreter must be chosen before triton is imported, hence the process, which
test_bitmask_triton.py starts, and a name that pytest does not collect by itself.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from ppkernels.ops.bitmask import gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# None, one, around a word, around a program's 4096 entries, and several programs.
SIZES = (0, 1, 7, 8, 9, 1003, 4095, 4096, 4097, 9001)


def random_mask(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=generator) < 0.4).to(DEVICE)


def words_of(mask: torch.Tensor) -> torch.Tensor:
    """The words by NumPy."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little")).to(DEVICE)


def every_bit_pattern(count: int, dtype: torch.dtype) -> torch.Tensor:
    """NaN, infinities and subnormals among them."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    ends = torch.iinfo(integers)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(ends.min, ends.max, (count,), dtype=integers, generator=generator)
    return bits.view(dtype).to(DEVICE)


@pytest.mark.parametrize("size", SIZES)
def test_pack_unpack_and_count(size):
    mask = random_mask(size)
    words = gpu.pack_bits(mask)
    assert words.dtype == torch.uint8
    assert torch.equal(words, words_of(mask))
    unpacked = gpu.unpack_bits(words, (size,))
    assert unpacked.dtype == torch.bool
    assert torch.equal(unpacked, mask)
    count = gpu.count_bits(words)
    assert (count.dtype, count.shape) == (torch.int64, ())
    assert count == mask.sum()


def test_unpack_reads_no_bits_behind_the_last_entry():
    words = torch.full((2,), 255, dtype=torch.uint8, device=DEVICE)
    assert gpu.unpack_bits(words, (3, 3)).shape == (3, 3)
    assert gpu.unpack_bits(words, (3, 3)).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_apply_keeps_the_bits(size, dtype):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    mask, weight = random_mask(size), every_bit_pattern(size, dtype)
    result = gpu.apply_mask(weight, words_of(mask))
    assert result.dtype == dtype
    expected = torch.where(mask, weight.view(integers), 0)
    assert torch.equal(result.view(integers), expected)


LAYOUTS = {
    "scalar": lambda t: t[0],
    "unaligned": lambda t: t[1:2050],
    "transposed": lambda t: t[:2100].view(30, 70).t(),
    "channels_last": lambda t: (
        t[:2160].view(4, 6, 9, 10).contiguous(memory_format=torch.channels_last)
    ),
    "columns": lambda t: t[:4000].view(40, 100)[:, 3:70],
    "every_second": lambda t: t[::2],
    "expanded": lambda t: t[:50].expand(40, 50),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    weight = LAYOUTS[layout](torch.linspace(-2, 2, 5000, device=DEVICE))
    mask = random_mask(*weight.shape)
    result = gpu.apply_mask(weight, words_of(mask))
    assert result.stride() == torch.empty_like(weight).stride()
    assert torch.equal(result, torch.where(mask, weight, 0.0))
    strided = LAYOUTS[layout](random_mask(5000))
    words = gpu.pack_bits(strided)
    assert torch.equal(words, words_of(strided))
    assert torch.equal(gpu.unpack_bits(words, strided.shape), strided)


@pytest.mark.parametrize("size", [1, 1003, 4096, 4097])
def test_nothing_beside_the_result_is_written(size):
    mask = random_mask(size)
    weight, words = every_bit_pattern(size, torch.float32).view(torch.int32), words_of(mask)
    grid, options = (4,), {"BLOCK": gpu.BLOCK_WORDS}
    for kernel, inputs, result in (
        (gpu.pack_kernel, (mask.view(torch.uint8),), words),
        (gpu.unpack_kernel, (words,), mask.view(torch.uint8)),
        (gpu.apply_kernel, (weight, words), torch.where(mask, weight, 0)),
    ):
        buffer = torch.full((len(result) + 64,), 3, dtype=result.dtype, device=DEVICE)
        kernel[grid](*inputs, buffer[32:], size, **options)
        assert torch.equal(buffer[32:-32], result)
        assert (buffer[:32] == 3).all()
        assert (buffer[-32:] == 3).all()


# ---- what only hardware can show


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_nothing_waits():
    mask, weight = random_mask(10_000), every_bit_pattern(10_000, torch.float32)
    words = gpu.pack_bits(mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gpu.apply_mask(weight, words)
        gpu.count_bits(words)
        gpu.unpack_bits(gpu.pack_bits(mask), (10_000,))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_more_elements_than_fit_into_32_bits():
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 6 * numel:
        pytest.skip(f"needs {6 * numel / 1e9:.0f} GB of free GPU memory")
    words = torch.full(((numel + 7) // 8,), 0b10, dtype=torch.uint8, device=DEVICE)
    weight = torch.ones((), dtype=torch.float16, device=DEVICE).expand(numel)
    result = gpu.apply_mask(weight, words)
    assert result[-4099:].tolist() == ([0.0, 1.0] + 6 * [0.0]) * 512 + [0.0, 1.0, 0.0]
    assert gpu.count_bits(words) == words.numel()
