"""Training goes on from checkpoints and copies as if nothing had happened, bit for bit.

Run as a script, it goes on in a process of its own: ``test_resume.py <folder of checkpoints>``.
"""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

import ppkernels as pp

ROOT = Path(__file__).parents[2]
FIRST, ALL = 6, 14

pytestmark = pytest.mark.usefixtures("one_thread")


class Run:
    """A training run: model, optimizer, scheduler and, for float16, the loss scaler.

    Args:
        name: a row of `RUNS`.
        seed: of the start, which differs from run to run unless it is loaded.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        torch.manual_seed(seed)
        kind, options, dtype = RUNS[name]
        self.model = network().to(dtype)
        masks = torch.Generator().manual_seed(seed)
        for layer in (self.model[0], self.model[5]):
            kept = torch.rand(layer.weight.shape, generator=masks) < 0.6
            layer.update_mask = pp.BitMask.pack(kept)
        # A learning rate that is a tensor changes in place.
        self.optimizer = kind(self.model, **copy.deepcopy(options))
        lr = float(options["lr"])
        self.scheduler = (
            CosineAnnealingLR(self.optimizer, 10)
            if "amsgrad" in options
            else OneCycleLR(self.optimizer, lr, total_steps=ALL)
        )
        is_scaled = dtype == torch.float16
        self.scaler = torch.amp.GradScaler("cpu", 2.0**20, growth_interval=2, enabled=is_scaled)

    def train(self, first: int, last: int) -> Run:
        for step in range(first, last):
            draw = torch.Generator().manual_seed(step)
            x, y = torch.randn(8, 2, 5, 5, generator=draw), torch.randn(8, 3, generator=draw)
            self.optimizer.zero_grad()
            came = self.model(x.to(self.model[0].weight.dtype)).float()
            self.scaler.scale(F.mse_loss(came, y)).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.scheduler.step()
        return self

    def state_dict(self) -> dict[str, Any]:
        parts = ("model", "optimizer", "scheduler", "scaler")
        return {part: getattr(self, part).state_dict() for part in parts}

    def load_state_dict(self, state: dict[str, Any]) -> Run:
        for part, values in state.items():
            getattr(self, part).load_state_dict(values)
        return self


def network() -> nn.Sequential:
    """θ and φ stored, channels_last, a mask on each form, and layers that are not powered."""
    return nn.Sequential(
        pp.nn.PowerConv2d(2, 7, 3, alpha=1.25).to(memory_format=torch.channels_last),
        nn.BatchNorm2d(7),
        nn.Flatten(),
        pp.nn.PowerLinear(63, 9, alpha=2.0),
        nn.Tanh(),
        pp.nn.PowerLinear(9, 9, alpha=1.5, stores="phi"),
        nn.Linear(9, 3),
    )


SGD, ADAMW = pp.optim.PowerSGD, pp.optim.PowerAdamW
MOMENTUM = {"lr": 0.05, "momentum": 0.9}
RUNS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], torch.dtype]] = {
    "sgd-virtual": (
        SGD,
        {**MOMENTUM, "dampening": 0.2, "weight_decay": 0.1, "decay": "decoupled"},
        torch.float32,
    ),
    "sgd-chain": (
        SGD,
        {**MOMENTUM, "nesterov": True, "rule": "chain", "weight_decay": 0.1, "decay_of": "phi"},
        torch.float32,
    ),
    "sgd-master": (SGD, {**MOMENTUM, "master_weights": True}, torch.bfloat16),
    "sgd-half": (SGD, {**MOMENTUM, "rule": "chain"}, torch.bfloat16),
    "adamw-virtual": (ADAMW, {"lr": 0.01, "weight_decay": 0.1}, torch.float64),
    "adamw-chain": (
        ADAMW,
        {
            "lr": torch.tensor(0.01),
            "amsgrad": True,
            "rule": "chain",
            "weight_decay": 0.1,
            "decay": "coupled",
            "decay_of": "phi",
        },
        torch.float32,
    ),
    "adamw-scaled": (ADAMW, {"lr": 0.01, "eps": 1e-6, "master_weights": True}, torch.float16),
}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested states differ; tensors have to have the same bits."""
    if isinstance(a, dict):
        keys = [] if isinstance(b, dict) and a.keys() == b.keys() else [f"{path}: keys"]
        return keys + [d for k in a for d in differences(a[k], b.get(k), f"{path}.{k}")]
    if isinstance(a, (list, tuple)):
        return [
            d
            for i, pair in enumerate(zip(a, b, strict=True))
            for d in differences(*pair, f"{path}[{i}]")
        ]
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and (a.dtype, a.stride()) == (b.dtype, b.stride())
        return [] if same and torch.equal(a, b) else [f"{path}: {a} and {b}"]
    return [] if a == b else [f"{path}: {a} and {b}"]


def resume_all(folder: Path) -> None:
    """Each run goes on from its checkpoint in ``folder`` and leaves its end there."""
    torch.set_num_threads(1)
    for name in RUNS:
        run = Run(name, seed=1)
        run.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
        torch.save(run.train(FIRST, ALL).state_dict(), folder / f"{name}.end.pt")


# ---- checkpoints and copies


def test_resume_in_another_process(tmp_path: Path) -> None:
    whole = {}
    for name in RUNS:
        torch.save(Run(name).train(0, FIRST).state_dict(), tmp_path / f"{name}.pt")
        whole[name] = Run(name).train(0, ALL).state_dict()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, __file__, tmp_path], check=True, env=environment)
    for name, state in whole.items():
        came = torch.load(tmp_path / f"{name}.end.pt", weights_only=True)
        assert differences(state, came, name) == []


def through_safetensors(run: Run) -> Run:
    """The model by way of safetensors, which takes contiguous tensors only."""
    tensors = pytest.importorskip("safetensors.torch")
    state = copy.deepcopy(run.state_dict())
    values = {name: tensor.contiguous() for name, tensor in state["model"].items()}
    state["model"] = tensors.load(tensors.save(values))
    return Run(run.name, seed=1).load_state_dict(state)


def parts_copied(run: Run, copied: Callable[[Any], Any]) -> Run:
    """Model, optimizer, scheduler and scaler as one object."""
    other = copy.copy(run)
    other.__dict__.update(copied(run.__dict__))
    return other


WAYS: dict[str, Callable[[Run], Run]] = {
    "deepcopy": lambda run: parts_copied(run, copy.deepcopy),
    "pickle": lambda run: parts_copied(run, lambda parts: pickle.loads(pickle.dumps(parts))),
    "state_dict": lambda run: Run(run.name, 1).load_state_dict(copy.deepcopy(run.state_dict())),
    "safetensors": through_safetensors,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", RUNS)
def test_resume_from_a_copy(name: str, way: str) -> None:
    run = Run(name).train(0, FIRST)
    other = WAYS[way](run)
    for here, there in zip(run.model.parameters(), other.model.parameters(), strict=True):
        assert here.data_ptr() != there.data_ptr()
    other.train(FIRST, ALL)
    run.train(FIRST, ALL)
    assert differences(run.state_dict(), other.state_dict()) == []


# ---- from torch's optimizers, and to them

DECAYING = {"weight_decay": 0.1}
STOCK: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05, **DECAYING}),
    "momentum": (torch.optim.SGD, {**MOMENTUM, "dampening": 0.2, **DECAYING}),
    "nesterov": (torch.optim.SGD, {**MOMENTUM, "nesterov": True, "maximize": True}),
    "sgd-fused": (torch.optim.SGD, {**MOMENTUM, "fused": True, **DECAYING}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "betas": (0.8, 0.99), **DECAYING}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "eps": 1e-6}),
    "adam-decoupled": (torch.optim.Adam, {"lr": 0.01, "decoupled_weight_decay": True, **DECAYING}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, **DECAYING}),
    "adamw-fused": (torch.optim.AdamW, {"lr": 0.01, "fused": True, "amsgrad": True, **DECAYING}),
    "adamw-foreach": (torch.optim.AdamW, {"lr": 0.01, "foreach": True}),
}


def stored_phi() -> nn.Module:
    """A network that torch's own optimizers may step."""
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 2)]
    return pp.powerize(nn.Sequential(*layers).double(), 1.5, "phi")


def take_steps(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(16, 5, dtype=torch.float64, generator=draw)
        model(x).square().mean().backward()
        optimizer.step()


def power_twin(kind: type[torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer here of the same formula; torch decays what is stored."""
    twin = SGD if kind is torch.optim.SGD else ADAMW
    return twin(model, lr=1.0, decay_of="phi", rule="chain")


def check_goes_on(optimizers: list[torch.optim.Optimizer], models: list[nn.Module]) -> None:
    """From the state of the first optimizer, the second takes the same steps."""
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        take_steps(model, optimizer, 5)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", STOCK)
def test_states_of_torch_optimizers_go_on_here(name: str) -> None:
    kind, options = STOCK[name]
    models = [stored_phi(), stored_phi()]
    stock = kind(models[0].parameters(), **options)
    take_steps(models[0], stock, 5)
    check_goes_on([stock, power_twin(kind, models[1])], models)


@pytest.mark.parametrize("name", STOCK)
def test_states_from_here_go_on_in_torch_optimizers(name: str) -> None:
    kind, options = STOCK[name]
    models = [stored_phi(), stored_phi()]
    power = power_twin(kind, models[0])
    # By way of a state, the options in torch's words become those of the optimizer here.
    power.load_state_dict(kind(models[0].parameters(), **options).state_dict())
    take_steps(models[0], power, 5)
    check_goes_on([power, kind(models[1].parameters(), **options)], models)


@pytest.mark.parametrize(
    "stored",
    [
        lambda count: torch.tensor(count, dtype=torch.float64),
        lambda count: torch.tensor([count]),
        lambda count: count,
    ],
    ids=["float64, a default dtype", "int64 of one element", "a number, before torch 1.12"],
)
def test_counts_of_another_kind(stored: Callable[[float], Any]) -> None:
    models = [stored_phi(), stored_phi()]
    stock = torch.optim.AdamW(models[0].parameters(), 0.01)
    take_steps(models[0], stock, 3)
    state = copy.deepcopy(stock.state_dict())
    for values in state["state"].values():
        values["step"] = stored(int(values["step"]))
    power = power_twin(torch.optim.AdamW, models[1])
    power.load_state_dict(state)
    models[1].load_state_dict(models[0].state_dict())
    for values in power.state.values():
        assert (values["step"].dtype, values["step"].shape) == (torch.float32, ())
    for model, optimizer in zip(models, (stock, power), strict=True):
        take_steps(model, optimizer, 2)
    torch.testing.assert_close(models[0][0].weight, models[1][0].weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["momentum", "adam", "amsgrad"])
def test_half_states_widen_beside_a_master_copy(name: str) -> None:
    kind, options = STOCK[name]
    model = stored_phi().bfloat16()
    weight, grad = model[0].weight, torch.randn(8, 5).bfloat16()
    stock = kind(model.parameters(), **options)
    weight.grad = grad.clone()
    stock.step()
    twin = SGD if kind is torch.optim.SGD else ADAMW
    power = twin(model, lr=1.0, master_weights=True)
    power.load_state_dict(stock.state_dict())
    before = {key: value.clone() for key, value in stock.state[weight].items()}
    # A step of no length shows the states as they have come.
    power.param_groups[0].update(lr=0.0, weight_decay=0.0)
    weight.grad = torch.zeros_like(weight)
    power.step()
    state = power.state[weight]
    assert torch.equal(state["master"], weight.float())
    share = {"momentum_buffer": 0.9, "exp_avg": options.get("betas", (0.9,))[0]}
    for key in share.keys() & before.keys():
        assert state[key].dtype == torch.float32
        torch.testing.assert_close(state[key], before[key].float() * share[key])


if __name__ == "__main__":
    resume_all(Path(sys.argv[1]))
