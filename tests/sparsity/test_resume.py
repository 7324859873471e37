"""A pruner's checkpoint: training goes on bit for bit, and bad checkpoints are refused."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import ppkernels as pp
from ppkernels.sparsity import (
    ERK,
    Cosine,
    Cubic,
    Iterative,
    NofM,
    OneShot,
    Pruner,
    Random,
    Sensitivity,
    Uniform,
)

MakeModel = Callable[..., nn.Sequential]
Optimizer = torch.optim.Optimizer
STEPS, EPOCH = 24, 4


def network(kind: str) -> nn.Module:
    """With a norm, whose statistics are state, and dropout, which draws random numbers."""
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(8 * 16, 10),
    )
    return model if kind == "plain" else pp.powerize(model, 1.5, kind)


SGD = (lambda model: pp.optim.PowerSGD(model, lr=0.05, momentum=0.9), ["theta", "phi", "plain"])
ADAM = (lambda model: pp.optim.PowerAdamW(model, lr=0.01), ["theta", "plain"])
TORCH = (
    lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    ["phi", "plain"],
)
OPTIMIZERS = {"sgd": SGD, "adamw": ADAM, "torch": TORCH}
CHOICES: dict[str, Callable[[nn.Module], Pruner]] = {
    "cubic": lambda model: Pruner(model, Cubic(0.1, 2, 20, 3)),
    "sensitivity": lambda model: Pruner(
        model, Cosine(0.2, 0, 20, 5), score=Sensitivity(), distribution=ERK()
    ),
    "random": lambda model: Pruner(model, Cubic(0.1, 2, 20, 3), score=Random(5)),
    "2:4": lambda model: Pruner(
        model, Cubic(0.5, 2, 20, 3), distribution=Uniform(), type=NofM(2, 4)
    ),
    "tickets": lambda model: Pruner(model, Iterative(0.2, rounds=4, every=5, begin=1)),
}


class Run:
    """Everything that a training has, and how it is saved."""

    def __init__(
        self,
        kind: str,
        make_optimizer: Callable[[nn.Module], Optimizer],
        make_pruner: Callable[[nn.Module], Pruner],
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.model = network(kind)
        self.pruner = make_pruner(self.model)
        self.make_optimizer = make_optimizer
        self.optimizer = make_optimizer(self.model)

    def train(self, first: int, last: int) -> None:
        data = TensorDataset(
            torch.randn(16, 4, 6, 6, generator=torch.Generator().manual_seed(1)),
            torch.arange(16) % 10,
        )
        for epoch in range(first // EPOCH, last // EPOCH):
            order = torch.Generator().manual_seed(epoch)
            for images, labels in DataLoader(data, 4, shuffle=True, generator=order):
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(images), labels).backward()
                self.optimizer.step()
                is_pruned = self.pruner.step()
                if isinstance(self.pruner.schedule, Iterative):
                    if self.pruner.steps == self.pruner.schedule.begin:
                        self.pruner.remember()
                    if is_pruned:
                        self.pruner.rewind()
                        self.optimizer = self.make_optimizer(self.model)

    def save(self) -> io.BytesIO:
        file = io.BytesIO()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pruner": self.pruner.state_dict(),
            "random": torch.get_rng_state(),
        }
        torch.save(state, file)
        file.seek(0)
        return file

    def load(self, file: io.BytesIO) -> None:
        state = torch.load(file)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pruner.load_state_dict(state["pruner"])
        torch.set_rng_state(state["random"])


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize(
    ("make_optimizer", "kind"),
    [(make, kind) for make, kinds in OPTIMIZERS.values() for kind in kinds],
    ids=[f"{name}-{kind}" for name, (_, kinds) in OPTIMIZERS.items() for kind in kinds],
)
def test_resuming_in_mid_schedule_changes_nothing(
    make_optimizer: Callable[[nn.Module], Optimizer], kind: str, choices: str
) -> None:
    uninterrupted = Run(kind, make_optimizer, CHOICES[choices], seed=0)
    uninterrupted.train(0, 12)
    file = uninterrupted.save()
    uninterrupted.train(12, STEPS)

    resumed = Run(kind, make_optimizer, CHOICES[choices], seed=99)
    resumed.load(file)
    assert 0 < resumed.pruner.prunings < uninterrupted.pruner.prunings
    resumed.train(12, STEPS)

    wanted, found = uninterrupted.model.state_dict(), resumed.model.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert resumed.pruner.masks() == uninterrupted.pruner.masks()
    assert resumed.pruner.kept() == uninterrupted.pruner.kept()
    assert resumed.pruner.kept().share < 1


@pytest.mark.parametrize("order", ["model first", "pruner first"])
def test_masks_are_restored_whatever_the_models_checkpoint_has(
    make_model: MakeModel, order: str
) -> None:
    model = make_model("plain")
    pruner = Pruner(model, OneShot(0.1))
    pruner.prune()
    masks, state = pruner.masks(), pruner.state_dict()
    weights = pp.fold(copy.deepcopy(model)).state_dict()
    assert not any("mask" in name for name in weights)

    other = make_model("plain")
    resumed = Pruner(other, OneShot(0.1))
    if order == "model first":
        other.load_state_dict(weights)
    resumed.load_state_dict(state)
    if order == "pruner first":
        other.load_state_dict(weights)
    assert resumed.masks() == masks
    for name, mask in masks.items():
        assert other.get_submodule(name).update_mask == mask
        assert torch.equal(other.get_submodule(name).weight, model.get_submodule(name).weight)


def test_a_users_mask_survives(make_model: MakeModel) -> None:
    def frozen(model: nn.Module) -> Pruner:
        model[0].update_mask = trained
        return Pruner(model, Cubic(0.1, 0, 10))

    trained = pp.BitMask.pack(torch.rand(30, 20) < 0.5)
    model = make_model()
    pruner = frozen(model)
    for _ in range(5):
        pruner.step()
    other = make_model()
    resumed = frozen(other)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(pruner.state_dict())
    for _ in range(5):
        pruner.step()
        resumed.step()
    assert resumed.kept() == pruner.kept()
    assert other[0].update_mask == model[0].update_mask


def test_an_unpruned_state_freezes_nothing(make_model: MakeModel) -> None:
    model, other = make_model(), make_model()
    resumed = Pruner(other, Cubic(0.1, 5, 10))
    resumed.load_state_dict(Pruner(model, Cubic(0.1, 5, 10)).state_dict())
    assert other[0].update_mask is None


def _words(state: dict[str, Any], name: str, words: Tensor) -> dict[str, Any]:
    return {**state, "kept": {**state["kept"], name: words}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: _words(state, "fc", torch.zeros(3, dtype=torch.uint8)),
            "Pruner.load_state_dict: 'fc' is none of the layers to prune, which are '0', '2'",
        ),
        (
            lambda state: _words(state, "2", torch.zeros(3, dtype=torch.uint8)),
            "Pruner.load_state_dict: '2': BitMask: words must have one bit for each of 300",
        ),
        (
            lambda state: {"steps": 3},
            "Pruner.load_state_dict: the keys must be ['steps', 'prunings', 'kept', 'remembered']",
        ),
    ],
)
def test_errors(make_model: MakeModel, change: Any, message: str) -> None:
    pruner = Pruner(make_model(), OneShot(0.1))
    pruner.prune(0.5)
    before = copy.deepcopy(pruner.state_dict())
    masks = pruner.masks()
    with pytest.raises(ValueError, match=re.escape(message)):
        pruner.load_state_dict(change(before))
    assert pruner.masks() == masks
