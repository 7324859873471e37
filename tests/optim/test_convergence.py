"""Training by the fused step against training in float64 by the formulas as they are written."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ppkernels as pp

ALPHAS = (1.25, 1.5, 2.0, 3.0)
RULES = ("virtual", "chain")
DECAY_RATE = 0.05
DECAYS: tuple[dict[str, Any], ...] = (
    {},
    *(
        {"weight_decay": DECAY_RATE, "decay": decay, "decay_of": of}
        for decay in ("coupled", "decoupled")
        for of in ("theta", "phi")
    ),
)
# Name: the options that make it, in the words of torch.optim. Adam with decoupled decay is AdamW.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.02},
    "momentum": {"lr": 0.005, "momentum": 0.9},
    "nesterov": {"lr": 0.005, "momentum": 0.9, "nesterov": True},
    "adam": {"lr": 0.001},
    "amsgrad": {"lr": 0.001, "amsgrad": True},
}
STEPS = 300


pytestmark = pytest.mark.usefixtures("one_thread")


def case_name(value: Any) -> str:
    return "-".join(map(str, value.values())) or "none" if isinstance(value, dict) else str(value)


def is_adam(name: str) -> bool:
    return name in ("adam", "amsgrad")


@functools.cache
def problem(dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A smooth network with inputs and targets: numbers of float32; not to be written to."""
    torch.manual_seed(0)
    sizes = [6, 16, 16, 16, 2]
    layers = [[nn.Linear(a, b), nn.Tanh()] for a, b in itertools.pairwise(sizes)]
    model = nn.Sequential(*itertools.chain(*layers))[:-1]
    return model.to(dtype), torch.randn(32, 6).to(dtype), torch.randn(32, 2).to(dtype)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The network at its start."""
    return copy.deepcopy(problem(dtype)[0])


def backward(model: nn.Module) -> None:
    _, x, y = problem(model[0].weight.dtype)
    model.zero_grad()
    (model(x) - y).square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = STEPS) -> None:
    for _ in range(steps):
        backward(model)
        optimizer.step()


def power_optimizer(model: nn.Module, name: str, **options: Any) -> torch.optim.Optimizer:
    kind = pp.optim.PowerAdamW if is_adam(name) else pp.optim.PowerSGD
    return kind(model, **{**OPTIMIZERS[name], **options})


def flat(model: nn.Sequential, of: str = "theta") -> Tensor:
    """All that the network consists of, in float64: weights, or what they store, and biases."""
    pairs = [(getattr(layer, of, layer.weight), layer.bias) for layer in model[::2]]
    return torch.cat([tensor.detach().double().flatten() for pair in pairs for tensor in pair])


def distance(came: Tensor, exact: Tensor) -> float:
    """How far ``came`` is from ``exact``, as a share of the way that was gone from the start."""
    return ((came - exact).norm() / (exact - flat(problem()[0])).norm()).item()


# ---- plain torch


def stock(model: nn.Module, name: str, decay: dict[str, Any]) -> torch.optim.Optimizer:
    """torch's own optimizer; to its SGD, decoupled decay is added in the way of its AdamW."""
    options, rate = OPTIMIZERS[name], decay.get("weight_decay", 0)
    is_decoupled = decay.get("decay") == "decoupled"
    if is_adam(name):
        kind = torch.optim.AdamW if is_decoupled else torch.optim.Adam
        return kind(model.parameters(), **options, weight_decay=rate)
    if not is_decoupled:
        return torch.optim.SGD(model.parameters(), **options, weight_decay=rate)

    def shrink(*_: object) -> None:
        for parameter in model.parameters():
            parameter.data.mul_(1 - options["lr"] * rate)

    optimizer = torch.optim.SGD(model.parameters(), **options)
    optimizer.register_step_pre_hook(shrink)
    return optimizer


@functools.cache
def plain_distance(name: str, decay: str) -> float:
    """float32 from float64 in the unpowered network under torch's own optimizer."""
    ends = []
    for dtype in (torch.float32, torch.float64):
        model = network(dtype)
        rate = {"weight_decay": DECAY_RATE, "decay": decay} if decay else {}
        train(model, stock(model, name, rate))
        ends.append(flat(model))
    return distance(*ends)


# ---- the formulas of PowerSGD and PowerAdamW, with φ kept in float64


class Written:
    """A vector under the step as the docstrings write it; each element has an exponent."""

    def __init__(self, theta: Tensor, alpha: Tensor, free: Tensor) -> None:
        self.phi = theta.sign() * theta.abs() ** (1 / alpha)
        self.alpha, self.free = alpha, free
        self.states = {name: torch.zeros_like(theta) for name in ("m", "v", "largest")}
        self.count = 0

    @property
    def theta(self) -> Tensor:
        return self.phi.sign() * self.phi.abs() ** self.alpha

    def direction(self, grad: Tensor, name: str) -> Tensor:
        """The optimizer's u, with its states advanced."""
        self.count += 1
        states = self.states
        if is_adam(name):
            states["m"] = 0.9 * states["m"] + 0.1 * grad
            states["v"] = 0.999 * states["v"] + 0.001 * grad**2
            states["largest"] = torch.maximum(states["largest"], states["v"])
            seen = states["largest" if name == "amsgrad" else "v"]
            root = (seen / (1 - 0.999**self.count)).sqrt()
            return states["m"] / (1 - 0.9**self.count) / (root + 1e-8)
        momentum = OPTIMIZERS[name].get("momentum", 0)
        states["m"] = momentum * states["m"] + grad
        return grad + momentum * states["m"] if name == "nesterov" else states["m"]

    def step(self, grad: Tensor, name: str, rule: str, decay: dict[str, Any]) -> None:
        lr, rate = OPTIMIZERS[name]["lr"], decay.get("weight_decay", 0)
        kind = (decay.get("decay"), decay.get("decay_of"))
        slope = self.alpha * self.phi.abs() ** (self.alpha - 1)
        if kind == ("coupled", "theta"):
            grad = grad + rate * self.theta
        if rule == "chain":
            grad = grad * slope
        if kind == ("coupled", "phi"):
            grad = grad + rate * self.phi
        delta = lr * self.direction(grad, name) * (slope if rule == "virtual" else 1)
        kept = torch.ones_like(self.phi)
        if kind[0] == "decoupled":
            kept *= 1 - lr * rate
        if kind == ("decoupled", "theta"):
            kept = kept ** (1 / self.alpha)
        self.phi = torch.where(self.free, kept * self.phi - delta, self.phi)


def train_written(powered: nn.Sequential, name: str, rule: str, decay: dict[str, Any]) -> Tensor:
    """The end of the network ``powered`` if it is trained in float64."""
    alphas, free = [], []
    for layer in powered[::2]:
        mask = layer.update_mask
        alphas += [torch.full_like(layer.weight, layer.alpha.item()), torch.ones_like(layer.bias)]
        free += [torch.ones_like(layer.weight) if mask is None else mask.unpack(), alphas[-1]]
    vector = Written(
        flat(powered),
        torch.cat([alpha.flatten() for alpha in alphas]).double(),
        torch.cat([entries.flatten() for entries in free]).bool(),
    )
    model = network(torch.float64)
    parameters = list(model.parameters())
    for _ in range(STEPS):
        backward(model)
        grad = torch.cat([parameter.grad.flatten() for parameter in parameters])
        vector.step(grad, name, rule, decay)
        nn.utils.vector_to_parameters(vector.theta, parameters)
    return flat(model)


# Each optimizer with each rule and each decay. All four exponents are in each network; they take
# turns in its layers, of which two have a mask: so each meets each optimizer, rule and decay both
# with a mask and without one, but not each triple of them.
CASES = [(turn, *case) for turn, case in enumerate(itertools.product(OPTIMIZERS, RULES, DECAYS))]


def powered(turn: int, stores: str = "theta", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model, draw = network(dtype), torch.Generator().manual_seed(turn)
    for place, layer in enumerate(model[::2]):
        pp.powerize(layer, ALPHAS[(place + turn) % 4], stores)
        if (place + turn // 4) % 2:
            kept = torch.rand(layer.weight.shape, generator=draw) < 0.7
            layer.update_mask = pp.BitMask.pack(kept)
    return model


@pytest.mark.parametrize(("turn", "name", "rule", "decay"), CASES, ids=case_name)
def test_float32_follows_float64(turn: int, name: str, rule: str, decay: dict[str, Any]) -> None:
    model = powered(turn)
    exact = train_written(model, name, rule, decay)
    train(model, power_optimizer(model, name, rule=rule, **decay))
    error = distance(flat(model), exact)
    assert error <= 10 * plain_distance(name, decay.get("decay", ""))
    if decay.get("decay") == "decoupled":
        # torch multiplies by a rounded 1 − lr·λ, which is off by the same in each step.
        assert error <= 5 * plain_distance(name, "")


# ---- a stored φ under the chain rule is the same training


def has_stock(name: str, decay: dict[str, Any]) -> bool:
    """Whether torch has an optimizer whose step of a stored φ is this one."""
    decoupled = decay.get("decay") == "decoupled"
    return decay.get("decay_of", "phi") == "phi" and (is_adam(name) or not decoupled)


@pytest.mark.parametrize("decay", DECAYS, ids=case_name)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_theta_and_phi_models_follow_each_other(name: str, decay: dict[str, Any]) -> None:
    of_theta, of_phi, of_stock = (
        powered(1, stores, torch.float64) for stores in ("theta", "phi", "phi")
    )
    train(of_theta, power_optimizer(of_theta, name, rule="chain", **decay), 100)
    # For a stored φ both rules are the chain rule.
    train(of_phi, power_optimizer(of_phi, name, rule="virtual", **decay), 100)
    torch.testing.assert_close(flat(of_theta), flat(of_phi), rtol=1e-9, atol=1e-11)
    if not has_stock(name, decay):
        return
    masks = [layer.update_mask for layer in of_stock[::2]]
    for layer in of_stock[::2]:
        # torch's own optimizers step unmasked layers only.
        layer.update_mask = None
    optimizer = stock(of_stock, name, decay)
    for _ in range(100):
        before = [layer.weight.detach().clone() for layer in of_stock[::2]]
        train(of_stock, optimizer, 1)
        for layer, mask, weight in zip(of_stock[::2], masks, before, strict=True):
            if mask is not None:
                layer.weight.data.copy_(torch.where(mask.unpack(), layer.weight, weight))
    torch.testing.assert_close(flat(of_stock), flat(of_phi), rtol=1e-9, atol=1e-11)
