"""pp.optim.PowerAdamW as an optimizer: its formulas at α = 1, its state, its options."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ppkernels as pp

RULES = ["virtual", "chain"]

pytestmark = pytest.mark.usefixtures("one_thread")


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2)).to(dtype)


def backward(model: nn.Module, step: int = 0) -> None:
    draw = torch.Generator().manual_seed(step)
    model.zero_grad()
    x = torch.randn(16, 5, generator=draw).to(model[0].weight.dtype)
    model(x).square().mean().backward()


def take_steps(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> None:
    for step in range(steps):
        backward(model, step)
        optimizer.step()


# ---- the formulas


STOCK: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "adam, coupled": (torch.optim.Adam, {"weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.5, 0.7), "eps": 1e-3}),
    "no averages": (torch.optim.Adam, {"betas": (0.0, 0.0)}),
    "amsgrad": (torch.optim.AdamW, {"weight_decay": 0.1, "amsgrad": True, "betas": (0.8, 0.6)}),
    "maximize": (torch.optim.Adam, {"weight_decay": 0.1, "maximize": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", STOCK)
def test_alpha_1_is_torch_adam(name: str, rule: str, dtype: torch.dtype) -> None:
    kind, options = STOCK[name]
    plain = network(dtype)
    models = [pp.powerize(copy.deepcopy(plain), 1.0), copy.deepcopy(plain)]
    decay = "decoupled" if kind is torch.optim.AdamW else "coupled"
    optimizers = [pp.optim.PowerAdamW(m, 0.01, **options, rule=rule, decay=decay) for m in models]
    take_steps(kind(plain.parameters(), 0.01, **options), plain, 20)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    for model, optimizer in zip(models, optimizers, strict=True):
        take_steps(optimizer, model, 20)
        for came, expected in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(came, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("rule", "least", "most"), [("virtual", 9, 11), ("chain", 0.9, 1.1)])
def test_the_virtual_rule_keeps_the_factor(rule: str, least: float, most: float) -> None:
    """Under equal gradients a φ ten times as large moves by ten times as much at α = 2."""
    phi = torch.tensor([0.5, 0.05], dtype=torch.float64)
    theta = (phi**2).requires_grad_()
    optimizer = pp.optim.PowerAdamW([{"params": [theta], "alpha": 2.0}], 1e-4, rule=rule)
    for _ in range(20):
        theta.grad = torch.ones_like(theta)
        optimizer.step()
    moved = phi - theta.detach().sqrt()
    assert least < (moved[0] / moved[1]).item() < most


def test_there_is_no_weight_decay_unless_asked_for() -> None:
    weight = torch.randn(50, requires_grad=True)
    start = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer = pp.optim.PowerAdamW([{"params": [weight], "alpha": 1.5}])
    optimizer.step()
    assert torch.equal(weight, start)
    assert optimizer.defaults["lr"] == 1e-3
    assert optimizer.defaults["weight_decay"] == 0


# ---- state


def test_each_weight_counts_its_own_steps() -> None:
    """A step without a gradient is none for that weight: value, averages and count stay."""
    plain = network(torch.float64)
    model = copy.deepcopy(plain)
    optimizers = [
        torch.optim.Adam(plain.parameters(), 0.01),
        pp.optim.PowerAdamW(model, 0.01),
    ]
    for step in range(6):
        for net, optimizer in zip((plain, model), optimizers, strict=True):
            backward(net, step)
            if step % 3 == 0:
                net[0].weight.grad = None
            if step < 2:
                net[2].bias.requires_grad_(False)
                net[2].bias.grad = None
            else:
                net[2].bias.requires_grad_(True)
            optimizer.step()
    counts = [optimizers[1].state[p]["step"].item() for p in model.parameters()]
    assert counts == [4, 6, 6, 3]
    for came, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(came, expected, rtol=1e-12, atol=1e-12)


def test_state_is_made_at_the_first_step_and_like_the_weight() -> None:
    layer = pp.nn.PowerConv2d(3, 4, 3, alpha=2.0).to(memory_format=torch.channels_last)
    optimizer = pp.optim.PowerAdamW(layer, amsgrad=True)
    assert not optimizer.state
    layer(torch.randn(2, 3, 5, 5)).sum().backward()
    layer.bias.grad = None
    optimizer.step()
    assert list(optimizer.state) == [layer.weight]
    state = optimizer.state[layer.weight]
    assert state.keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
    for name in state.keys() - {"step"}:
        assert state[name].stride() == layer.weight.stride()


def test_amsgrad_from_some_step_on() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = pp.optim.PowerAdamW([weight], 0.1, betas=(0.5, 0.5))
    seen = []
    for grad in (4.0, 1.0, 1.0):
        optimizer.param_groups[0]["amsgrad"] = len(seen) > 0
        weight.grad = torch.full_like(weight, grad)
        optimizer.step()
        seen.append(optimizer.state[weight]["exp_avg_sq"][0].item())
    assert seen == [8.0, 4.5, 2.75]
    assert optimizer.state[weight]["max_exp_avg_sq"][0].item() == 4.5


def test_steps_bump_the_versions_of_all_they_write_to() -> None:
    model = pp.powerize(network(), 1.5)
    optimizer = pp.optim.PowerAdamW(model, amsgrad=True)
    take_steps(optimizer, model, 1)
    backward(model)
    weight = model[0].weight
    tensors: list[Tensor] = [weight, *optimizer.state[weight].values()]
    versions = [tensor._version for tensor in tensors]
    optimizer.step()
    assert all(tensor._version > version for tensor, version in zip(tensors, versions, strict=True))


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be a number >= 0, got -0.1"),
        ({"lr": float("inf")}, "lr must be a finite number, got inf"),
        ({"betas": (1.0, 0.9)}, "betas must be a number >= 0 and < 1, got 1.0"),
        ({"betas": (0.9, -0.1)}, "betas must be a number >= 0 and < 1, got -0.1"),
        ({"betas": (0.9, float("nan"))}, "betas must be a finite number, got nan"),
        ({"eps": -1e-8}, "eps must be a number >= 0, got -1e-08"),
        ({"weight_decay": -1}, "weight_decay must be a number >= 0, got -1.0"),
        ({"rule": "target"}, "rule must be 'virtual' or 'chain', got 'target'"),
        ({"decay": None}, "decay must be 'coupled' or 'decoupled', got None"),
        ({"decay_of": "weight"}, "decay_of must be 'theta' or 'phi', got 'weight'"),
        (
            {"lr": 0.5, "weight_decay": 2},
            "decoupled decay multiplies weights by 1 - lr * weight_decay, which must be positive; "
            "got lr 0.5 and weight_decay 2.0",
        ),
        ({"alpha": 0.5}, "alpha must be a finite number >= 1, got 0.5"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    tensors = [torch.ones(2, requires_grad=True) for _ in range(2)]
    exact = f"^PowerAdamW: {re.escape(message)}$"
    with pytest.raises(ValueError, match=exact):
        pp.optim.PowerAdamW([{"params": tensors[:1], **options}])
    if "alpha" not in options:
        with pytest.raises(ValueError, match=exact):
            pp.optim.PowerAdamW(tensors, **options)
    optimizer = pp.optim.PowerAdamW(tensors[:1])
    with pytest.raises(ValueError, match=exact):
        optimizer.add_param_group({"params": tensors[1:], **options})
    assert len(optimizer.param_groups) == 1
    state = optimizer.state_dict()
    state["param_groups"][0].update(options)
    with pytest.raises(ValueError, match=exact):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": 0.9}, "betas must be two numbers, got 0.9"),
        ({"betas": (0.9, 0.99, 0.999)}, r"betas must be two numbers, got \(0.9, 0.99, 0.999\)"),
        ({"betas": ("a", 0.9)}, "betas must be a number, got 'a'"),
        ({"eps": None}, "eps must be a number, got None"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"alpha": torch.tensor(2.0)}, "alpha as a tensor must be 0-dim float64"),
        ({"alpha": "2"}, "alpha must be a float or a 0-dim float64 tensor, got str"),
    ],
    ids=str,
)
def test_options_of_the_wrong_kind(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^PowerAdamW: {message}"):
        pp.optim.PowerAdamW([{"params": [torch.ones(2)], **options}])


@pytest.mark.parametrize("number", [1, "float32", "float64"])
def test_numbers_of_numpy_are_numbers(number: Any) -> None:
    numpy = pytest.importorskip("numpy")
    value = number if isinstance(number, int) else getattr(numpy, number)(0.25)
    weight = torch.ones(2, requires_grad=True)
    weight.grad = torch.ones(2)
    optimizer = pp.optim.PowerAdamW([weight], lr=value, eps=value, weight_decay=value / 2)
    optimizer.step()
    assert weight.isfinite().all()


def test_complex_tensors_are_refused_by_name() -> None:
    weight = torch.ones(2, dtype=torch.complex64, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(TypeError, match=r"parameters must be float32, .*, got complex64"):
        pp.optim.PowerAdamW([weight]).step()


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"^PowerAdamW: gradients must be dense, got torch.spars"
    ):
        pp.optim.PowerAdamW(embedding).step()
