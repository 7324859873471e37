"""Tests of the Triton kernels of op `power_linear`, run in a process of their own.

With TRITON_INTERPRET=1 they run on CPU tensors in Triton's interpreter, else on the current GPU;
test_power_linear_triton.py starts them. A result may err by twice what plain PyTorch (the reference
in the same dtype) errs, and a floor; both are compared with the reference in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor

import ppkernels as pp
from ppkernels.ops.power import gpu as power_gpu
from ppkernels.ops.power_linear import gpu, model, reference

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
        monkeypatch.setattr(gpu, "dot_type", types.__getitem__)
        # A program costs about a millisecond there.
        monkeypatch.setattr(power_gpu, "BLOCK_BYTES", 1 << 18)


@pytest.fixture
def take(monkeypatch) -> Callable[[str], None]:
    """``take("fused")`` or ``take("buffer")``: that way, whatever the model says."""

    def choose(way: str) -> None:
        fused, buffered = (0.0, 1.0) if way == "fused" else (1.0, 0.0)
        for name, seconds in (("fused", fused), ("buffered", buffered)):
            for what in ("", "_gradient"):
                function = f"{name}{what}_seconds"
                monkeypatch.setattr(model.Product, function, lambda *_, value=seconds: value)
        # Narrow accesses are slow, not wrong.
        if way == "fused":
            monkeypatch.setattr(gpu, "_can_be_fused", lambda weight, _: weight.numel() > 0)
            monkeypatch.setattr(gpu, "_aligned", lambda operand: operand)

    return choose


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


def check(name: str, *args: Tensor | None, eps: float = 0.0) -> None:
    """The launcher ``name`` against the reference, on arguments that lie on the CPU.

    ``eps`` is that of a coarser dtype in which something is rounded on the way.
    """
    exact = getattr(reference, name)(*wide(*args))
    plain = getattr(reference, name)(*args)
    result = getattr(gpu, name)(*on_device(*args))
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
    x: Tensor, weight: Tensor, alpha: Tensor, words: Tensor | None, eps: float = 0.0
) -> None:
    """All three products of one layer; ``eps`` is for the gradient of the weight."""
    g = values(x.shape[0], weight.shape[0], dtype=x.dtype)
    check("power_linear", x, weight, alpha, None, words)
    check("power_linear_grad_input", g, weight, alpha, words)
    check("power_linear_grad_weight", g, x, weight, alpha, words, eps=eps)


@pytest.mark.parametrize("way", ["fused", "buffer"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products(sizes, dtypes, way, take):
    take(way)
    batch, rows, columns = sizes
    x, weight = values(batch, columns, dtype=dtypes[0]), values(rows, columns, dtype=dtypes[1])
    words = words_of(weight) if batch % 2 == 0 else None
    # Only NVIDIA's library gives products of half types unrounded.
    is_rounded = way == "buffer" and (INTERPRETED or torch.version.hip is not None)
    eps = torch.finfo(dtypes[0]).eps if is_rounded else 0.0
    check_all(x, weight, exponent(1.5, "cpu"), words, eps)


@pytest.mark.parametrize("alpha", [1.0, 1.1, 2.0, 3.0, 8.0])
def test_exponents(alpha, take):
    take("fused")
    check_all(values(3, 40, dtype=SINGLE), values(9, 40, dtype=SINGLE), exponent(alpha), None)


@pytest.mark.parametrize("bias_dtype", [SINGLE, HALF])
@pytest.mark.parametrize("columns", [40, 1024])
def test_bias(columns, bias_dtype, take):
    """Added once, also where the product is split along the columns."""
    take("fused")
    x, weight = values(4, columns, dtype=HALF), values(66, columns, dtype=SINGLE, scale=0.1)
    bias = values(66, dtype=bias_dtype, scale=100)
    check("power_linear", x, weight, exponent(1.5), bias, None)


def test_a_long_product_is_split():
    assert gpu.splits_of(tiles=1, contracted=1024, step=64, processors=132)[0] > 1
    for tiles, contracted in ((1, 1), (1, 255), (1, 1025), (7, 4096), (1000, 4096)):
        splits, length = gpu.splits_of(tiles, contracted, 64, 132)
        assert length % 64 == 0
        assert (splits - 1) * length < contracted <= splits * length


@pytest.mark.parametrize("way", ["fused", "buffer"])
def test_layouts(way, take):
    """Inputs that are transposed, have gaps or repeat, and a weight that is transposed."""
    take(way)
    weight = values(45, 50, dtype=SINGLE)
    words = words_of(weight)
    inputs = [
        values(50, 6, dtype=SINGLE).t(),
        values(12, 60, dtype=SINGLE)[::2, :50],
        values(1, 50, dtype=SINGLE).expand(6, 50),
        values(6, 1, dtype=SINGLE).expand(6, 50),
    ]
    for x in inputs:
        check("power_linear", x, weight, exponent(1.5), None, words)
        g = values(45, 6, dtype=SINGLE).t()
        check("power_linear_grad_weight", g, x, weight, exponent(1.5), words)
    across = values(50, 45, dtype=SINGLE).t()
    check_all(inputs[0], across, exponent(1.5), words)
    g = gpu.power_linear_grad_weight(
        *on_device(values(6, 45, dtype=SINGLE), inputs[0], across), exponent(1.5), None
    )
    assert g.stride() == across.stride()


@pytest.mark.parametrize("way", ["fused", "buffer"])
def test_leading_dimensions(way, take):
    take(way)
    weight = values(9, 20, dtype=SINGLE)
    for shape in ((20,), (2, 3, 20), (0, 20), (2, 0, 20)):
        x = values(*shape, dtype=SINGLE)
        out = gpu.power_linear(*on_device(x, weight), exponent(2.0), None, None)
        torch.testing.assert_close(
            out.cpu(), reference.power_linear(x, weight, exponent(2.0).cpu())
        )
        back = gpu.power_linear_grad_input(out, weight.to(DEVICE), exponent(2.0), None)
        assert back.shape == x.shape
        grad = gpu.power_linear_grad_weight(*on_device(out, x, weight), exponent(2.0), None)
        exact = reference.power_linear_grad_weight(out.cpu(), x, weight, exponent(2.0).cpu())
        torch.testing.assert_close(grad.cpu(), exact)


@pytest.mark.parametrize("way", ["fused", "buffer"])
def test_a_weight_without_elements(way, take):
    take(way)
    bias = values(4, dtype=SINGLE)
    for rows, columns in ((0, 5), (4, 0)):
        x, weight = values(3, columns, dtype=SINGLE), values(rows, columns, dtype=SINGLE)
        out = gpu.power_linear(*on_device(x, weight), exponent(1.5), *on_device(bias[:rows]), None)
        assert torch.equal(out.cpu(), bias[:rows].expand(3, rows))
        grad = gpu.power_linear_grad_weight(out, *on_device(x, weight), exponent(1.5), None)
        assert grad.shape == weight.shape
        back = gpu.power_linear_grad_input(out, weight.to(DEVICE), exponent(1.5), None)
        assert torch.equal(back.cpu(), torch.zeros(3, columns))


@pytest.mark.parametrize("way", ["fused", "buffer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hidden_weights_are_not_seen_and_others_are(value, way, take):
    take(way)
    weight = values(5, 7, dtype=SINGLE)
    weight[1, 2] = value
    x, alpha = values(4, 7, dtype=SINGLE), exponent(1.5)
    out = gpu.power_linear(*on_device(x, weight), alpha, None, None)
    assert not out[:, 1].isfinite().any()
    assert out[:, 2:].isfinite().all()
    free = weight.isfinite()
    words = pp.pack_bits(free).to(DEVICE)
    out = gpu.power_linear(*on_device(x, weight), alpha, None, words)
    assert out.isfinite().all()
    grad = gpu.power_linear_grad_weight(out, *on_device(x, weight), alpha, words)
    assert torch.equal(grad.cpu() == 0, ~free)


def test_an_infinite_gradient_shows_at_a_weight_of_zero(take):
    take("fused")
    weight, x = torch.zeros(3, 4), torch.ones(2, 4)
    g = torch.ones(2, 3)
    g[0, 0] = float("inf")
    grad = gpu.power_linear_grad_weight(*on_device(g, x, weight), exponent(1.5), None)
    assert grad[0].isnan().all()
    assert torch.equal(grad[1:].cpu(), torch.zeros(2, 4))


def test_alpha_as_a_number_equals_alpha_on_the_device(take):
    take("fused")
    x, weight = on_device(values(3, 20, dtype=SINGLE), values(6, 20, dtype=SINGLE))
    one = gpu.power_linear(x, weight, exponent(1.7, "cpu"), None, None)
    assert torch.equal(one, gpu.power_linear(x, weight, exponent(1.7), None, None))


def test_double_precision_goes_by_a_buffer():
    x, weight = values(3, 20, dtype=torch.float64), values(6, 20, dtype=torch.float64)
    check_all(x, weight, exponent(1.5), None)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("allowed", ["ieee", "tf32"])
def test_single_precision_is_full_unless_tf32_is_allowed(allowed, take, monkeypatch):
    take("fused")
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", allowed)
    x, weight = values(64, 512, dtype=SINGLE), values(128, 512, dtype=SINGLE)
    exact = reference.power_linear(*wide(x, weight), exponent(1.5, "cpu"))
    out = gpu.power_linear(*on_device(x, weight), exponent(1.5), None, None)
    error = (out.cpu().double() - exact).abs().max() / exact.abs().max()
    assert error < (2e-6 if allowed == "ieee" or torch.version.hip else 3e-3)
