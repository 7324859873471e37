"""The step of pp.optim.PowerSGD against a φ kept in float64, and against torch.optim.SGD."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

import ppkernels as pp

RULES = ["virtual", "chain"]
ALPHAS = [1.0, 1.05, 1.5, 2.0, 3.0]
MOMENTA = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.8, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True},
]


def tensor_of(alpha: float) -> torch.Tensor:
    return torch.tensor(alpha, dtype=torch.float64)


def theta_by_stored_phi(
    theta: torch.Tensor,
    grads: list[torch.Tensor],
    alpha: float,
    lr: float,
    rule: str,
    momentum: float = 0,
    dampening: float = 0,
    nesterov: bool = False,
) -> torch.Tensor:
    """The rules as written, on a φ in float64."""
    phi = theta.double().sign() * theta.double().abs() ** (1 / alpha)
    average = None
    for grad in grads:
        slope = alpha * phi.abs() ** (alpha - 1)
        seen = grad.double() * (slope if rule == "chain" else 1)
        average = seen if average is None else momentum * average + (1 - dampening) * seen
        u = seen + momentum * average if nesterov else average
        if momentum == 0:
            u = seen
        phi = phi - lr * u * (slope if rule == "virtual" else 1)
    return phi.sign() * phi.abs() ** alpha


def powered(values: torch.Tensor, alpha: float) -> nn.Module:
    layer = pp.nn.PowerLinear(
        values.shape[1], values.shape[0], bias=False, dtype=values.dtype, alpha=alpha
    )
    layer.set_theta(values)
    return layer


@pytest.mark.parametrize("options", MOMENTA, ids=str)
@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_theta_follows_a_stored_phi(
    rule: str, alpha: float, options: dict, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    start = torch.randn(20, 30, dtype=dtype) * 0.3
    grads = [torch.randn(20, 30, dtype=dtype) for _ in range(40)]
    layer = powered(start, alpha)
    optimizer = pp.optim.PowerSGD(layer, 0.003, **options, rule=rule)
    for grad in grads:
        layer.weight.grad = grad.clone()
        optimizer.step()
    expected = theta_by_stored_phi(start, grads, alpha, 0.003, rule, **options)
    # Weights that pass close by 0 carry an error of their past size.
    atol = tolerance * expected.abs().mean().item()
    torch.testing.assert_close(layer.weight.double(), expected, rtol=tolerance, atol=atol)


def test_without_momentum_the_rules_agree(stepped: Callable[..., torch.Tensor]) -> None:
    theta, grad = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    alpha = tensor_of(2.5)
    virtual = stepped(theta, grad, alpha, 0.1)
    torch.testing.assert_close(stepped(theta, grad, alpha, 0.1, "chain"), virtual)


@pytest.mark.parametrize("momentum", [0, 0.9])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0])
def test_theta_and_phi_models_follow_each_other(alpha: float, momentum: float) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x, y = torch.randn(64, 5).double(), torch.randn(64, 2).double()
    models = [pp.powerize(copy.deepcopy(plain), alpha, stores) for stores in ("theta", "phi")]
    stock = pp.powerize(copy.deepcopy(plain), alpha, "phi")
    optimizers = [
        pp.optim.PowerSGD(models[0], 0.05, momentum, rule="chain"),
        pp.optim.PowerSGD(models[1], 0.05, momentum, rule="virtual"),
        torch.optim.SGD(stock.parameters(), 0.05, momentum),
    ]
    models.append(stock)
    for _ in range(50):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
    for first, second in pairwise(models):
        for a, b in zip(first[::2], second[::2], strict=True):
            torch.testing.assert_close(a.theta, b.theta, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(a.bias, b.bias, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("options", [*MOMENTA, {"maximize": True}], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_alpha_1_is_torch_sgd_bit_for_bit(rule: str, options: dict) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
    model = pp.powerize(copy.deepcopy(plain), 1.0)
    optimizers = [
        torch.optim.SGD(plain.parameters(), 0.1, **options),
        pp.optim.PowerSGD(model, 0.1, **options, rule=rule),
    ]
    x = torch.randn(32, 5)
    for _ in range(20):
        for net, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    assert all(map(torch.equal, plain.parameters(), model.parameters()))


# ---- one step


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_a_zero_step_changes_no_bit(
    alpha: float, rule: str, dtype: torch.dtype, stepped: Callable[..., torch.Tensor]
) -> None:
    tiny = torch.finfo(dtype).smallest_normal
    special = torch.tensor([0.0, tiny, tiny / 4, 1e4, 1.0, 0.3], dtype=dtype)
    theta = torch.cat([special, -special[1:], torch.randn(500).to(dtype)])
    moved = stepped(theta, torch.zeros_like(theta), tensor_of(alpha), 0.1, rule)
    assert moved.dtype == dtype
    assert torch.equal(moved, theta)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [1.05, 1.5, 2.0, 4.0])
def test_zero_stays_zero(alpha: float, rule: str) -> None:
    layer = powered(torch.zeros(2, 3), alpha)
    optimizer = pp.optim.PowerSGD(layer, 0.1, momentum=0.9, rule=rule)
    for _ in range(3):
        layer.weight.grad = torch.randn(2, 3)
        optimizer.step()
    assert not layer.weight.any()
    optimizer.state[layer.weight]["momentum_buffer"].fill_(1.0)
    optimizer.step()
    assert not layer.weight.any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_gradients_that_are_not_finite_show(
    alpha: float, rule: str, stepped: Callable[..., torch.Tensor]
) -> None:
    theta = torch.tensor([0.0, 0.5, -0.5])
    for bad in (float("inf"), float("nan")):
        grad = torch.full_like(theta, bad)
        assert not stepped(theta, grad, tensor_of(alpha), 0.1, rule).isfinite().any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("alpha", [1.001, 1.05, 1.5, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_tiny_weights_do_not_overflow(
    dtype: torch.dtype, alpha: float, rule: str, stepped: Callable[..., torch.Tensor]
) -> None:
    info = torch.finfo(dtype)
    theta = torch.tensor(
        [info.smallest_normal, info.smallest_normal * info.eps, -1e-6], dtype=dtype
    )
    grad = -torch.ones_like(theta)
    moved = stepped(theta, grad, tensor_of(alpha), 0.1, rule)
    assert moved.isfinite().all()
    expected = theta_by_stored_phi(theta, [grad], alpha, 0.1, rule)
    if rule == "virtual":
        # As exact as φ, which may be subnormal too.
        torch.testing.assert_close(moved.double(), expected, rtol=1e-3, atol=info.tiny)


def test_a_sign_may_change(stepped: Callable[..., torch.Tensor]) -> None:
    theta, grad = torch.tensor([0.01, -0.01]), torch.tensor([100.0, -100.0])
    moved = stepped(theta, grad, tensor_of(2.0), 0.1)
    expected = theta_by_stored_phi(theta, [grad], 2.0, 0.1, "virtual")
    torch.testing.assert_close(moved.double(), expected, rtol=1e-6, atol=0)
    assert moved.sign().tolist() == [-1, 1]
