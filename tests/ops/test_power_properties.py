"""Random shapes, strides, dtypes, exponents and values: properties that hold for all of them."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import ppkernels as pp
from ppkernels.testing import (
    DTYPES,
    SAMPLES,
    TOLERANCES,
    exact_values,
    random_bits,
    special_values,
    ulp_errors,
)

# The same examples in every run, as many as are quick.
quick = settings(derandomize=True, deadline=None, max_examples=400, database=None)

dtypes = st.sampled_from(DTYPES)
alphas = st.one_of(
    st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0, 8.0, math.nextafter(1, 2), math.nextafter(2, 1)]),
    st.floats(1, 8),
)


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype, count: int = 1) -> list[Tensor]:
    """``count`` tensors of one shape and of ``dtype``, laid out in any way, with any values."""
    shape = draw(st.lists(st.integers(0, 7), max_size=4))
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.integers(1, 3), min_size=len(shape), max_size=len(shape)))
    flipped = draw(
        st.lists(st.sampled_from(range(len(shape))), unique=True) if shape else st.just([])
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    special = torch.tensor(special_values(dtype), dtype=torch.float64).to(dtype)
    result = []
    for _ in range(count):
        stored = [size * step for size, step in zip(shape, steps, strict=True)]
        total = math.prod(stored)
        scale = 10.0 ** torch.randint(-6, 3, (total,), generator=generator).double()
        values = (torch.randn(total, generator=generator).double() * scale).to(dtype)
        kind = torch.randint(0, 8, (total,), generator=generator)
        picked = special[torch.randint(0, len(special), (total,), generator=generator)]
        values = torch.where(kind == 0, picked, values)
        values = torch.where(kind == 1, random_bits(total, dtype, generator), values)
        tensor = values.reshape(stored).flip(flipped)
        tensor = tensor[tuple(slice(None, None, step) for step in steps)]
        result.append(tensor.permute(order))
    return result


def assert_close_to_exact(name: str, inputs: list[Tensor], exponents: tuple[float, ...]) -> None:
    """By the rule of `ppkernels.testing`, with plain PyTorch's error at its worst element."""
    result = SAMPLES[name].call(*inputs, *exponents)
    like = torch.empty_like(inputs[-1])
    assert (result.shape, result.dtype, result.stride()) == (like.shape, like.dtype, like.stride())
    flat = tuple(tensor.reshape(-1) for tensor in inputs)
    exact = exact_values(name, flat, exponents)
    plain = ulp_errors(SAMPLES[name].reference(*flat, *exponents), exact)
    error = ulp_errors(result.reshape(-1), exact)
    worst = plain.nan_to_num(posinf=0.0).max() if plain.numel() else 0.0
    allowed = torch.where(plain.isinf(), math.inf, 2 * worst + TOLERANCES[name][result.dtype])
    if pp.cpu_capability() == "reference" and result.dtype is torch.float32:
        # PyTorch has two loops, one of which rounds the exponent; 16 for gradients beside 1.
        allowed += 16 + exact[0].abs().log2().abs().nan_to_num(posinf=0.0)
    wrong = (error > allowed).nonzero().flatten().tolist()
    assert not wrong, (
        f"{name}, {result.dtype}, exponents {exponents}: "
        f"inputs {[tensor[wrong[0]].item() for tensor in flat]} give "
        f"{result.reshape(-1)[wrong[0]].item()}, exact {exact[0][wrong[0]].item()}, "
        f"{error[wrong[0]].item():.3g} ULP"
    )


@quick
@given(st.data(), dtypes, alphas)
def test_power_is_close_to_exact(data: st.DataObject, dtype: torch.dtype, alpha: float) -> None:
    assert_close_to_exact("power", data.draw(tensors(dtype)), (alpha,))


@quick
@given(st.data(), dtypes, alphas)
def test_power_backward_is_close_to_exact(
    data: st.DataObject, dtype: torch.dtype, alpha: float
) -> None:
    grad_theta, weight = data.draw(tensors(dtype, 2))
    # Products of extreme gradients and extreme factors leave the range on the way: not compared.
    grad_theta = torch.where(grad_theta.abs() < 1e-3, torch.ones_like(grad_theta), grad_theta)
    grad_theta = grad_theta.clamp(-1e3, 1e3)
    assert_close_to_exact("power_backward", [grad_theta, weight], (alpha,))


@quick
@given(st.data(), dtypes, alphas)
def test_inverse_power_is_close_to_exact(
    data: st.DataObject, dtype: torch.dtype, alpha: float
) -> None:
    assert_close_to_exact("inverse_power", data.draw(tensors(dtype)), (alpha,))


@quick
@given(st.data(), dtypes, alphas, alphas)
def test_rebase_is_close_to_exact(
    data: st.DataObject, dtype: torch.dtype, alpha_from: float, alpha_to: float
) -> None:
    assert_close_to_exact("rebase", data.draw(tensors(dtype)), (alpha_from, alpha_to))


@quick
@given(st.data(), dtypes, alphas)
def test_inverse_power_undoes_power(data: st.DataObject, dtype: torch.dtype, alpha: float) -> None:
    (weight,) = data.draw(tensors(dtype))
    theta = pp.power(weight, alpha)
    # Subnormal and infinite θ have lost the bits that the way back needs.
    info = torch.finfo(dtype)
    is_normal = (theta.abs() >= info.tiny) & theta.isfinite()
    weight, theta = weight[is_normal].double(), theta[is_normal]
    back = pp.inverse_power(theta, alpha).double()
    # A relative error ε of θ is one of ε/α of φ. With r the roundings of an op, in eps, that is
    # r/α + r; plain float32 and float64 lose log2|θ| more, by rounding the exponent.
    rounding = 1.0 if dtype in (torch.bfloat16, torch.float16) else 2.0
    if pp.cpu_capability() == "reference" or dtype is torch.float64:
        rounding += theta.double().abs().log2().abs().max().item() if theta.numel() else 0.0
    bound = rounding * (1 / alpha + 1) * info.eps
    # A weight may be subnormal by itself; there, the error is one of its smallest unit.
    atol = info.tiny * info.eps
    torch.testing.assert_close(back, weight, rtol=bound, atol=atol)


@quick
@given(st.data(), dtypes, alphas)
def test_power_is_odd(data: st.DataObject, dtype: torch.dtype, alpha: float) -> None:
    (weight,) = data.draw(tensors(dtype))
    positive, negative = pp.power(weight, alpha), pp.power(-weight, alpha)
    torch.testing.assert_close(negative, -positive, rtol=0, atol=0, equal_nan=True)
    signs_differ = (negative.signbit() == positive.signbit()) & ~weight.isnan()
    assert not signs_differ.any()


@quick
@given(st.data(), dtypes, alphas)
def test_power_is_monotonic(data: st.DataObject, dtype: torch.dtype, alpha: float) -> None:
    (weight,) = data.draw(tensors(dtype))
    weight = weight[~weight.isnan()].sort().values
    theta = pp.power(weight, alpha)
    # Neighbours may change places by the error of one result, not by more.
    units = {torch.float64: 4, torch.float32: 2}.get(dtype, 1)
    if pp.cpu_capability() == "reference" and dtype is torch.float32:
        units = 64
    slack = units * torch.finfo(dtype).eps * theta.double().abs()[1:].nan_to_num(posinf=0.0)
    lowest, highest = theta[:-1].double(), theta[1:].double()
    assert (lowest <= highest + slack + torch.finfo(dtype).tiny * torch.finfo(dtype).eps).all()


@quick
@given(st.data(), dtypes, alphas)
def test_out_equals_the_returned_tensor(
    data: st.DataObject, dtype: torch.dtype, alpha: float
) -> None:
    weight, elsewhere = data.draw(tensors(dtype, 2))
    out = torch.empty_strided(weight.shape, elsewhere.stride(), dtype=dtype)
    out = out.fill_(math.nan)
    expected = pp.power(weight, alpha)
    assert pp.power(weight, alpha, out=out) is out
    if pp.cpu_capability() == "reference":
        torch.testing.assert_close(out, expected, equal_nan=True)
    else:
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)
