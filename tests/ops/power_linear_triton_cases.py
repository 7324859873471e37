"""Tests of the Triton kernels of op `power_linear`, run in a process of their own.

With TRITON_INTERPRET=1 they run on CPU tensors in Triton's interpreter, else on the current GPU;
test_power_linear_triton.py starts them. A result may err by twice what plain PyTorch (the reference
in the same dtype) errs, and a floor; both are compared with the reference in float64.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor

import ppkernels as pp
from ppkernels.ops.power import gpu as power_gpu
from ppkernels.ops.power_linear import gpu, model, reference, tiles

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SINGLE, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
# Dtypes of the input and of the weight.
DTYPES = [(SINGLE, SINGLE), (HALF, HALF), (BRAIN, BRAIN), (HALF, SINGLE), (BRAIN, SINGLE)]
# M, N, K: one of each; odd; whole tiles; more than a tile of each, and remainders.
SIZES = [(1, 1, 1), (5, 37, 50), (16, 64, 128), (70, 65, 33), (130, 130, 67), (2, 128, 600)]


@pytest.fixture(autouse=True)
def _silence_numpy():
    # The interpreter computes discarded lanes too, and numpy would warn of their overflow.
    with np.errstate(all="ignore"):
        yield


@pytest.fixture(autouse=True)
def _suit_the_interpreter(monkeypatch):
    # It has no products of bfloat16; on a GPU nothing is changed.
    types = {SINGLE: tl.float32, HALF: tl.float16, BRAIN: tl.float32}
    if INTERPRETED:
        monkeypatch.setattr(tiles, "dot_type", types.__getitem__)
        # A program costs about a millisecond there.
        monkeypatch.setattr(power_gpu, "BLOCK_BYTES", 1 << 18)


def values(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(shape)).to(dtype)


def exponent(alpha: float, device: str = DEVICE) -> Tensor:
    return torch.tensor(alpha, dtype=torch.float64, device=device)


def words_of(weight: Tensor) -> Tensor:
    return pp.pack_bits(torch.rand(weight.shape) < 0.5)


def on_device(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def wide(*tensors: Tensor | None) -> list[Tensor | None]:
    """Floating-point tensors in float64; words and None as they are."""
    return [
        tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in tensors
    ]


def check(name: str, *args: Tensor | None, way: str | None = "fused", eps: float = 0.0) -> None:
    """The launcher ``name`` against the reference, on arguments that lie on the CPU.

    ``eps`` is that of a coarser dtype in which something is rounded on the way.
    """
    exact = getattr(reference, name)(*wide(*args))
    plain = getattr(reference, name)(*args)
    result = getattr(gpu, name)(*on_device(*args), way=way)
    assert result.dtype == plain.dtype
    assert result.shape == plain.shape
    error = (result.cpu().double() - exact).abs().max()
    allowed = 2 * (plain.double() - exact).abs().max()
    # The interpreter cuts bfloat16 off where a GPU rounds; products of half types have a power that
    # is good to 2^-16.
    own = torch.finfo(plain.dtype).eps * 2
    half = 2.0**-15 if args[0].dtype.itemsize == 2 else 0.0
    assert error <= allowed + max(own, half, eps) * exact.abs().max()


def check_all(
    x: Tensor,
    weight: Tensor,
    alpha: Tensor,
    words: Tensor | None,
    way: str | None = "fused",
    eps: float = 0.0,
) -> None:
    """All three products of one layer; ``eps`` is for the gradient of the weight."""
    g = values(x.shape[0], weight.shape[0], dtype=x.dtype)
    check("power_linear", x, weight, alpha, None, words, way=way)
    check("power_linear_grad_input", g, weight, alpha, words, way=way)
    check("power_linear_grad_weight", g, x, weight, alpha, words, way=way, eps=eps)


@pytest.mark.parametrize("way", ["fused", "buffer"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products(sizes, dtypes, way):
    batch, rows, columns = sizes
    x, weight = values(batch, columns, dtype=dtypes[0]), values(rows, columns, dtype=dtypes[1])
    words = words_of(weight) if batch % 2 == 0 else None
    # Only NVIDIA's library gives products of half types unrounded.
    is_rounded = way == "buffer" and (INTERPRETED or torch.version.hip is not None)
    eps = torch.finfo(dtypes[0]).eps if is_rounded else 0.0
    check_all(x, weight, exponent(1.5, "cpu"), words, way, eps)


@pytest.mark.parametrize("alpha", [1.0, 1.1, 2.0, 3.0, 8.0])
def test_exponents(alpha):
    check_all(values(3, 40, dtype=SINGLE), values(9, 40, dtype=SINGLE), exponent(alpha), None)


@pytest.mark.parametrize("bias_dtype", [SINGLE, HALF])
@pytest.mark.parametrize("columns", [40, 1024])
def test_bias(columns, bias_dtype):
    """Added once, also where the product is split along the columns."""
    x, weight = values(4, columns, dtype=HALF), values(66, columns, dtype=SINGLE, scale=0.1)
    bias = values(66, dtype=bias_dtype, scale=100)
    check("power_linear", x, weight, exponent(1.5), bias, None)


def test_a_bias_with_gaps_or_repeated():
    for columns in (32, 1024):
        x, weight = values(4, columns, dtype=SINGLE), values(64, columns, dtype=SINGLE)
        for bias in (values(128, dtype=SINGLE)[::2], values(1, dtype=SINGLE).expand(64)):
            check("power_linear", x, weight, exponent(1.5), bias, None)


# ---- as it is called, by the way that the model finds faster


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_what_is_chosen(dtypes):
    """Sizes that may be fused: whole tiles, tiles that stick out, and a batch beyond a tile."""
    for batch, rows, columns in ((3, 64, 128), (200, 144, 80)):
        x, weight = values(batch, columns, dtype=dtypes[0]), values(rows, columns, dtype=dtypes[1])
        eps = torch.finfo(dtypes[0]).eps if torch.version.hip is not None or INTERPRETED else 0.0
        for words in (None, words_of(weight)):
            check_all(x, weight, exponent(1.5), words, way=None, eps=eps)


def test_addresses_that_kernels_would_read_narrowly():
    """A weight goes by a buffer then, an input is copied."""
    flat = values(64 * 80 + 1, dtype=SINGLE)
    weight, odd = flat[:-1].view(64, 80), flat[1:].view(64, 80)
    inputs = (values(5, 81, dtype=SINGLE)[:, 1:], values(10, 80, dtype=SINGLE)[::2], odd[:7])
    for x in inputs:
        for own in (weight, odd):
            check_all(x, own, exponent(1.5), words_of(own), way=None)


def test_rows_that_lie_far_apart():
    """More than 2^31 elements between the first and the last of a tile."""
    columns, step, batch = 32, 2**25, 65
    # NumPy's zeros take no memory before they are written.
    x = torch.from_numpy(np.zeros((batch, step), np.float16))[:, :columns]
    x.copy_(values(batch, columns, dtype=HALF))
    weight = values(16, columns, dtype=SINGLE)
    check_all(x, weight, exponent(1.5), None, way=None, eps=torch.finfo(HALF).eps)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_large_tiles_of_the_gradient(dtypes, monkeypatch):
    """Which weights with few tiles do not get, unless the GPU has few processors."""
    one = dataclasses.replace(model.H100, processors=1)
    monkeypatch.setattr(gpu, "machine_of", lambda device: one)
    eps = torch.finfo(dtypes[0]).eps if torch.version.hip is not None or INTERPRETED else 0.0
    for rows, columns in ((128, 128), (256, 384), (1300, 48), (144, 400)):
        g, x = values(20, rows, dtype=dtypes[0]), values(20, columns, dtype=dtypes[0])
        weight = values(rows, columns, dtype=dtypes[1])
        for words in (None, words_of(weight)):
            args = (g, x, weight, exponent(1.5), words)
            check("power_linear_grad_weight", *args, way="fused", eps=eps)


def test_a_long_product_is_split():
    assert tiles.splits_of(tiles=1, contracted=1024, step=64, processors=132)[0] > 1
    for programs, contracted in ((1, 1), (1, 255), (1, 1025), (7, 4096), (1000, 4096)):
        splits, length = tiles.splits_of(programs, contracted, 64, 132)
        assert length % 64 == 0
        assert (splits - 1) * length < contracted <= splits * length


@pytest.mark.parametrize("way", ["fused", "buffer"])
def test_layouts(way):
    """Inputs that are transposed, have gaps or repeat, and a weight that is transposed."""
    weight = values(45, 50, dtype=SINGLE)
    words = words_of(weight)
    inputs = [
        values(50, 6, dtype=SINGLE).t(),
        values(12, 60, dtype=SINGLE)[::2, :50],
        values(1, 50, dtype=SINGLE).expand(6, 50),
        values(6, 1, dtype=SINGLE).expand(6, 50),
    ]
    for x in inputs:
        check("power_linear", x, weight, exponent(1.5), None, words, way=way)
        g = values(45, 6, dtype=SINGLE).t()
        check("power_linear_grad_weight", g, x, weight, exponent(1.5), words, way=way)
    across = values(50, 45, dtype=SINGLE).t()
    check_all(inputs[0], across, exponent(1.5), words, way)
    g = gpu.power_linear_grad_weight(
        *on_device(values(6, 45, dtype=SINGLE), inputs[0], across), exponent(1.5), None
    )
    assert g.stride() == across.stride()


@pytest.mark.parametrize("way", ["fused", "buffer"])
def test_leading_dimensions(way):
    weight = values(9, 20, dtype=SINGLE)
    for shape in ((20,), (2, 3, 20), (0, 20), (2, 0, 20)):
        x = values(*shape, dtype=SINGLE)
        out = gpu.power_linear(*on_device(x, weight), exponent(2.0), None, None, way=way)
        torch.testing.assert_close(
            out.cpu(), reference.power_linear(x, weight, exponent(2.0).cpu())
        )
        back = gpu.power_linear_grad_input(out, weight.to(DEVICE), exponent(2.0), None, way=way)
        assert back.shape == x.shape
        grad = gpu.power_linear_grad_weight(
            *on_device(out, x, weight), exponent(2.0), None, way=way
        )
        exact = reference.power_linear_grad_weight(out.cpu(), x, weight, exponent(2.0).cpu())
        torch.testing.assert_close(grad.cpu(), exact)


@pytest.mark.parametrize("way", ["fused", "buffer"])
def test_a_weight_without_elements(way):
    bias = values(4, dtype=SINGLE)
    for rows, columns in ((0, 5), (4, 0)):
        x, weight = values(3, columns, dtype=SINGLE), values(rows, columns, dtype=SINGLE)
        out = gpu.power_linear(
            *on_device(x, weight), exponent(1.5), *on_device(bias[:rows]), None, way=way
        )
        assert torch.equal(out.cpu(), bias[:rows].expand(3, rows))
        grad = gpu.power_linear_grad_weight(
            out, *on_device(x, weight), exponent(1.5), None, way=way
        )
        assert grad.shape == weight.shape
        back = gpu.power_linear_grad_input(out, weight.to(DEVICE), exponent(1.5), None, way=way)
        assert torch.equal(back.cpu(), torch.zeros(3, columns))


@pytest.mark.parametrize("way", ["fused", "buffer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_weights_are_not_seen_and_others_are(value, way):
    weight = values(5, 7, dtype=SINGLE)
    weight[1, 2] = value
    x, alpha = values(4, 7, dtype=SINGLE), exponent(1.5)
    out = gpu.power_linear(*on_device(x, weight), alpha, None, None, way=way)
    assert not out[:, 1].isfinite().any()
    assert out[:, 2:].isfinite().all()
    free = weight.isfinite()
    words = pp.pack_bits(free).to(DEVICE)
    out = gpu.power_linear(*on_device(x, weight), alpha, None, words, way=way)
    assert out.isfinite().all()
    grad = gpu.power_linear_grad_weight(out, *on_device(x, weight), alpha, words, way=way)
    assert torch.equal(grad.cpu() == 0, ~free)


def test_an_infinite_gradient_shows_at_a_weight_of_zero():
    weight, x = torch.zeros(3, 4), torch.ones(2, 4)
    g = torch.ones(2, 3)
    g[0, 0] = float("inf")
    grad = gpu.power_linear_grad_weight(*on_device(g, x, weight), exponent(1.5), None)
    assert grad[0].isnan().all()
    assert torch.equal(grad[1:].cpu(), torch.zeros(2, 4))


def test_alpha_as_a_number_equals_alpha_on_the_device():
    x, weight = on_device(values(3, 20, dtype=SINGLE), values(6, 20, dtype=SINGLE))
    one = gpu.power_linear(x, weight, exponent(1.7, "cpu"), None, None)
    assert torch.equal(one, gpu.power_linear(x, weight, exponent(1.7), None, None))


def test_double_precision_goes_by_a_buffer():
    x, weight = values(3, 32, dtype=torch.float64), values(16, 32, dtype=torch.float64)
    check_all(x, weight, exponent(1.5), None, way=None)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("allowed", ["ieee", "tf32"])
def test_single_precision_is_full_unless_tf32_is_allowed(allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", allowed)
    x, weight = values(64, 512, dtype=SINGLE), values(128, 512, dtype=SINGLE)
    exact = reference.power_linear(*wide(x, weight), exponent(1.5, "cpu"))
    out = gpu.power_linear(*on_device(x, weight), exponent(1.5), None, None)
    error = (out.cpu().double() - exact).abs().max() / exact.abs().max()
    assert error < (2e-6 if allowed == "ieee" or torch.version.hip else 3e-3)
