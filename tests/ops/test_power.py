"""What `power` and its relatives promise beyond the contract: points, identities, training."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ppkernels as pp
from ppkernels.testing import ALPHAS, DTYPES, random_bits, special_values

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_alpha = pytest.mark.parametrize("alpha", ALPHAS)


def all_kinds_of_values(dtype: torch.dtype) -> Tensor:
    """Special values and 4,096 random bit patterns."""
    random = random_bits(4_096, dtype, torch.Generator().manual_seed(0))
    return torch.cat([torch.tensor(special_values(dtype), dtype=torch.float64).to(dtype), random])


@pytest.mark.parametrize(
    ("weight", "alpha", "theta"),
    [(3.0, 2.0, 9.0), (-3.0, 2.0, -9.0), (-2.0, 3.0, -8.0), (4.0, 1.5, 8.0), (-0.5, 4.0, -0.0625)],
)
@each_dtype
def test_known_points(weight: float, alpha: float, theta: float, dtype: torch.dtype) -> None:
    phi, expected = torch.tensor(weight, dtype=dtype), torch.tensor(theta, dtype=dtype)
    assert torch.equal(pp.power(phi, alpha), expected)
    torch.testing.assert_close(pp.inverse_power(expected, alpha), phi)
    slope = pp.power_backward(torch.ones((), dtype=dtype), phi, alpha)
    torch.testing.assert_close(slope, (alpha * expected / phi).to(dtype))


@each_dtype
@each_alpha
def test_fixed_points(alpha: float, dtype: torch.dtype) -> None:
    fixed = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan], dtype=dtype)
    for result in (
        pp.power(fixed, alpha),
        pp.inverse_power(fixed, alpha),
        pp.rebase(fixed, alpha, 2.0),
    ):
        torch.testing.assert_close(result, fixed, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(result.signbit()[:-1], fixed.signbit()[:-1])


@each_dtype
def test_alpha_one_is_the_identity(dtype: torch.dtype) -> None:
    weight = all_kinds_of_values(dtype)
    grad = torch.randn(weight.shape).to(dtype)
    regular = weight.isfinite()
    assert torch.equal(pp.power(weight, 1.0)[regular], weight[regular])
    assert torch.equal(pp.inverse_power(weight, 1.0)[regular], weight[regular])
    assert torch.equal(pp.rebase(weight, 2.5, 2.5)[regular], weight[regular])
    assert torch.equal(pp.power_backward(grad, weight, 1.0)[regular], grad[regular])
    assert (pp.power_double_backward(grad, grad, weight, 1.0)[regular] == 0).all()


@each_dtype
@each_alpha
def test_power_is_odd_and_its_slope_is_even(alpha: float, dtype: torch.dtype) -> None:
    weight = all_kinds_of_values(dtype)
    weight = weight[~weight.isnan()]
    grad = torch.randn(weight.shape).to(dtype)
    assert torch.equal(pp.power(-weight, alpha), -pp.power(weight, alpha))
    assert torch.equal(pp.inverse_power(-weight, alpha), -pp.inverse_power(weight, alpha))
    slope = pp.power_backward(grad, weight, alpha)
    torch.testing.assert_close(
        pp.power_backward(grad, -weight, alpha), slope, rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.skipif(
    pp.cpu_capability() == "reference",
    reason="no compiled kernels: plain PyTorch is not monotonic to the last bit",
)
@pytest.mark.parametrize("alpha", [1.1, 1.25, 1.5, 2.0, 2.7, 3.0, 4.0, 8.0])
def test_power_of_neighbours_errs_in_order(alpha: float) -> None:
    # Results within 1 ULP of the exact ones may change places with their neighbours, by 1 ULP.
    bits = torch.arange(0x3F00_0000, 0x3F00_0000 + (1 << 17), dtype=torch.int32)
    theta = pp.power(bits.view(torch.float32), alpha).view(torch.int32)
    assert (theta.diff() >= -1).all()


# ---- slopes at zero


@pytest.mark.parametrize("alpha", [1.0001, 1.1, 1.5, 1.9, 2.0, 2.5, 8.0])
@each_dtype
def test_slope_at_zero(alpha: float, dtype: torch.dtype) -> None:
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0], dtype=dtype)
    grads = torch.tensor([1.0, -3.0, math.inf, math.nan, 0.0], dtype=dtype)
    result = pp.power_backward(grads, zeros, alpha)
    assert (result[[0, 1, 4]] == 0).all()
    # A loss scaler looks for gradients that are not finite: zero weights must not hide them.
    assert not result[2:4].isfinite().any()
    assert (pp.power_double_backward(grads[:2], grads[:2], zeros[:2], alpha) == 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.1, 1.5, 2.0, 3.0])
def test_autograd_at_zero_is_finite(alpha: float) -> None:
    weight = torch.tensor([0.0, -0.0, 0.5], requires_grad=True)
    (grad,) = torch.autograd.grad(pp.power(weight, alpha).sum(), weight, create_graph=True)
    assert torch.equal(grad[:2], torch.full((2,), 1.0 if alpha == 1 else 0.0))
    (second,) = torch.autograd.grad(grad.sum(), weight)
    assert (second[:2] == 0).all()
    torch.testing.assert_close(second[2].item(), alpha * (alpha - 1) * 0.5 ** (alpha - 2))


# ---- the exponent


@each_dtype
def test_the_exponent_keeps_its_precision(dtype: torch.dtype) -> None:
    # At φ = 1e-4, an α rounded to float32 would move θ by several float32 ULP.
    if pp.cpu_capability() == "reference" and dtype is torch.float32:
        pytest.skip("no compiled kernels: PyTorch's pow rounds a float32 tensor's exponent")
    weight = torch.tensor(1e-4, dtype=dtype)
    exact = weight.double() ** 1.1
    torch.testing.assert_close(
        pp.power(weight, 1.1).double(), exact, rtol=torch.finfo(dtype).eps, atol=0
    )


def test_an_integer_exponent_is_a_number() -> None:
    weight = torch.randn(5)
    assert torch.equal(pp.power(weight, 2), pp.power(weight, 2.0))


def test_the_inputs_are_not_changed() -> None:
    weight, alpha = torch.randn(100), torch.tensor(1.5, dtype=torch.float64)
    before = weight.clone()
    pp.power(weight, alpha)
    pp.power_backward(weight, weight, alpha)
    pp.inverse_power(weight, alpha)
    assert torch.equal(weight, before)
    assert alpha == 1.5
    assert weight._version == 0


# ---- inverses


@pytest.mark.parametrize("alpha", [1.0, 1.1, 1.5, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_initial_theta_does_not_depend_on_alpha(alpha: float, dtype: torch.dtype) -> None:
    theta = torch.randn(1_000, dtype=dtype) * 0.1
    # An error of 1 ULP in φ is one of α ULP in θ, and θ adds one of its own.
    bound = 2 * (alpha + 1) * torch.finfo(dtype).eps
    torch.testing.assert_close(
        pp.power(pp.inverse_power(theta, alpha), alpha), theta, rtol=bound, atol=0
    )


@pytest.mark.parametrize(("before", "after"), [(1.0, 2.0), (1.25, 1.375), (3.0, 1.5), (8.0, 8.0)])
def test_rebase_keeps_theta(before: float, after: float) -> None:
    weight = torch.randn(1_000, dtype=torch.float64)
    moved = pp.rebase(weight, before, after)
    torch.testing.assert_close(pp.power(moved, after), pp.power(weight, before), rtol=1e-13, atol=0)


# ---- in use


def test_descent_through_power_moves_small_weights_less() -> None:
    target = torch.full((2,), 1.0)
    weight = torch.tensor([0.1, 0.9], requires_grad=True)
    pp.power(weight, 2.0).sub(target).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach().abs())


def test_gradient_penalty() -> None:
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)

    def penalty(parameter: Tensor) -> Tensor:
        theta = pp.power(parameter, 1.5)
        (grad,) = torch.autograd.grad(theta.square().sum(), parameter, create_graph=True)
        return grad.square().sum()

    # θ² = |φ|³, so the gradient is 3φ|φ| and the penalty 9φ⁴.
    (grad,) = torch.autograd.grad(penalty(weight), weight)
    torch.testing.assert_close(grad, 36 * weight.detach() ** 3)


def test_backends_agree() -> None:
    weight = torch.randn(1_000)
    kernels = pp.power(weight, 1.25)
    with pp.backend("reference"):
        torch.testing.assert_close(pp.power(weight, 1.25), kernels)
