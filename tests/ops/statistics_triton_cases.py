"""Tests of the Triton kernels of op `statistics`, run in a process of their own.

With TRITON_INTERPRET=1 they run on CPU tensors in Triton's interpreter, else on the current GPU.
The interpreter must be chosen before triton is imported, hence the process, which
test_statistics_triton.py starts, and a name that pytest does not collect by itself.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import triton
from torch import Tensor

from ppkernels.ops.power import gpu as power
from ppkernels.ops.statistics import gpu, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What a sum may be off by, as a share of the sum of the sizes: it is taken in float64.
SHARE = 2.0**-47
EPSILONS = (1e-3, 0.1, 1.0)


@pytest.fixture(autouse=True)
def _silence_numpy():
    # NaN and infinities are meant, and discarded lanes are computed too.
    with np.errstate(all="ignore"):
        yield


def exponent(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=DEVICE)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).to(DEVICE)


def random_mask(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6).to(DEVICE)


def words_of(mask: Tensor) -> Tensor:
    """The words by NumPy."""
    flat = mask.cpu().contiguous().numpy().reshape(-1)
    return torch.from_numpy(np.packbits(flat, bitorder="little")).to(DEVICE)


def check(
    weight: Tensor,
    alpha: float = 1.0,
    epsilons: Sequence[float] = EPSILONS,
    bins: int = 0,
    ends: tuple[float, float] = (0.0, 1.0),
    mask: Tensor | None = None,
) -> None:
    """The statistics are those of the θ that op `power` gives, sums within `SHARE`."""
    words = None if mask is None else words_of(mask)
    moments, counts = gpu.statistics(weight, exponent(alpha), epsilons, bins, *ends, words)
    assert (moments.dtype, moments.shape) == (torch.float64, (5,))
    assert (counts.dtype, counts.shape) == (torch.int64, (2 + len(epsilons) + bins,))
    theta = power.power(weight, exponent(alpha))
    exact, numbers = reference.statistics(theta, exponent(1), epsilons, bins, *ends, words)
    if INTERPRETED:
        assert torch.equal(counts, numbers)
    else:  # two kernels need not contract the same products and sums
        assert (counts - numbers).abs().max() <= (0 if alpha == 1 else 2)
    rtol = 0 if INTERPRETED or alpha == 1 else 2 * torch.finfo(weight.dtype).eps
    torch.testing.assert_close(moments[:2], exact[:2], rtol=rtol, atol=0, equal_nan=True)
    if not exact.isfinite().all():
        torch.testing.assert_close(moments, exact, rtol=0, atol=0, equal_nan=True)
        return
    x = theta.double()[() if mask is None else mask].flatten().tolist()
    sums = [math.fsum(x), math.fsum(map(abs, x)), math.fsum(y * y for y in x)]
    for found, total, sizes in zip(moments[2:].tolist(), sums, [sums[1], *sums[1:]], strict=True):
        assert abs(found - total) <= (SHARE + rtol) * sizes


# None, more than a word, around a program's 2048 elements, and several programs.
SIZES = (0, 9, 2048, 2049, 5000)


@pytest.mark.parametrize("alpha", [1.0, 1.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(dtype, alpha):
    for size in SIZES:
        check(normal(size, dtype=dtype), alpha, bins=20, ends=(-1.0, 2.0))


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(dtype, alpha):
    weight, mask = normal(5000, dtype=dtype), random_mask(5000)
    weight[~mask] = math.nan
    check(weight, alpha, bins=20, ends=(-1.0, 2.0), mask=mask)
    check(weight, alpha, mask=torch.zeros_like(mask))


@pytest.mark.parametrize("bins", [1, 100, 128, 129, 512, 1100])
def test_bins(bins, monkeypatch):
    """More than a program takes; also by fewer bins a program, as on AMD."""
    weight = normal(2500)
    check(weight, bins=bins, ends=(-0.3, 1.7))
    monkeypatch.setattr(gpu, "is_amd", lambda: True)
    check(weight, 1.5, bins=bins, ends=(-0.3, 1.7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges_of_bins(dtype):
    """Both ends are inside, the upper one in the last bin; what lies beyond is in no bin."""
    below, above = -torch.finfo(dtype).tiny, 1 + torch.finfo(dtype).eps
    numbers = [0.0, -0.0, below, above, 1.0, 0.25, 0.5, 0.75, math.inf, -math.inf, 7.0, -7.0]
    weight = torch.tensor(numbers, dtype=dtype, device=DEVICE)
    check(weight, bins=4)
    _, counts = gpu.statistics(weight, exponent(1), (), 4, 0.0, 1.0, None)
    assert counts[2:].tolist() == [2, 1, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_epsilons(dtype):
    """Compared as the numbers that they are, not rounded to the dtype."""
    info = torch.finfo(dtype)
    tiny = info.tiny if INTERPRETED and dtype is torch.bfloat16 else info.tiny * info.eps
    numbers = [0.0, tiny, -2 * tiny, 0.1, -0.1, 1.0, info.max, -info.max, math.inf]
    weight = torch.tensor(numbers, dtype=torch.float64).to(dtype).to(DEVICE)
    near = [math.nextafter(1.0, end) for end in (0.0, 2.0)]
    tenth = float(weight[3])
    check(weight, epsilons=(0.0, -1.0, 1e-320, tiny, 2 * tiny, 0.1, tenth, 1.0, *near))
    check(weight, epsilons=(float(info.max), 1e39, 1e300, math.inf, -math.inf))


def test_limits_are_rounded_up():
    assert gpu.rounded_up(0.1, torch.float64) == 0.1
    for limit in (0.1, 0.3, 1e-60, -0.1, 1.0, 1e39):
        rounded = gpu.rounded_up(limit, torch.bfloat16)
        assert rounded >= limit
        assert rounded == np.float32(rounded)
        assert float(np.nextafter(np.float32(rounded), np.float32(-math.inf))) < limit


def test_limits_do_not_depend_on_torchs_defaults():
    expected = gpu.rounded_up(0.01, torch.float32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert gpu.rounded_up(0.01, torch.float32) == expected
    finally:
        torch.set_default_dtype(before)


def test_nan_and_infinities():
    weight = normal(5000)
    weight[4321] = math.inf
    check(weight, 1.5)
    weight[17] = -math.inf
    check(weight, 1.5)
    weight[33] = weight[4999] = math.nan
    check(weight, 1.5, bins=10)
    moments, counts = gpu.statistics(weight, exponent(1.5), (), 0, 0.0, 1.0, None)
    assert moments.isnan().all()
    assert counts.tolist() == [5000, 2]


def test_extremes_that_are_zeros_have_no_sign():
    for numbers in ([-0.0], [0.0, -0.0], [-0.0, 0.0]):
        weight = torch.tensor(numbers, device=DEVICE)
        moments, _ = gpu.statistics(weight, exponent(1), (), 0, 0.0, 1.0, None)
        assert not moments.signbit().any()


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
    weight = LAYOUTS[layout](normal(5000))
    check(weight, bins=7)
    check(weight, mask=random_mask(*weight.shape))


def test_words_of_another_size_are_refused():
    with pytest.raises(RuntimeError, match="statistics: words must be a contiguous uint8 tensor"):
        gpu.statistics(normal(17), exponent(1), (), 0, 0.0, 1.0, words_of(random_mask(25)))


def test_many_partial_results(monkeypatch):
    monkeypatch.setattr(gpu, "LANES", 2)
    check(normal(9000))


# ---- what only hardware can show


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_nothing_waits_and_nothing_compiles_again():
    weight, words = normal(10_000), words_of(random_mask(10_000))
    compiled: list[object] = []
    hook = triton.knobs.runtime.jit_post_compile_hook
    torch.cuda.set_sync_debug_mode("error")
    try:
        for alpha, epsilons, bins in ((1.5, (0.1,), 20), (2.0, (), 300), (7.25, EPSILONS, 1000)):
            for a in (
                torch.tensor(alpha, dtype=torch.float64),
                torch.full_like(exponent(1), alpha),
            ):
                gpu.statistics(weight, a, epsilons, bins, 0.0, alpha, None)
                gpu.statistics(weight, a, epsilons, bins, 0.0, alpha, words)
            triton.knobs.runtime.jit_post_compile_hook = lambda **kw: compiled.append(kw)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
        torch.cuda.set_sync_debug_mode("default")
    assert not compiled


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_more_elements_than_fit_into_32_bits():
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 3 * numel:
        pytest.skip(f"needs {3 * numel / 1e9:.0f} GB of free GPU memory")
    weight = torch.full((numel,), 0.5, dtype=torch.float16, device=DEVICE)
    weight[-1] = -2.0
    moments, counts = gpu.statistics(weight, exponent(1), (1.0,), 2, 0.0, 1.0, None)
    assert moments.tolist() == [-2.0, 0.5, numel / 2 - 2.5, numel / 2 + 1.5, numel / 4 + 3.75]
    assert counts.tolist() == [numel, 0, numel - 1, 0, numel - 1]
