"""Layers and optimizers on a GPU: against float64 on the CPU, with AMP, without waiting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ppkernels as pp

Network = Callable[..., nn.Sequential]
Batch = Callable[[int], tuple[Tensor, Tensor]]
OptimizerOf = Callable[..., torch.optim.Optimizer]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    weight = next(model.parameters())
    x, y = (tensor.to(weight.device, weight.dtype) for tensor in batch)
    return (model(x) - y).float().square().mean()


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, steps: int = 8
) -> nn.Module:
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
    return model


def distance(model: nn.Module, other: nn.Module) -> float:
    """How far the parameters are from those of ``other``, relative to its own."""
    pairs = list(zip(model.parameters(), other.parameters(), strict=True))
    off = sum((mine.cpu().double() - its.double()).square().sum() for mine, its in pairs)
    return (off / sum(its.double().square().sum() for _, its in pairs)).sqrt().item()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)],
    ids=["float64", "float32", "bfloat16"],
)
def test_training_follows_float64(
    device: str,
    stores: str,
    dtype: torch.dtype,
    tolerance: float,
    network: Network,
    batch: Batch,
    optimizer_of: OptimizerOf,
) -> None:
    """Also from a device to another in the middle; what is frozen keeps its bits."""
    exact = network(stores).double()
    model = copy.deepcopy(exact).to(device, dtype)
    options = {"master_weights": True, "eps": 1e-4} if dtype is torch.bfloat16 else {}
    exact_options = {"eps": 1e-4} if options else {}
    start = model[3].weight.detach().cpu().clone()
    make = [
        lambda params, own=own: optimizer_of(params, **only_known(optimizer_of, own))
        for own in (exact_options, options)
    ]
    train(exact, make[0](exact), batch)
    train(model, make[1](model), batch)
    assert distance(model, exact) < tolerance
    assert distance(model, network(stores).double()) > 2 * tolerance
    frozen = ~model[3].update_mask.cpu().unpack()
    assert torch.equal(model[3].weight.detach().cpu()[frozen], start[frozen])


def only_known(optimizer_of: OptimizerOf, options: dict[str, Any]) -> dict[str, Any]:
    """Those of ``options`` that the optimizer has: SGD has no eps."""
    known = optimizer_of([torch.zeros(1)]).defaults
    return {name: value for name, value in options.items() if name in known}


def test_a_state_moves_between_devices(
    device: str, network: Network, batch: Batch, optimizer_of: OptimizerOf
) -> None:
    model = network()
    optimizer = optimizer_of(model)
    train(model, optimizer, batch, 3)
    moved = copy.deepcopy(model).to(device)
    other = optimizer_of(moved)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batch, 3)
    train(moved, other, batch, 3)
    assert distance(moved, model) < 1e-4
    states = [value for state in other.state.values() for value in state.values()]
    assert {value.device.type for value in states} == {device}


# ---- loss scaling


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_with_a_grad_scaler(
    device: str, stores: str, half: torch.dtype, batch: Batch, optimizer_of: OptimizerOf
) -> None:
    """With clipped gradients. An overflow leaves everything as it was, but for the scale."""
    torch.manual_seed(0)
    # Without convolutions, which a CPU need not have in float16.
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 64), nn.Tanh(), nn.Linear(64, 5))
    pp.powerize(model, 1.5, stores).to(device)
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=1000)
    losses = []
    for step in range(25):
        optimizer.zero_grad()
        with torch.autocast(device, half):
            loss = loss_of(model, batch(0))
        scaler.scale(loss).backward()
        before = [tensor.detach().clone() for tensor in everything(model, optimizer)]
        if step == 20:
            model[1].weight.grad[0, 0] = torch.inf
        if step % 2:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        after = everything(model, optimizer)[: len(before)]
        moved = [not torch.equal(*pair) for pair in zip(after, before, strict=True)]
        assert any(moved) == (step != 20), step
    assert losses[-1] < losses[0] / 2
    assert scaler.get_scale() == 512.0


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for own in optimizer.state.values() for value in own.values()]
    return [*model.parameters(), *state]


def test_a_scaled_step_is_the_step_without_scale(
    device: str, network: Network, batch: Batch, optimizer_of: OptimizerOf
) -> None:
    """Gradients that are clipped after unscale_, and gradients that the step itself unscales."""
    models = [network().to(device) for _ in range(3)]
    optimizers = [optimizer_of(model) for model in models]
    scaler = [torch.amp.GradScaler(device, init_scale=1024.0) for _ in range(2)]
    for step in range(4):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            # One backward for all: convolutions on a GPU add up in any order.
            if model is not models[0]:
                for mine, first in zip(model.parameters(), models[0].parameters(), strict=True):
                    mine.grad = first.grad * 1024.0
            else:
                loss_of(model, batch(step)).backward()
        for i, each in enumerate(scaler):
            each.scale(torch.zeros((), device=device))
            if i == 1:
                each.unscale_(optimizers[2])
                nn.utils.clip_grad_norm_(models[2].parameters(), 1e9)
            each.step(optimizers[i + 1])
            each.update()
        optimizers[0].step()
    for model in models[1:]:
        assert all(map(torch.equal, model.parameters(), models[0].parameters()))


# ---- nothing waits


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """An error where the host waits for a GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scaled", [False, True])
def test_nothing_waits(
    device: str,
    stores: str,
    scaled: bool,
    network: Network,
    batch: Batch,
    optimizer_of: OptimizerOf,
) -> None:
    """Forward, backward and step, while rate and exponents change."""
    model = network(stores).to(device)
    lr = torch.tensor(0.01, device=device)
    optimizer = optimizer_of(model, lr=lr)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=scaled)
    x, y = (tensor.to(device, torch.float32) for tensor in batch(0))
    start = [parameter.detach().clone() for parameter in model.parameters()]

    def step() -> None:
        optimizer.zero_grad()
        scaler.scale((model(x) - y).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    step()
    with no_waiting(device):
        for rate in (0.01, 0.02):
            step()
            lr.fill_(rate)
            pp.set_alpha(model, 1.0 + 50 * rate, keep="theta")
        model[0].update_mask = pp.BitMask.zeros((8, 3, 3, 3), device)
        step()
    assert not any(map(torch.equal, model.parameters(), start))


def test_waiting_would_be_noticed(device: str) -> None:
    number = torch.ones((), device=device)
    if device == "cpu":
        with no_waiting(device):
            assert number.item() == 1
        return
    with no_waiting(device), pytest.raises(RuntimeError, match="synchroniz"):
        number.item()


def test_an_optimizer_over_two_devices(device: str, network: Network, batch: Batch) -> None:
    """The CPU and a GPU, or the CPU twice."""
    model, twin = network(), network()
    model[3:].to(device)
    optimizers = [pp.optim.PowerAdamW(net, 0.01) for net in (model, twin)]
    for step in range(3):
        x, y = (tensor.float() for tensor in batch(step))
        for net, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            hidden = net[:3](x)
            out = net[3:](hidden.to(next(net[3:].parameters()).device))
            (out.cpu() - y).square().mean().backward()
            optimizer.step()
    assert distance(model, twin) < 1e-4
