"""What a CUDA graph asks of a step: nothing on the host decides, and nothing is asked of a GPU.

Tensors of FakeTensorMode claim to be on a GPU and hold no values, so that whoever asks for one is
found out. What kernels do on a real one is tested in tests/gpu.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import ppkernels as pp
from ppkernels.optim import batch, power_optimizer

KINDS: dict[str, Any] = {
    "sgd": (pp.optim.PowerSGD, {"lr": 0.05}),
    "momentum": (pp.optim.PowerSGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1}),
    "adamw": (pp.optim.PowerAdamW, {"lr": 0.01, "weight_decay": 0.1}),
    "amsgrad": (pp.optim.PowerAdamW, {"lr": 0.01, "amsgrad": True, "decay": "coupled"}),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def network(**where: Any) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 2))
    pp.powerize(model[:3], 1.5).to(**where)
    model.to(**where)
    model[0].update_mask = pp.BitMask.ones((16, 5))
    return model


def optimizer_of(kind: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    make, own = KINDS[kind]
    return make(params, **{**own, **options})


def fill_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@each_kind
def test_a_learning_rate_in_a_tensor_is_read_at_each_step(kind: str, dtype: torch.dtype) -> None:
    model = network()
    twin = copy.deepcopy(model)
    lr = torch.tensor(0.0, dtype=dtype)
    optimizer, by_hand = optimizer_of(kind, model, lr=lr), optimizer_of(kind, twin)
    for rate in (0.05, 0.05, 0.01, 0.0):
        lr.fill_(rate)
        by_hand.param_groups[0]["lr"] = lr.item()
        fill_gradients(model)
        for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = mine.grad
        optimizer.step()
        by_hand.step()
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
    assert optimizer.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize("scaled", [False, True])
@each_kind
def test_no_value_is_asked_of_a_gpu(kind: str, scaled: bool, stores: str) -> None:
    """From the second step on; the first of SGD with dampening has to know if it is left out."""
    # The exponent of plain parameters, and "no mask", are values of the host.
    with FakeTensorMode(allow_non_fake_inputs=True):
        layers = nn.Linear(5, 16, device="cuda"), nn.Linear(16, 2, device="cuda")
        model = pp.powerize(nn.Sequential(*layers), 1.5, stores)
        # Layers that share a weight have to agree: their values are compared when one comes anew.
        model[0].update_mask = pp.BitMask.zeros((16, 5), "cuda")
        model[1].mask = pp.BitMask.zeros((2, 16), "cuda")
        lr = torch.zeros((), device="cuda")
        # Its checks, once, read the rate.
        optimizer = optimizer_of(kind, model)
        optimizer.param_groups[0]["lr"] = lr
        for step in range(3):
            # A backward pass looks for a GPU; those of tests/gpu need one.
            model(torch.zeros(3, 5, device="cuda"))
            fill_gradients(model)
            if scaled and step > 0:
                optimizer.grad_scale = torch.ones((), device="cuda")
                optimizer.found_inf = torch.zeros((), device="cuda")
            optimizer.step()
        for parameter in model.parameters():
            for state in optimizer.state[parameter].values():
                assert state.device.type == "cuda"


def test_asking_for_a_value_would_be_noticed() -> None:
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        torch.zeros((), device="cuda").item()


@pytest.mark.parametrize("half", [False, True])
@each_kind
def test_state_must_be_there_before_a_capture(
    kind: str, half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """State that a graph made would begin anew at every replay. The step before makes all of it."""
    model = network(dtype=torch.bfloat16 if half else None)
    optimizer = optimizer_of(kind, model, master_weights=half)
    fill_gradients(model)
    for module in (power_optimizer, batch):
        monkeypatch.setattr(module, "is_captured", lambda device: True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    if kind == "sgd" and not half:
        optimizer.step()
        return
    with pytest.raises(RuntimeError, match="take a step before the capture begins"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
    assert not any(optimizer.state.values())
    monkeypatch.undo()
    optimizer.step()
    for module in (power_optimizer, batch):
        monkeypatch.setattr(module, "is_captured", lambda device: True)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))


def test_values_of_tied_layers_are_compared_after_a_capture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(*(pp.nn.PowerLinear(4, 4, alpha=1.5) for _ in range(2)))
    model[1].weight = model[0].weight
    optimizer = pp.optim.PowerSGD(model, 0.1)
    model[1].alpha = torch.tensor(2.0, dtype=torch.float64)
    fill_gradients(model)
    with monkeypatch.context() as patch:
        for module in (power_optimizer, batch):
            patch.setattr(module, "is_captured", lambda device: True)
        optimizer.step()
    with pytest.raises(ValueError, match="share one weight, so they need the same alpha"):
        optimizer.step()


@each_kind
def test_a_captured_step_refuses_a_learning_rate_on_the_host(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that was loaded to the CPU brings one, and replays would not follow it."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.Linear(5, 16, device="cuda")
        optimizer = optimizer_of(kind, model)
        fill_gradients(model)
        optimizer.step()
        for name in ("_checks", "optim.power_optimizer", "optim.batch"):
            monkeypatch.setattr(f"ppkernels.{name}.is_captured", lambda device: True)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = torch.zeros(())
        with pytest.raises(RuntimeError, match=r"value that lr, a tensor on the CPU, has now"):
            optimizer.step()
