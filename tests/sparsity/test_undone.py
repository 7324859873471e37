"""What is pruned stays so: whoever assigns masks, writes to weights, ties or loads them."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ppkernels as pp
from ppkernels import BitMask
from ppkernels.sparsity import ConstantFanIn, Cubic, NofM, OneShot, Pruner, Uniform, entries_of

MakeModel = Callable[..., nn.Sequential]
Backward = Callable[[nn.Module], None]
ROWS = torch.arange(30 * 20).view(30, 20) >= 80  # all but four rows


def nonzero(model: nn.Module) -> int:
    return sum(int((model[place].weight != 0).sum()) for place in (0, 2))


class Lookahead:
    """Steps another optimizer, and writes averages into the weights after it."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups = inner.param_groups
        self.slow = {
            id(one): one.detach().clone() for group in self.param_groups for one in group["params"]
        }

    @torch.no_grad()
    def step(self) -> None:
        self.inner.step()
        for group in self.param_groups:
            for one in group["params"]:
                one.copy_(self.slow[id(one)].lerp_(one, 0.5))


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "torch": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "pp": lambda model: pp.optim.PowerSGD(model, lr=0.1, momentum=0.9),
}


# ---- masks that are assigned, weights that are written to


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("assigned", ["rows", "none", "exchanged weight"])
def test_what_is_assigned_does_not_free_pruned_entries(
    make_model: MakeModel, backward: Backward, optimizer: str, assigned: str
) -> None:
    model = make_model("plain")
    pruner = Pruner(model, OneShot(0.2))
    pruner.prune()
    before = model[0].weight.detach().clone()
    if assigned == "exchanged weight":
        model[0].update_mask = None
        model[0].weight = nn.Parameter(torch.ones(30, 20))
    else:
        model[0].update_mask = BitMask.pack(ROWS) if assigned == "rows" else None
    assert not pruner.step()
    step = OPTIMIZERS[optimizer](model)
    for _ in range(3):
        backward(model)
        step.step()
        pruner.step()
    assert nonzero(model) == 180
    if assigned == "rows":
        assert torch.equal(model[0].weight[:4], before[:4])
        assert model[0].update_mask == pruner.masks()["0"] & BitMask.pack(ROWS)


def test_a_wrapper_that_writes_after_the_step_brings_nothing_back(
    make_model: MakeModel, backward: Backward
) -> None:
    model = make_model("plain")
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    pruner = Pruner(model, OneShot(0.2, at=2))
    for step in range(1, 7):
        backward(model)
        optimizer.step()
        pruner.step()
        assert (nonzero(model) == 180) == (step >= 2)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("through", ["nothing", "copy"])
def test_steps_of_optimizers_cost_no_pass(
    make_model: MakeModel,
    backward: Backward,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    through: str,
) -> None:
    model = make_model("plain")
    pruner = Pruner(model, OneShot(0.2))
    pruner.prune()
    if through == "copy":
        model, pruner = copy.deepcopy((model, pruner))
        pruner.step()
    step = OPTIMIZERS[optimizer](model)
    monkeypatch.setattr(
        type(pruner._entries), "enforce", lambda _: pytest.fail("nothing was undone")
    )
    for _ in range(4):
        backward(model)
        step.step()
        pruner.step()


def test_a_write_between_two_optimizer_steps_is_noticed(
    make_model: MakeModel, backward: Backward
) -> None:
    model = make_model("plain")
    pruner = Pruner(model, OneShot(0.2))
    pruner.prune()
    optimizer = OPTIMIZERS["torch"](model)
    backward(model)
    optimizer.step()
    nn.init.ones_(model[0].weight)
    optimizer.step()
    pruner.step()
    assert nonzero(model) == 180


# ---- states that are loaded


@pytest.mark.parametrize("saved_at", [0, 2])
@pytest.mark.parametrize("order", ["model first", "pruner alone"])
@pytest.mark.parametrize("frozen", [False, True])
def test_an_earlier_state_frees_what_was_pruned_since(
    make_model: MakeModel, saved_at: int, order: str, frozen: bool
) -> None:
    model = make_model("plain")
    pp.nn.add_masks(model)
    if frozen:
        model[0].update_mask = BitMask.pack(ROWS)
    pruner = Pruner(model, Cubic(0.1, 0, 4))
    for _ in range(saved_at):
        pruner.step()
    state, its = copy.deepcopy((model.state_dict(), pruner.state_dict()))
    kept, mask = pruner.kept(), model[0].update_mask
    for _ in range(2):
        pruner.step()
    assert pruner.kept().count < kept.count
    if order == "model first":
        model.load_state_dict(state)
    pruner.load_state_dict(its)
    assert pruner.kept() == kept
    assert model[0].update_mask == mask
    while pruner.steps < 4:
        pruner.step()
    whole = int(ROWS.sum()) + 300 if frozen else 900
    assert pruner.kept().count == entries_of(0.1, whole)


@pytest.mark.parametrize("type", [NofM(2, 4), ConstantFanIn()], ids=str)
def test_a_pruner_made_after_the_model_was_loaded(type: Any) -> None:
    def fresh() -> nn.Sequential:
        return pp.powerize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), 1.5)

    def pruner_of(model: nn.Module) -> Pruner:
        return Pruner(model, Cubic(0.5, 0, 4), distribution=Uniform(), type=type)

    model, other = fresh(), fresh()
    pruner = pruner_of(model)
    for _ in range(2):
        pruner.step()
    assert pruner.kept().share < 1
    other.load_state_dict(model.state_dict())
    resumed = pruner_of(other)
    resumed.load_state_dict(pruner.state_dict())
    for _ in range(2):
        pruner.step()
        resumed.step()
    assert resumed.masks() == pruner.masks()
    assert resumed.kept().share == 0.5


@pytest.mark.parametrize(
    ("type", "of"), [(NofM(2, 4), "2 of each 4"), (ConstantFanIn(), "8 of each 16")], ids=str
)
def test_a_pattern_that_what_is_left_does_not_have(type: Any, of: str) -> None:
    def fresh() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

    first = Pruner(fresh(), OneShot(0.6), distribution=Uniform())
    first.prune()
    pruner = Pruner(fresh(), OneShot(0.5), distribution=Uniform(), type=type)
    pruner.load_state_dict(first.state_dict())
    masks = pruner.masks()
    with pytest.raises(ValueError, match=re.escape(f"{type}: {of} entries of '0' are to be kept")):
        pruner.prune()
    assert pruner.masks() == masks


def test_the_state_of_another_pruner_is_gone_on_from(make_model: MakeModel) -> None:
    model = make_model()
    first = Pruner(model, OneShot(0.5))
    first.prune()
    second = Pruner(model, OneShot(0.1))
    assert second.kept().entries != first.kept().entries
    second.load_state_dict(first.state_dict())
    assert second.kept() == first.kept()
    second.prune()
    assert second.kept().count == nonzero(model) == 90


def test_the_average_of_a_model_is_pruned_with_its_state(make_model: MakeModel) -> None:
    model = make_model("plain")
    average = torch.optim.swa_utils.AveragedModel(model)
    pruner = Pruner(model, OneShot(0.2))
    pruner.prune()
    other = Pruner(average.module, OneShot(0.2))
    for _ in range(2):
        average.update_parameters(model)
        other.load_state_dict(pruner.state_dict())
        assert nonzero(average.module) == 180


BAD_STATES = {
    "steps, a string": ({"steps": "a"}, "steps must be a whole number >= 0, got 'a'"),
    "steps, a tensor": ({"steps": torch.tensor(3)}, "steps must be a whole number >= 0"),
    "steps, negative": ({"steps": -1}, "steps must be a whole number >= 0, got -1"),
    "prunings, none": ({"prunings": None}, "prunings must be a whole number >= 0, got None"),
    "is_late, a number": ({"is_late": 1}, "is_late must be a bool, got 1"),
    "kept, none": ({"kept": None}, "kept must be a dict from names to words, got NoneType"),
    "kept, a bool mask": (
        {"kept": {"0": torch.ones(30, 20, dtype=torch.bool)}},
        "'0': BitMask: words must be the uint8 words",
    ),
    "remembered, a number": ({"remembered": 3}, "remembered must be None, or tensors like"),
    "remembered, another's": (
        {"remembered": {"x": torch.ones(2)}},
        "remembered must be None, or tensors like",
    ),
}


@pytest.mark.parametrize("bad", BAD_STATES)
def test_a_bad_state_changes_nothing(make_model: MakeModel, bad: str) -> None:
    change, message = BAD_STATES[bad]
    first = Pruner(make_model(), OneShot(0.5))
    first.prune()
    pruner = Pruner(make_model(), OneShot(0.5, at=1))
    pruner.step()
    before = copy.deepcopy(pruner.state_dict())
    masks = pruner.masks()
    with pytest.raises(ValueError, match=re.escape(f"Pruner.load_state_dict: {message}")):
        pruner.load_state_dict({**first.state_dict(), **change})
    assert pruner.masks() == masks
    assert {**pruner.state_dict(), "kept": 0} == {**before, "kept": 0}


@pytest.mark.parametrize("state", [None, [], 3])
def test_a_state_that_is_none(make_model: MakeModel, state: Any) -> None:
    with pytest.raises(ValueError, match=re.escape("load_state_dict: the keys must be ['steps'")):
        Pruner(make_model(), OneShot(0.5)).load_state_dict(state)


# ---- ties


@pytest.mark.parametrize("how", ["step", "prune", "save"])
def test_weights_tied_after_a_pruning_are_pruned_where_either_was(how: str) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6))
    pruner = Pruner(model, OneShot(0.5), distribution=Uniform())
    pruner.prune(0.8)
    masks = pruner.masks()
    model[2].weight = model[0].weight
    if how == "prune":
        pruner.prune(0.5)
    else:
        pruner.step() if how == "step" else pruner.load_state_dict(pruner.state_dict())
        assert pruner.masks()["0"] == masks["0"] & masks["2"]
    assert model[0].update_mask == model[2].update_mask == pruner.masks()["0"]
    assert list(pruner.state_dict()["kept"]) == ["0", "3"]
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_of_tied_layers_one_has_a_mask_of_the_users() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    pp.nn.add_masks(model)
    free = torch.arange(36).view(6, 6) >= 6
    model[2].update_mask = BitMask.pack(free)
    before = model[0].weight.detach().clone()
    pruner = Pruner(model, OneShot(0.5))
    pruner.prune()
    model(torch.randn(3, 6)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(model[0].weight[:1], before[:1])
    assert pruner.kept().counts == {"0": 15}
