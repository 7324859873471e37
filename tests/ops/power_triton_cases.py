"""Tests of the Triton kernels of op `power`, run in a process of their own.
Longer than 350 lines: one process costs seconds to start, so all cases share it.

With TRITON_INTERPRET=1 they run on CPU tensors in Triton's interpreter, else on the current GPU.
The interpreter must be chosen before triton is imported, hence the process, which
test_power_triton.py starts, and a name that pytest does not collect by itself.
"""

from __future__ import annotations

import math
import os

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from ppkernels.ops.power import gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ALPHAS = (1.0, 1.1, 1.25, 1.5, 2.0, 2.7, 3.0, 4.0, 8.0)
# Where the largest errors were found among 210 random exponents.
HARDEST = (2.6769477328066635, 2.900672338661497, 7.099375636850165)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# The stated errors, in units of the last place of the exact value.
MAX_ULP = {torch.float32: 1.5, torch.float64: 2.0}
MAX_ULP_SCALED = {torch.float32: 2.0, torch.float64: 2.0}


@pytest.fixture(autouse=True)
def _silence_numpy():
    # The interpreter computes discarded lanes too, and numpy would warn of their overflow.
    with np.errstate(all="ignore"):
        yield


@pytest.fixture
def large_blocks(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr(gpu, "BLOCK_BYTES", 1 << 20)


def exponent(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, device=DEVICE)


def single_samples() -> np.ndarray:
    """Random bits, subnormals, numbers near 1, powers of two and their neighbours, and weights."""
    random = np.random.default_rng(0)
    bits = random.integers(1, 0x7F800000, 150_000, dtype=np.uint32).view(np.float32)
    subnormal = random.integers(1, 1 << 23, 10_000, dtype=np.uint32).view(np.float32)
    near_one = 1 + random.uniform(-0.5, 0.5, 40_000) * 2.0 ** -random.integers(0, 23, 40_000)
    powers = np.exp2(np.arange(-149.0, 128.0)).astype(np.float32)
    weights = np.abs(random.normal(0, 0.1, 40_000))
    largest = np.finfo(np.float32).max
    parts = (bits, subnormal, near_one, powers, np.nextafter(powers, np.float32(0)), weights)
    values = np.concatenate([*parts, np.nextafter(powers, largest), [largest]]).astype(np.float32)
    values = values[values != 0]
    return values * random.choice(np.float32([-1, 1]), values.size)


def ulps(result: torch.Tensor, exact: np.ndarray) -> float:
    """The largest error in ULP where the exact value is a normal number of the result's dtype."""
    info = torch.finfo(result.dtype)
    digits = round(-math.log2(info.eps))
    normal = (np.abs(exact) >= info.tiny) & (np.abs(exact) <= info.max)
    ulp = np.exp2(np.floor(np.log2(np.abs(exact[normal]))) - digits)
    error = np.abs(result.cpu().double().numpy()[normal] - exact[normal]) / ulp
    return float(error.max(initial=0))


def subnormal_error(result: torch.Tensor, exact: np.ndarray) -> float:
    """The largest error, in multiples of the smallest number, where the exact one is subnormal."""
    info = torch.finfo(result.dtype)
    below = np.abs(exact) < info.tiny
    error = np.abs(result.cpu().double().numpy()[below] - exact[below])
    return float(error.max(initial=0) / (info.tiny * info.eps))


# ---- the stated error


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("alpha", [*ALPHAS, *HARDEST])
def test_single_precision_error(alpha):
    values = single_samples()
    weight, exact_weight = torch.from_numpy(values).to(DEVICE), values.astype(np.float64)
    size, ones = np.abs(exact_weight), torch.ones(values.size, device=DEVICE)
    a = exponent(alpha)

    theta, exact = gpu.power(weight, a), np.copysign(size**alpha, exact_weight)
    assert ulps(theta, exact) <= (0.5 if alpha in (1, 2) else MAX_ULP[torch.float32])
    assert subnormal_error(theta, exact) <= 1.0
    exact = np.copysign(size ** (1 / alpha), exact_weight)
    assert ulps(gpu.inverse_power(weight, a), exact) <= MAX_ULP[torch.float32]
    exact = np.copysign(size ** (alpha / 1.7), exact_weight)
    assert ulps(gpu.rebase(weight, a, exponent(1.7)), exact) <= MAX_ULP[torch.float32]
    slope = alpha * size ** (alpha - 1)
    assert ulps(gpu.power_backward(ones, weight, a), slope) <= MAX_ULP_SCALED[torch.float32]
    curvature = alpha * (alpha - 1) * np.copysign(size ** (alpha - 2), exact_weight)
    result = gpu.power_double_backward(ones, ones, weight, a)
    assert ulps(result, curvature) <= MAX_ULP_SCALED[torch.float32]


@pytest.mark.parametrize("alpha", ALPHAS)
def test_double_precision_error(alpha):
    random = np.random.default_rng(1)
    near_one = 1 + random.uniform(-0.5, 0.5, 100) * 2.0 ** -random.integers(0, 52, 100)
    bits = random.integers(1, 0x7FF0000000000000, 200).view(np.float64)
    subnormal = random.integers(1, 1 << 52, 20).view(np.float64)
    values = np.concatenate([near_one, bits, subnormal, [5e-324, 1.0, np.finfo(float).max]])
    weight = torch.from_numpy(values).to(DEVICE)
    a = exponent(alpha)
    rows = (
        (gpu.power(weight, a), 1.0, alpha, MAX_ULP),
        (gpu.inverse_power(weight, a), 1.0, 1 / alpha, MAX_ULP),
        (gpu.power_backward(torch.ones_like(weight), weight, a), alpha, alpha - 1, MAX_ULP_SCALED),
    )
    with mpmath.workprec(200):
        for result, scale, e, bound in rows:
            for x, y in zip(values.tolist(), result.tolist(), strict=True):
                exact = mpmath.mpf(scale) * mpmath.mpf(x) ** mpmath.mpf(e)
                if 2.0**-1022 <= exact <= np.finfo(float).max:
                    ulp = mpmath.mpf(2) ** (mpmath.floor(mpmath.log(exact, 2)) - 52)
                    assert abs(y - exact) <= bound[torch.float64] * ulp, (x, e, scale)


@triton.jit
def _short_power_kernel(x, out, alpha, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    power = gpu.signed_power(tl.load(x + offsets), tl.load(alpha), False)
    tl.store(out + offsets, power)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_error_of_the_short_formula_of_half_types(alpha):
    block, blocks = 1 << 15, 7
    values = single_samples()[: blocks * block]
    assert values.size == blocks * block
    weight = torch.from_numpy(values).to(DEVICE)
    out = torch.empty_like(weight)
    _short_power_kernel[(blocks,)](weight, out, exponent(alpha), BLOCK=block)
    exact = np.abs(values.astype(np.float64)) ** alpha
    # So close to the largest float32, 2^-16 may be infinite; half types have rounded it to inf.
    largest = (1 - 2.0**-16) * torch.finfo(torch.float32).max
    result, below = out.abs().cpu().double().numpy(), exact <= largest
    normal = below & (exact >= torch.finfo(torch.float32).tiny)
    assert np.abs(result[normal] / exact[normal] - 1).max() <= 2.0**-16
    assert (result[~below] >= (1 - 2.0**-16) * largest).all()


@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_half_value(dtype, alpha):
    weight = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    # Triton's interpreter also takes subnormal bfloat16 for 0.
    smallest = torch.finfo(dtype).tiny if INTERPRETED and dtype is torch.bfloat16 else 0
    weight = weight[weight.isfinite() & (weight.abs() >= smallest)]
    exact = weight.double().numpy()
    size, signed = np.abs(exact), np.copysign(np.abs(exact) ** alpha, exact)
    # Triton's interpreter cuts float32 off where it should round to bfloat16; that the compiled
    # kernels round is tested on their code (bench.gpu_static), and here on a GPU.
    truncates = INTERPRETED and dtype is torch.bfloat16
    bound = 1.01 if truncates else 0.51

    weight = weight.to(DEVICE)
    assert ulps(gpu.power(weight, exponent(alpha)), signed) <= bound
    ones = torch.ones_like(weight)
    slope = gpu.power_backward(ones, weight, exponent(alpha))
    assert ulps(slope, alpha * size ** (alpha - 1)) <= bound
    if alpha == 1:
        assert torch.equal(gpu.power(weight, exponent(1)), weight)
        assert torch.equal(slope, ones)


# ---- special values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.0, 1.001, 1.5, 2.0, 3.3, 50.0, 1e6])
def test_special_values_of_the_power(dtype, alpha):
    weight = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, -1.0], dtype=dtype)
    weight, a = weight.to(DEVICE), exponent(alpha)
    for result in (
        gpu.power(weight, a),
        gpu.inverse_power(weight, a),
        gpu.rebase(weight, a, exponent(1.25)),
        gpu.rebase(weight, exponent(1.25), a),
    ):
        torch.testing.assert_close(result, weight, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(result.signbit()[:4], weight.signbit()[:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_one_is_the_identity(dtype):
    weight = torch.randn(3000, dtype=torch.float64).to(dtype).to(DEVICE)
    weight[:4] = torch.tensor([0.0, math.inf, -math.inf, math.nan], dtype=dtype)
    grad = torch.randn(3000, dtype=torch.float64).to(dtype).to(DEVICE)
    one = exponent(1.0)
    same = {"rtol": 0, "atol": 0, "equal_nan": True}
    for result in (
        gpu.power(weight, one),
        gpu.inverse_power(weight, one),
        gpu.rebase(weight, exponent(2.7), exponent(2.7)),
    ):
        torch.testing.assert_close(result, weight, **same)
    torch.testing.assert_close(gpu.power_backward(grad, weight, one), grad, **same)
    zeros = torch.zeros_like(weight)
    torch.testing.assert_close(gpu.power_double_backward(grad, grad, weight, one), zeros, **same)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [1.001, 1.5, 2.0, 2.5, 4.0])
def test_special_values_of_the_gradients(dtype, alpha):
    weight = torch.tensor([0.0, -0.0, 0.0, 0.0, math.inf, math.nan], dtype=dtype, device=DEVICE)
    grad = torch.tensor([1.0, -3.0, math.inf, math.nan, 1.0, 1.0], dtype=dtype, device=DEVICE)
    result = gpu.power_backward(grad, weight, exponent(alpha))
    assert (result[:2] == 0).all()
    assert not result[2:4].isfinite().any()  # loss scaling must see it
    assert result[4] == math.inf
    assert result[5].isnan()
    ones = torch.ones_like(grad)
    result = gpu.power_double_backward(grad, ones, weight, exponent(alpha))
    assert (result[:4] == 0).all()
    assert result[4] == (0.0 if alpha < 2 else 2.0 if alpha == 2 else math.inf)
    assert result[5].isnan()


def test_double_backward_against_the_formula():
    random = torch.Generator().manual_seed(0)
    h, g, weight = (torch.randn(2500, generator=random).to(DEVICE) for _ in range(3))
    for alpha in (1.3, 2.0, 3.7):
        second = alpha * (alpha - 1) * weight.double().abs() ** (alpha - 2) * weight.sign()
        result = gpu.power_double_backward(h, g, weight, exponent(alpha))
        torch.testing.assert_close(result.double(), h * g * second, rtol=5e-7, atol=0)


def test_an_exponent_below_one_ulp_of_one_is_seen():
    weight = torch.tensor([2.0**100], device=DEVICE)
    theta = gpu.power(weight, exponent(1 + 2.0**-26))
    assert theta.item() == pytest.approx(2.0 ** (100 + 100 * 2.0**-26), rel=1e-7)
    assert theta.item() > 2.0**100


def test_alpha_as_a_number_equals_alpha_on_the_device():
    weight = torch.randn(100, device=DEVICE)
    out = torch.full_like(weight, math.nan)
    bits = int(torch.tensor(1.3, dtype=torch.float64).view(torch.int64).item())
    gpu.signed_power_kernel[(1,)](weight, out, None, bits, None, 100, BLOCK=128)
    assert torch.equal(out, gpu.power(weight, exponent(1.3)))
    gpu.signed_power_kernel[(1,)](weight, out, None, None, bits, 100, BLOCK=128)
    assert torch.equal(out, gpu.inverse_power(weight, exponent(1.3)))


# ---- shapes, strides, addresses

LAYOUTS = {
    "empty": lambda t: t[:0],
    "scalar": lambda t: t[0],
    "one": lambda t: t[:1],
    "odd": lambda t: t[:3001],
    "unaligned": lambda t: t[1:2050],
    "transposed": lambda t: t[:2100].view(30, 70).t(),
    "channels_last": lambda t: (
        t[:2160].view(4, 6, 9, 10).contiguous(memory_format=torch.channels_last)
    ),
    "permuted": lambda t: t[:2160].view(4, 6, 9, 10).permute(2, 0, 3, 1),
    "columns": lambda t: t[:4000].view(40, 100)[:, 3:70],
    "every_second": lambda t: t[::2],
    "expanded": lambda t: t[:50].expand(40, 50),
    "size_one_dims": lambda t: t[:2000].view(1, 40, 1, 50),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    arrange = LAYOUTS[layout]
    weight = arrange(torch.linspace(-2, 2, 5000, dtype=torch.float64).to(dtype).to(DEVICE))
    plain = weight.clone(memory_format=torch.contiguous_format)
    a = exponent(1.5)
    expected = gpu.power(plain.flatten(), a).view(plain.shape)

    theta = gpu.power(weight, a)
    assert theta.stride() == torch.empty_like(weight).stride()
    assert torch.equal(theta, expected)
    grad = torch.ones((), dtype=dtype, device=DEVICE).expand(weight.shape)
    slope = gpu.power_backward(grad, weight, a)
    assert slope.stride() == torch.empty_like(weight).stride()
    flat_ones = torch.ones_like(plain).flatten()
    assert torch.equal(slope, gpu.power_backward(flat_ones, plain.flatten(), a).view(plain.shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 15, 511, 1024, 2049])
@pytest.mark.parametrize("shift", [0, 1])
def test_out_is_filled_and_nothing_beside_it(numel, shift, dtype):
    weight = torch.linspace(-2, 2, numel, dtype=torch.float64).to(dtype).to(DEVICE)
    buffer = torch.full((numel + 64,), math.nan, dtype=dtype, device=DEVICE)
    out = buffer[16 + shift : 16 + shift + numel]
    assert gpu.power_out(weight, exponent(2.5), out) is None
    assert torch.equal(out, gpu.power(weight, exponent(2.5)))
    assert buffer.isnan().sum() == 64


def test_out_in_other_layouts():
    weight = torch.randn(40, 40, device=DEVICE)
    theta = gpu.power(weight, exponent(1.5))
    rows = torch.full((80, 40), math.nan, device=DEVICE)
    gpu.power_out(weight, exponent(1.5), rows[::2])
    assert torch.equal(rows[::2], theta)
    assert rows[1::2].isnan().all()
    transposed = torch.full_like(weight, math.nan).t()
    gpu.power_out(weight, exponent(1.5), transposed)
    assert torch.equal(transposed, theta)
    in_place = weight.clone()
    gpu.power_out(in_place, exponent(1.5), in_place)
    assert torch.equal(in_place, theta)
    gpu.power_out(weight, exponent(1.5), weight.t())
    assert torch.equal(weight.t(), theta)


def test_out_may_overlap_the_weight():
    memory = torch.randn(5000, device=DEVICE)
    theta = gpu.power(memory[:-1], exponent(1.5))
    gpu.power_out(memory[:-1], exponent(1.5), memory[1:])
    assert torch.equal(memory[1:], theta)


def test_the_gradient_into_out():
    weight, grad = torch.randn(2, 40, 40, device=DEVICE).unbind()
    slope = gpu.power_backward(grad, weight, exponent(1.5))
    for out in (torch.empty_like(weight), torch.empty_like(weight).t(), weight.clone()):
        into = out if out.stride() != weight.stride() else out.copy_(weight)
        assert gpu.power_backward_out(grad, weight, exponent(1.5), into) is None
        assert torch.equal(into, slope)
    gpu.power_backward_out(grad, weight, exponent(1.5), grad)
    assert torch.equal(grad, slope)


# ---- masks


def random_mask(*shape: int) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.4).to(DEVICE)


def words_of(mask: torch.Tensor) -> torch.Tensor:
    """The words by NumPy."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little")).to(DEVICE)


def assert_same_bits(result: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(result.signbit() & ~result.isnan(), expected.signbit() & ~expected.isnan())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_selects(layout, dtype):
    values = torch.linspace(-2, 2, 5000, dtype=torch.float64)
    values[::7], values[3::11], values[5::13] = math.nan, math.inf, -0.0
    weight = LAYOUTS[layout](values.to(dtype).to(DEVICE))
    mask, a = random_mask(*weight.shape), exponent(1.5)
    grad = torch.where(mask, weight, -math.inf).flip(0) if weight.dim() else weight
    for result, every in (
        (gpu.power(weight, a, words_of(mask)), gpu.power(weight, a)),
        (gpu.power_backward(grad, weight, a, words_of(mask)), gpu.power_backward(grad, weight, a)),
        (
            gpu.power_double_backward(grad, grad, weight, a, words_of(mask)),
            gpu.power_double_backward(grad, grad, weight, a),
        ),
    ):
        assert result.stride() == torch.empty_like(weight).stride()
        assert_same_bits(result, torch.where(mask, every, 0.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("numel", [1, 7, 8, 9, 511, 1024, 2049, 4099])
def test_a_mask_and_out(numel, dtype):
    weight = torch.linspace(-2, 2, numel, dtype=torch.float64).to(dtype).to(DEVICE)
    mask, a = random_mask(numel), exponent(2.5)
    expected = torch.where(mask, gpu.power(weight, a), 0.0)
    for shift in (0, 1):
        buffer = torch.full((numel + 64,), math.nan, dtype=dtype, device=DEVICE)
        out = buffer[16 + shift : 16 + shift + numel]
        assert gpu.power_out(weight, a, out, words_of(mask)) is None
        assert_same_bits(out, expected)
        assert buffer.isnan().sum() == 64
    expected = torch.where(mask, gpu.power_backward(weight, weight, a), 0.0)
    gpu.power_backward_out(weight, weight, a, weight, words_of(mask))
    assert_same_bits(weight, expected)


def test_a_mask_and_out_in_another_layout():
    weight, mask, a = torch.randn(30, 41, device=DEVICE), random_mask(30, 41), exponent(1.5)
    expected = torch.where(mask, gpu.power(weight, a), 0.0)
    transposed = torch.full((41, 30), math.nan, device=DEVICE).t()
    gapped = torch.full((60, 41), math.nan, device=DEVICE)[::2]
    for out in (transposed, gapped):
        gpu.power_out(weight, a, out, words_of(mask))
        assert_same_bits(out, expected)


def test_words_of_another_size_are_refused():
    weight = torch.ones(17, device=DEVICE)
    message = "power: words must be a contiguous uint8 tensor of 3 bytes"
    with pytest.raises(RuntimeError, match=message):
        gpu.power(weight, exponent(1.5), words_of(random_mask(25)))
    with pytest.raises(RuntimeError, match=message):
        gpu.power(weight, exponent(1.5), torch.ones(3, dtype=torch.bool, device=DEVICE))


# ---- what only hardware can show


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_nothing_waits_and_no_value_of_alpha_compiles_again():
    weight, words = torch.randn(10_000, device=DEVICE), words_of(random_mask(10_000))
    compiled: list[object] = []
    torch.cuda.set_sync_debug_mode("error")
    hook = triton.knobs.runtime.jit_post_compile_hook
    try:
        for alpha in (1.5, 2.0, 7.25):
            gpu.power(weight, torch.tensor(alpha, dtype=torch.float64))
            gpu.power(weight, torch.full((), alpha, dtype=torch.float64, device=DEVICE))
            gpu.power(weight.view(100, 100).t(), torch.tensor(alpha, dtype=torch.float64), words)
            triton.knobs.runtime.jit_post_compile_hook = lambda **kw: compiled.append(kw)
    finally:
        triton.knobs.runtime.jit_post_compile_hook = hook
        torch.cuda.set_sync_debug_mode("default")
    assert not compiled


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_more_elements_than_fit_into_32_bits():
    numel = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 5 * numel:
        pytest.skip(f"needs {5 * numel / 1e9:.0f} GB of free GPU memory")
    weight = torch.full((numel,), 0.5, dtype=torch.float16, device=DEVICE)
    gpu.power_out(weight, exponent(2.0), weight)
    assert weight[-5000:].eq(0.25).all()
    assert weight[:5000].eq(0.25).all()
