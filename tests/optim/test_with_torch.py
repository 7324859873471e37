"""The optimizers among what PyTorch has around an optimizer: schedulers, loss scaling, averages."""
# Longer than 350 lines: many short tests of one subject, which all train one network.

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import ppkernels as pp

KINDS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (pp.optim.PowerSGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "adamw": (pp.optim.PowerAdamW, {"lr": 0.01, "weight_decay": 0.1}),
}
# For float16: g² may be 0 there, and then ε is all that the step is divided by.
WIDE_EPS: dict[str, dict[str, Any]] = {"sgd": {}, "adamw": {"eps": 1e-4}}

pytestmark = pytest.mark.usefixtures("one_thread")
each_kind = pytest.mark.parametrize("kind", KINDS)


def network() -> nn.Sequential:
    """Two powered layers of different exponents, one of them masked, and a plain one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.LayerNorm(16))
    pp.powerize(model[0], 1.5)
    pp.powerize(model[2], 2.0)
    model[2].update_mask = pp.BitMask.pack(torch.rand(16, 16) < 0.7)
    return model.append(nn.Linear(16, 2))


def optimizer_of(kind: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    make, own = KINDS[kind]
    return make(params, **{**own, **options})


def loss_of(model: nn.Module, step: int = 0, rows: slice = slice(None)) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 5, generator=draw)[rows], torch.randn(16, 2, generator=draw)[rows]
    dtype = next(model.parameters()).dtype
    return (model(x.to(dtype)).float() - y).square().mean()


def backward(model: nn.Module, step: int = 0) -> None:
    model.zero_grad()
    loss_of(model, step).backward()


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        backward(model, step)
        optimizer.step()


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, model.parameters(), other.parameters()))


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    state = [value for own in optimizer.state.values() for value in own.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]


# ---- what changes between steps


def schedules(optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], Any]]:
    return {
        "OneCycleLR": lambda: lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=10),
        "CyclicLR": lambda: lr_scheduler.CyclicLR(optimizer, 0.01, 0.05, step_size_up=3),
        "CosineAnnealingLR": lambda: lr_scheduler.CosineAnnealingLR(optimizer, 8),
        "SequentialLR": lambda: lr_scheduler.SequentialLR(
            optimizer,
            [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.ExponentialLR(optimizer, 0.9)],
            [4],
        ),
        "SWALR": lambda: SWALR(optimizer, 0.02, anneal_epochs=3),
    }


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("name", schedules(torch.optim.SGD([torch.ones(1)])))
@each_kind
def test_schedulers(kind: str, name: str, as_tensor: bool) -> None:
    """Rate and momentum of each step are those that the scheduler has written into the group."""
    model = network()
    twin = copy.deepcopy(model)
    lr = torch.tensor(0.05) if as_tensor else 0.05
    optimizer, by_hand = optimizer_of(kind, model, lr=lr), optimizer_of(kind, twin)
    scheduler = schedules(optimizer)[name]()
    seen = set()
    for step in range(8):
        group = optimizer.param_groups[0]
        for option in {"momentum", "betas"} & group.keys():
            by_hand.param_groups[0][option] = group[option]
        by_hand.param_groups[0]["lr"] = float(group["lr"])
        seen.add((float(group["lr"]), group.get("momentum"), group.get("betas")))
        for net, own in ((model, optimizer), (twin, by_hand)):
            backward(net, step)
            own.step()
        scheduler.step()
    assert same(model, twin)
    assert len(seen) > 3
    if name in ("OneCycleLR", "CyclicLR"):
        assert len({each[1:] for each in seen}) > 3


@each_kind
def test_groups_with_options_of_their_own(kind: str) -> None:
    """Each group is as an optimizer by itself; one is added in the middle of training."""
    model = network()
    twin = copy.deepcopy(model)
    options = [
        {"lr": 0.01, "rule": "chain", "weight_decay": 0.1, "decay_of": "phi"},
        {"lr": 0.02, "decay": "coupled", "weight_decay": 0.2},
        {"lr": 0.03, "maximize": True},
    ]
    parts = [[net[0], net[2], nn.Sequential(*net[3:])] for net in (model, twin)]
    groups = [
        {"params": part.parameters(), **own} for part, own in zip(parts[0], options, strict=True)
    ]
    optimizer = optimizer_of(kind, groups[:2])
    alone = [optimizer_of(kind, part, **own) for part, own in zip(parts[1], options, strict=True)]
    for step in range(6):
        if step == 3:
            optimizer.add_param_group(groups[2])
        backward(model, step)
        backward(twin, step)
        optimizer.step()
        for each in alone[: len(optimizer.param_groups)]:
            each.step()
    assert same(model, twin)
    assert not same(model, network())


@each_kind
@pytest.mark.parametrize("keep", ["theta", "phi"])
def test_set_alpha_between_steps(kind: str, keep: str) -> None:
    """The next step is that of a fresh model with the new exponent and the old state."""
    model = network()
    optimizer = optimizer_of(kind, model)
    take_steps(model, optimizer, 3)
    pp.set_alpha(model, 3.0, keep=keep)
    twin = copy.deepcopy(model)
    other = optimizer_of(kind, twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert twin[0].alpha.item() == 3.0
    for net, own in ((model, optimizer), (twin, other)):
        take_steps(net, own, 3)
    assert same(model, twin)


@each_kind
def test_parameters_that_come_and_go(kind: str) -> None:
    """Frozen for some steps, a weight rests; then it goes on with the state it had."""
    model = network()
    optimizer = optimizer_of(kind, model)
    take_steps(model, optimizer, 3)
    weight = model[0].weight
    rested = [weight.detach().clone(), copy.deepcopy(dict(optimizer.state[weight]))]
    weight.requires_grad_(False)
    take_steps(model, optimizer, 3)
    assert torch.equal(weight, rested[0])
    assert all(map(torch.equal, optimizer.state[weight].values(), rested[1].values()))
    weight.requires_grad_(True)
    twin = copy.deepcopy(model)
    other = optimizer_of(kind, twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, own in ((model, optimizer), (twin, other)):
        take_steps(net, own, 2)
    assert same(model, twin)
    assert not torch.equal(weight, rested[0])


@each_kind
def test_accumulated_gradients_are_those_of_the_whole_batch(kind: str) -> None:
    model = network().double()
    twin = copy.deepcopy(model)
    optimizers = [optimizer_of(kind, model), optimizer_of(kind, twin)]
    for step in range(5):
        backward(model, step)
        twin.zero_grad()
        for rows in (slice(0, 8), slice(8, 16)):
            (loss_of(twin, step, rows) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@each_kind
def test_clipped_gradients_are_what_is_stepped(kind: str) -> None:
    model = network()
    twin = copy.deepcopy(model)
    clipped, by_hand = optimizer_of(kind, model), optimizer_of(kind, twin)
    for step in range(5):
        backward(model, step)
        backward(twin, step)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        assert norm > 0.01
        for parameter in twin.parameters():
            parameter.grad *= 0.01 / (norm + 1e-6)
        clipped.step()
        by_hand.step()
    assert same(model, twin)


@each_kind
def test_closures(kind: str) -> None:
    """A closure fills the gradients, with gradients enabled, and its loss comes back."""
    model = network()
    twin = copy.deepcopy(model)
    optimizer, other = optimizer_of(kind, model), optimizer_of(kind, twin)

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        model.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(3):
        backward(twin)
        expected = loss_of(twin).item()
        with torch.no_grad():
            assert optimizer.step(closure).item() == expected
        other.step()
    assert same(model, twin)


@each_kind
def test_hooks_of_torch_run_around_a_step(kind: str) -> None:
    model = network()
    optimizer, order = optimizer_of(kind, model), []
    optimizer.register_step_pre_hook(lambda *_: order.append(model[0].weight.detach().clone()))
    optimizer.register_step_post_hook(lambda *_: order.append(model[0].weight.detach().clone()))
    start = model[0].weight.detach().clone()
    take_steps(model, optimizer, 1)
    assert torch.equal(order[0], start)
    assert torch.equal(order[1], model[0].weight)
    assert not torch.equal(*order)


@each_kind
def test_maximize_climbs(kind: str) -> None:
    """Against the sign of the gradient, decay apart: the steps on −L."""
    model = network()
    twin = copy.deepcopy(model)
    optimizers = [optimizer_of(kind, model, maximize=True), optimizer_of(kind, twin)]
    for step in range(5):
        backward(model, step)
        twin.zero_grad()
        loss_of(twin, step).neg().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert same(model, twin)


# ---- loss scaling


def overflow(model: nn.Module) -> None:
    model[2].weight.grad.view(-1)[3] = torch.inf


@pytest.mark.parametrize("unscale", ["never", "by the user", "to clip"])
@pytest.mark.parametrize("overflows", [(), (0,), (0, 1, 4), (2, 3)], ids=str)
@each_kind
def test_grad_scaler(kind: str, overflows: tuple[int, ...], unscale: str) -> None:
    """The steps are those without a scaler; an overflow changes nothing but the scale."""
    model = network()
    twin = copy.deepcopy(model)
    optimizer, unscaled = optimizer_of(kind, model), optimizer_of(kind, twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(7):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step in overflows:
            overflow(model)
        if unscale != "never":
            scaler.unscale_(optimizer)
        if unscale == "to clip":
            nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if step in overflows:
            assert all(map(torch.equal, model.parameters(), before))
            assert scaler.get_scale() == scale / 2
        else:
            assert scaler.get_scale() == scale
            backward(twin, step)
            unscaled.step()
            assert same(model, twin)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        states = optimizer.state[mine], unscaled.state[other]
        assert states[0].keys() == states[1].keys()
        assert all(map(torch.equal, *(state.values() for state in states)))
    assert not hasattr(optimizer, "found_inf")


@each_kind
def test_an_overflow_leaves_state_and_masters(kind: str) -> None:
    model = network().half()
    optimizer = optimizer_of(kind, model, master_weights=True, **WIDE_EPS[kind])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        model.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 3:
            overflow(model)
            before = snapshot(model, optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert len(before) > 2 * len(list(model.parameters()))
    assert all(map(torch.equal, snapshot(model, optimizer), before))


# ---- half precision


@each_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_master_weights_follow_float32_where_half_weights_stall(
    kind: str, dtype: torch.dtype
) -> None:
    start = network().to(dtype).float()
    models = [copy.deepcopy(start), *(copy.deepcopy(start).to(dtype) for _ in range(2))]
    options = {"lr": 0.002, "weight_decay": 0.0, **WIDE_EPS[kind]}
    optimizers = [
        optimizer_of(kind, model, **options, master_weights=model is models[1]) for model in models
    ]
    for step in range(200):
        for model, optimizer in zip(models, optimizers, strict=True):
            backward(model, step)
            optimizer.step()
    exact, shown, stalled = (model[0].weight.detach().float() for model in models)
    master = optimizers[1].state[models[1][0].weight]["master"]
    assert torch.equal(master.to(dtype).float(), shown)
    way = (exact - start[0].weight).norm()
    distance = ((master - exact).norm() / way).item()
    assert distance < 0.02
    assert ((stalled - exact).norm() / way).item() > 10 * distance


@each_kind
def test_autocast(kind: str) -> None:
    model = network()
    optimizer = optimizer_of(kind, model)
    losses = []
    for _ in range(60):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] / 4
    assert model[0].weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@each_kind
def test_the_memory_format_may_change_during_training(kind: str, dtype: torch.dtype) -> None:
    """States and master copies that lie otherwise than their weight are stepped all the same."""
    layer = pp.nn.PowerConv2d(6, 7, 3, alpha=1.5).to(dtype)
    layer.update_mask = pp.BitMask.pack(torch.rand(7, 6, 3, 3) < 0.7)
    twin = copy.deepcopy(layer)
    options = {"master_weights": True, **WIDE_EPS[kind]}
    optimizers = [optimizer_of(kind, each, **options) for each in (layer, twin)]
    grads = torch.randn(6, *layer.weight.shape).to(dtype)
    for step, grad in enumerate(grads):
        if step == 3:
            layer.to(memory_format=torch.channels_last)
        for each, optimizer in zip((layer, twin), optimizers, strict=True):
            each.weight.grad = grad.clone(memory_format=torch.preserve_format)
            optimizer.step()
    assert torch.equal(layer.weight, twin.weight)
    for name, value in optimizers[0].state[layer.weight].items():
        assert torch.equal(value, optimizers[1].state[twin.weight][name]), name


# ---- averages, graphs and backends


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["swa", "ema"])
@each_kind
def test_averaged_models(kind: str, average: Any) -> None:
    """The average is one of θ; exponents and masks are the model's."""
    model = network()
    optimizer = optimizer_of(kind, model)
    averaged = AveragedModel(model, multi_avg_fn=average, use_buffers=True)
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    for step in range(1, 6):
        backward(model, step)
        optimizer.step()
        averaged.update_parameters(model)
        share = 1 / step if average is None else 1.0 if step == 1 else 0.1
        expected = [
            mean + share * (now.detach() - mean)
            for mean, now in zip(expected, model.parameters(), strict=True)
        ]
    update_bn([torch.randn(4, 5)], averaged)
    for came, mean in zip(averaged.module.parameters(), expected, strict=True):
        torch.testing.assert_close(came, mean)
    assert averaged.module[2].update_mask == model[2].update_mask
    assert [averaged.module[i].alpha.item() for i in (0, 2)] == [1.5, 2.0]


@each_kind
def test_a_compiled_model_and_an_eager_step(kind: str) -> None:
    model = network()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager")
    optimizers = [optimizer_of(kind, compiled), optimizer_of(kind, twin)]
    for step in range(5):
        for net, optimizer in zip((compiled, twin), optimizers, strict=True):
            backward(net, step)
            optimizer.step()
        if step == 2:
            for net in (model, twin):
                pp.set_alpha(net, 1.75, keep="theta")
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rule", ["virtual", "chain"])
@each_kind
def test_the_reference_backend_trains_alike(kind: str, rule: str) -> None:
    model = network()
    twin = copy.deepcopy(model)
    take_steps(model, optimizer_of(kind, model, rule=rule), 30)
    with pp.backend("reference"):
        take_steps(twin, optimizer_of(kind, twin, rule=rule), 30)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
