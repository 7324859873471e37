"""Scores: the formulas on weights that hold θ and on weights that hold φ."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

import ppkernels as pp
from ppkernels.sparsity import Gradient, Magnitude, Random, Score, Sensitivity, Weight

each_gradient_score = pytest.mark.parametrize("score", [Gradient(), Sensitivity()], ids=str)


def layer(stores: str, alpha: float, theta: Tensor) -> nn.Module:
    powered = pp.nn.PowerLinear(
        theta.shape[1], theta.shape[0], alpha=alpha, stores=stores, dtype=theta.dtype
    )
    powered.set_theta(theta)
    return powered


def weight_of(powered: nn.Module) -> Weight:
    return Weight(powered.weight, powered.alpha if powered.stores == "phi" else None)


def after_backward(stores: str, alpha: float, theta: Tensor) -> tuple[Weight, Tensor]:
    """A weight with its gradient, and ∂L/∂θ."""
    powered = layer(stores, alpha, theta)
    x, y = torch.randn(7, theta.shape[1]).to(theta), torch.randn(7, theta.shape[0]).to(theta)
    powered(x).sub(y).square().sum().backward()
    plain = powered.theta.detach().clone().requires_grad_()
    nn.functional.linear(x, plain, powered.bias).sub(y).square().sum().backward()
    return weight_of(powered), plain.grad


@each_gradient_score
@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 3.7])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradient_scores_are_of_theta(
    score: Score, stores: str, alpha: float, dtype: torch.dtype
) -> None:
    theta = torch.randn(5, 6).to(dtype)
    weight, grad = after_backward(stores, alpha, theta)
    wanted = grad if isinstance(score, Gradient) else theta * grad
    found, exponent = score.of({"w": weight})["w"]
    assert exponent is None
    torch.testing.assert_close(found.to(dtype), wanted, rtol=1e-4, atol=1e-4)


@each_gradient_score
@pytest.mark.parametrize("alpha", [1.5, 2.0])
def test_a_weight_of_zero_that_holds_phi_scores_zero(score: Score, alpha: float) -> None:
    theta = torch.randn(5, 6)
    theta[1, 2] = theta[3, 0] = 0
    weight, _ = after_backward("phi", alpha, theta)
    found = score.of({"w": weight})["w"].stored
    assert torch.equal(found == 0, theta == 0)
    assert found.isfinite().all()


def test_the_gradient_at_zero_is_known_where_alpha_is_one_or_theta_is_stored() -> None:
    for stores, alpha in (("phi", 1.0), ("theta", 2.0)):
        weight, grad = after_backward(stores, alpha, torch.zeros(5, 6))
        found = Gradient().of({"w": weight})["w"].stored
        torch.testing.assert_close(found.float(), grad)


def test_small_products_do_not_vanish_in_half_precision() -> None:
    weight = torch.full((2, 3), 1e-4, dtype=torch.float16, requires_grad=True)
    weight.grad = torch.full_like(weight, 1e-4)
    found = Sensitivity().of({"w": Weight(weight)})["w"].stored
    assert (found > 0).all()


def test_magnitude_takes_the_weights_where_they_lie() -> None:
    weight = weight_of(layer("phi", 2.0, torch.randn(5, 6)))
    found = Magnitude().of({"w": weight})["w"]
    assert found.stored is weight.stored
    assert found.alpha is weight.alpha


def test_random_is_the_same_each_time_and_another_for_each_weight_and_seed() -> None:
    weights = {name: Weight(torch.zeros(4, 5)) for name in "ab"}
    first, again, other = (Random(seed).of(weights) for seed in (1, 1, 2))
    torch.manual_seed(99)
    for name in "ab":
        assert torch.equal(first[name].stored, again[name].stored)
        assert not torch.equal(first[name].stored, other[name].stored)
    assert not torch.equal(first["a"].stored, first["b"].stored)


def test_random_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    Random(1).of({"w": Weight(torch.zeros(4, 5))})
    assert torch.equal(torch.get_rng_state(), state)


@each_gradient_score
def test_without_a_gradient(score: Score) -> None:
    message = f"{type(score).__name__}: the weight of 'fc1' has no gradient; prune between"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        score.of({"fc1": Weight(torch.randn(2, 3, requires_grad=True))})


@pytest.mark.parametrize(
    ("seed", "error"), [(1.5, TypeError), (True, TypeError), (-1, ValueError), (2**64, ValueError)]
)
def test_seeds(seed: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="Random: seed must be"):
        Random(seed)
