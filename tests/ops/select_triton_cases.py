"""Tests of the Triton kernels of the selection, run in a process of their own.

With TRITON_INTERPRET=1 they run on CPU tensors in Triton's interpreter, else on the current GPU.
The interpreter must be chosen before triton is imported, hence the process, which
test_select_triton.py starts, and a name that pytest does not collect by itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from ppkernels.ops.select import gpu, reference
from ppkernels.ops.select.keys import key_of

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}
# More than a block, none, few.
SIZES = (4099, 0, 37)


@pytest.fixture(autouse=True)
def _silence_numpy():
    # The interpreter computes discarded lanes too, and numpy would warn of their overflow.
    with np.errstate(all="ignore"):
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).to(DEVICE)


def random_mask(*shape: int, share: float = 0.6) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share).to(DEVICE)


def words_of(mask: Tensor | None) -> Tensor:
    """A mask's words by NumPy; none for None."""
    if mask is None:
        return torch.empty(0, dtype=torch.uint8, device=DEVICE)
    flat = mask.cpu().contiguous().numpy().reshape(-1)
    return torch.from_numpy(np.packbits(flat, bitorder="little")).to(DEVICE)


def select(
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    alphas: Sequence[float] | float = 1.0,
    within: Sequence[Tensor] = (),
) -> tuple[list[Tensor], int]:
    """The words by the kernels, with nothing written beside them, and the first NaN."""
    alphas = [alphas] * len(tensors) if isinstance(alphas, float) else list(alphas)
    sizes = [(tensor.numel() + 7) // 8 for tensor in tensors]
    buffers = [torch.full((n + 64,), 0xA5, dtype=torch.uint8, device=DEVICE) for n in sizes]
    words = [buffer[32 : 32 + n] for buffer, n in zip(buffers, sizes, strict=True)]
    first_nan = gpu.topk_bits_(words, tensors, counts, alphas, within)
    assert (first_nan.dtype, first_nan.shape) == (torch.int64, ())
    for buffer, n in zip(buffers, sizes, strict=True):
        assert (buffer[:32] == 0xA5).all()
        assert (buffer[32 + n :] == 0xA5).all()
    return words, int(first_nan)


def check(
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    alphas: Sequence[float] | float = 1.0,
    within: Sequence[Tensor] = (),
) -> None:
    """The words are those of the reference."""
    words, first_nan = select(tensors, counts, alphas, within)
    alphas = [alphas] * len(tensors) if isinstance(alphas, float) else alphas
    expected, nan = reference.topk_bits(tensors, counts, alphas, within)
    assert first_nan == int(nan) == -1
    for i, (found, exact) in enumerate(zip(words, expected, strict=True)):
        assert torch.equal(found, exact), f"tensor {i}"


# ---- keys


@triton.jit
def _key_kernel(x, keys, alpha, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(keys + offsets, key_of(tl.load(x + offsets), tl.load(alpha), TYPE, 64))


@pytest.mark.parametrize("alpha", [1.0, 2.3, 1e306])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logarithms_are_those_of_the_reference(dtype, alpha):
    """Bit for bit: of numbers of all sizes, of all half numbers, and of special values."""
    integers, block = INTEGERS[dtype.itemsize], 1 << 15
    if dtype.itemsize == 2:
        x = torch.arange(block).to(torch.int16).view(dtype)
    else:
        random = torch.Generator().manual_seed(0)
        ends = torch.iinfo(integers)
        drawn = torch.randint(ends.min, ends.max, (block,), dtype=integers, generator=random)
        x = drawn.view(dtype)
        near = torch.rand(block // 4, dtype=dtype, generator=random) + 0.5
        x[: block // 4], x[-8:] = near, 2.0 ** torch.arange(-4, 4).to(dtype)
        x[-12:-8] = torch.tensor([0.0, -0.0, math.inf, -math.inf], dtype=dtype)
        x[-13] = math.ulp(0.0) if dtype is torch.float64 else 2.0**-149
    x = x.to(DEVICE)
    keys = torch.empty(block, dtype=torch.int64, device=DEVICE)
    exponent = torch.tensor(alpha, dtype=torch.float64, device=DEVICE)
    options = {"BLOCK": block // 8, "enable_fp_fusion": False}
    _key_kernel[(8,)](x.view(integers), keys, exponent, TYPES[dtype], **options)
    exact = reference.keys(x, alpha, [alpha, 0.0])
    is_number = ~x.isnan()
    back = torch.where(keys < 0, keys ^ (2**63 - 1), keys).view(torch.float64)
    assert torch.equal(back[is_number], exact[is_number])
    assert back[~is_number].isnan().all()


# ---- against the reference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[1000], [801, 0, 37]], ids=["together", "each"])
def test_one_alpha(counts, dtype):
    tensors = [normal(n, dtype=dtype, seed=n) for n in SIZES]
    check(tensors, counts, 1.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[1000], [801, 0, 5]], ids=["together", "each"])
def test_several_alpha(counts, dtype):
    tensors = [normal(n, dtype=dtype, seed=n) for n in SIZES]
    check(tensors, counts, [1.0, 2.0, 1.25])


@pytest.mark.parametrize("alphas", [[2.0] * 4, [1.0, 1.5, 2.0, 1.5]], ids=["one", "several"])
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[2:]], ids=len)
def test_several_dtypes(dtypes, alphas):
    tensors = [normal(301, dtype=dtype, seed=i) for i, dtype in enumerate(dtypes)]
    # The same values in all of them are ties, where they hold them.
    tensors = [torch.cat([t, torch.tensor([0.5, 1.0, 2.0, 0.0]).to(t)]) for t in tensors]
    check(tensors, [200 * len(dtypes)], alphas[: len(dtypes)])


def test_as_on_amd(monkeypatch):
    """Narrower digits, of which there are more."""
    monkeypatch.setattr(gpu, "is_amd", lambda: True)
    check([normal(501)], [100])
    check([normal(501), normal(301, seed=1)], [333], [1.0, 1.5])


@pytest.mark.parametrize("key", [15, 31, 63, 64])
@pytest.mark.parametrize("for_amd", [False, True])
def test_digits_are_all_bits_of_a_key(key, for_amd):
    digits = gpu.digits_of(key, for_amd)
    assert sum(bits for _, bits in digits) == key
    assert all(low == shift + bits for (low, _), (shift, bits) in pairwise(digits))
    assert digits[-1][0] == 0
    assert gpu.bins_of(key, for_amd) <= (256 if for_amd else 2048)


def test_with_counts_of_their_own_exponents_do_not_matter():
    near = torch.tensor([1e-300, math.nextafter(1e-300, 1)], dtype=torch.float64)
    check([near, near.clone()], [1, 1], [1.0, 2.0])


def test_more_tensors_than_are_looked_through_at_once(monkeypatch):
    monkeypatch.setattr(gpu, "SEARCHED", 4)
    check([normal(2, dtype=torch.float16, seed=i) for i in range(9)], [7])


# ---- ties


@pytest.mark.parametrize("alphas", [[1.0, 1.0, 1.0], [1.0, 1.5, 1.5]], ids=["one", "several"])
@pytest.mark.parametrize("count", [4097, 5003])
def test_all_equal(count, alphas):
    """Of 1 and its powers; the first are kept."""
    tensors = [torch.ones(n, device=DEVICE) for n in (4100, 900, 20)]
    check(tensors, [count], alphas)


@pytest.mark.parametrize("dtype", DTYPES[::3], ids=str)
def test_ties(dtype):
    """Five values, over several blocks and tensors; together and each."""
    tensors = [(normal(n, seed=n) * 1.5).round().to(dtype) for n in (4100, 301)]
    check(tensors, [1234])
    check(tensors, [1234], [1.0, 2.0])
    check(tensors, [2000, 5])


def test_nine_tenths_are_zero():
    weight = normal(5000) * random_mask(5000, share=0.1)
    for count in (499, 3000):
        check([weight, -weight[:1000]], [count])


# ---- special values and numbers of entries


@pytest.mark.parametrize("alphas", [[1.0, 1.0], [1.0, 3.0]], ids=["one", "several"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, alphas):
    info = torch.finfo(dtype)
    smallest = info.tiny * info.eps
    numbers = [0.0, -0.0, math.inf, -math.inf, info.max, -info.max, info.tiny, smallest]
    numbers += [-smallest, 1.0, -1.0, info.tiny * 3, smallest * 3]
    tensors = [torch.tensor(numbers, dtype=torch.float64).to(dtype).to(DEVICE)] * 2
    for count in (9, 23):
        check(tensors, [count], alphas)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan(dtype):
    tensors = [normal(n, dtype=dtype) for n in (100, 4099, 37)]
    tensors[1][4098] = tensors[2][0] = math.nan
    assert select(tensors, [0])[1] == 1
    tensors[1][4098] = 1.0
    assert select(tensors, [1, 2, 3], [1.0, 2.0, 3.0])[1] == 2


@pytest.mark.parametrize("alphas", [[1.0] * 4, [1.0, 1.0, 1.0, 2.0]], ids=["one", "several"])
def test_within(alphas):
    tensors = [normal(n, seed=n) for n in (4099, 16, 0, 37)]
    masks = [random_mask(4099), None, None, random_mask(37)]
    allowed = [int(mask.sum()) if mask is not None else 16 for mask in (masks[0], None, masks[3])]
    tensors[0][~masks[0]] = math.nan  # not looked at
    within = [words_of(mask) for mask in masks]
    for count in (1000, sum(allowed)):
        check(tensors, [count], alphas, within)
    check(tensors, [allowed[0], 0, 0, 3], alphas, within)
    # More than there are: all of them, and nothing behind them.
    words, _ = select(tensors, [5000], alphas, within)
    full = torch.ones(16, dtype=torch.bool)
    for found, mask in zip(words, (masks[0], full, full[:0], masks[3]), strict=True):
        assert torch.equal(found, words_of(mask))


def test_none_and_all():
    for alphas in (1.0, [1.0, 2.0, 1.0]):
        tensors = [normal(n) for n in SIZES]
        for count in (0, sum(SIZES)):
            check(tensors, [count], alphas)
    check([normal(0), normal(0)], [0])
    check([normal(0), normal(0)], [0, 0], [1.0, 2.0])
    check([torch.zeros((), device=DEVICE)], [1])


# ---- shapes and addresses

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
    """Ties among them, which are broken in row-major order."""
    for dtype in DTYPES[::2]:
        weight = LAYOUTS[layout]((normal(5000) * 8).round().to(dtype))
        within = words_of(random_mask(*weight.shape)) if weight.dim() else words_of(None)
        check(
            [weight, normal(9, dtype=dtype)], [weight.numel() // 3], 1.0, [within, words_of(None)]
        )


# ---- what only hardware can show


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_nothing_waits_and_nothing_compiles_again():
    tensors, words = [normal(10_000), normal(77).t()], [words_of(random_mask(10_000))] * 2
    words[1] = words_of(random_mask(77))
    compiled: list[object] = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    torch.cuda.set_sync_debug_mode("error")
    try:
        for alphas, count in (([1.0, 2.0], 1000), ([1.5, 1.25], 3), ([3.0, 1.5], 9_999)):
            out = [torch.empty_like(each) for each in words]
            gpu.topk_bits_(out, tensors, [count], alphas, [])
            gpu.topk_bits_(out, tensors, [count // 2, 5], alphas, words)
            triton.knobs.runtime.jit_post_compile_hook = lambda **kw: compiled.append(kw)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
        torch.cuda.set_sync_debug_mode("default")
    assert not compiled


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_more_elements_than_fit_into_32_bits():
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 4 * numel:
        pytest.skip(f"needs {4 * numel / 1e9:.0f} GB of free GPU memory")
    weight = torch.full((numel,), 0.5, dtype=torch.float16, device=DEVICE)
    weight[-7] = 2.0
    words = torch.empty((numel + 7) // 8, dtype=torch.uint8, device=DEVICE)
    kept = 2**31 + 17
    assert gpu.topk_bits_([words], [weight], [kept], [1.0], []) == -1
    expected = torch.zeros_like(words)
    expected[: (kept - 1) // 8] = 255
    assert torch.equal(words[:-600], expected[:-600])
    found = np.unpackbits(words[-600:].cpu().numpy(), bitorder="little")
    start = (numel + 7) // 8 * 8 - 4800
    assert found[: kept - 1 - start].all()
    assert found[kept - 1 - start :].nonzero()[0].tolist() == [numel - 7 - kept + 1]
