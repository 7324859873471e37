"""Small Triton kernels with known code, for test_gpu_static.py. Importing this imports Triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["numel"])
def products(x, out, numel, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT products an element, and a masked last block."""
    start = tl.program_id(0) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        value = tl.load(x + offsets)
        product = value
        for _ in tl.static_range(COUNT):
            product = product * value
        tl.store(out + offsets, product)
    else:
        value = tl.load(x + offsets, mask=offsets < numel)
        tl.store(out + offsets, value * value, mask=offsets < numel)


@triton.jit(do_not_specialize=["numel"])
def masked(x, out, numel, BLOCK: tl.constexpr):
    """Every block has a mask of unknown length: one element at a time."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + offsets, mask=offsets < numel)
    tl.store(out + offsets, value + 1.0, mask=offsets < numel)


@triton.jit(do_not_specialize=["numel"])
def normalized(x, out, numel, BLOCK: tl.constexpr):
    """All values of a block are kept until their sum is known."""
    offsets = tl.arange(0, BLOCK)
    value = tl.load(x + offsets)
    tl.store(out + offsets, value * tl.sum(value))


@triton.jit
def product_of_matrices(a, b, out, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a + rows * SIZE + columns), tl.load(b + rows * SIZE + columns))
    tl.store(out + rows * SIZE + columns, product)
