"""Making a `Pruner`: which layers it takes, in which order, and what an error leaves behind."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ppkernels import BitMask
from ppkernels.sparsity import (
    ConstantFanIn,
    Cubic,
    Global,
    Gradient,
    Iterative,
    NofM,
    OneShot,
    PerLayer,
    Pruner,
    Sensitivity,
    Uniform,
    Weight,
)

MakeModel = Callable[..., nn.Sequential]
Backward = Callable[[nn.Module], None]

OF_A_SET = """
import torch, ppkernels
from ppkernels.sparsity import OneShot, Pruner, Random
torch.manual_seed(0)
model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(6)))
pruner = Pruner(model, OneShot(0.3), score=Random(7), select={"4", "0", "3", "1"})
pruner.prune()
print([(name, mask.words.tolist()) for name, mask in pruner.masks().items()])
"""


def test_a_set_of_names_gives_the_same_masks_in_every_process() -> None:
    found = {
        subprocess.run(
            [sys.executable, "-c", OF_A_SET],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert re.findall("'(.)'", found.pop()) == ["0", "1", "3", "4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": NofM(2, 4)}, "it wants a share for each layer"),
        ({"distribution": Uniform({"x": 2})}, "'x' is none of the layers to prune"),
        ({"distribution": PerLayer({"0": 0.5, "2": 1})}, "must be None, got 0.5"),
        ({"distribution": Uniform(), "type": NofM(2, 4)}, "'2' has 30 inputs"),
    ],
    ids=str,
)
def test_an_error_leaves_the_model_as_it_was(
    make_model: MakeModel, options: Any, message: str
) -> None:
    model = make_model("plain")
    with pytest.raises(ValueError, match=message):
        Pruner(model, OneShot(0.5), **options)
    assert type(model[0]) is type(model[2]) is nn.Linear


def test_a_wrong_schedule_for_the_shares_is_told_at_once(make_model: MakeModel) -> None:
    shares = PerLayer({"0": 0, "2": 0.5})
    with pytest.raises(ValueError, match="Iterative: kept must be above 0"):
        Pruner(make_model(), Iterative(None, 2, 5), distribution=shares)


# ---- layers that are left out, or refused


def test_weights_that_are_not_trained_are_left_out_unless_named(make_model: MakeModel) -> None:
    model = make_model("plain")
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    pruner = Pruner(model, OneShot(0.5))
    pruner.prune()
    assert pruner.kept().entries == {"2": 300}
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, before)
    assert list(Pruner(model, OneShot(0.5), select=["0", "2"]).kept().entries) == ["0", "2"]


def test_a_model_of_which_nothing_is_trained(make_model: MakeModel) -> None:
    model = make_model("plain").requires_grad_(False)
    message = "Pruner: no weight of Sequential that can be pruned requires a gradient; name layers"
    with pytest.raises(ValueError, match=message):
        Pruner(model, OneShot(0.5))


@pytest.mark.parametrize("select", [None, ["0"], lambda name, _: name == "0"], ids=str)
def test_lazy_layers_are_refused(select: Any) -> None:
    model = nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.Linear(32, 8))
    message = "Pruner: '0' (LazyLinear) cannot be pruned: it is lazy; run a batch through the model"
    with pytest.raises(TypeError, match=re.escape(message)):
        Pruner(model, OneShot(0.5), select=select)
    assert list(Pruner(model, OneShot(0.5), select=["2"]).kept().entries) == ["2"]


def test_a_mask_that_a_plain_layer_cannot_have_is_told(make_model: MakeModel) -> None:
    model = make_model("plain")
    model[0].update_mask = BitMask.ones((30, 20))
    message = "Pruner: '0' (Linear) cannot be pruned: its update_mask was assigned before it had"
    with pytest.raises(TypeError, match=re.escape(message)):
        Pruner(model, OneShot(0.5))


def test_errors_name_the_pruner(make_model: MakeModel) -> None:
    with pytest.raises(TypeError, match=re.escape("Pruner: '1' (ReLU) cannot be pruned")):
        Pruner(make_model("plain"), OneShot(0.5), select=["1"])


def test_a_model_without_values() -> None:
    pruner = Pruner(nn.Linear(4, 4, device="meta"), OneShot(0.5))
    with pytest.raises(RuntimeError, match="the weight of '' is on the meta device"):
        pruner.prune()


# ---- tied weights by all their names


def _tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 4))
    model[2].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("schedule", "distribution"),
    [
        (OneShot(None), PerLayer({"2": 0.5, "3": 1})),
        (OneShot(None), PerLayer({"0": 0.5, "2": 0.5, "3": 1})),
        (OneShot(0.25), Uniform({"2": 2, "3": 4})),
    ],
    ids=str,
)
def test_a_tied_weight_goes_by_any_of_its_names(schedule: Any, distribution: Any) -> None:
    pruner = Pruner(_tied(), schedule, distribution=distribution)
    pruner.prune()
    assert pruner.kept().counts == {"0": 18, "3": 24}


def test_names_of_a_tied_weight_must_agree() -> None:
    shares = PerLayer({"0": 0.5, "2": 0.6, "3": 1})
    message = "PerLayer: '2' shares its weight with other layers, the first of which is '0'"
    with pytest.raises(ValueError, match=message):
        Pruner(_tied(), OneShot(None), distribution=shares)


@pytest.mark.parametrize("choice", [Uniform({"0": 2}), PerLayer({"0": 0.5})], ids=str)
def test_distributions_have_a_hash(choice: Any) -> None:
    assert len({choice, type(choice)(*choice.__dict__.values())}) == 1


# ---- shares of N:M


@pytest.mark.parametrize(("n", "m", "kept"), [(1, 3, 0.333333), (2, 3, 0.666667), (1, 3, 1 / 3)])
def test_shares_that_are_meant_as_n_of_m(n: int, m: int, kept: float) -> None:
    pruner = Pruner(nn.Linear(12, 9), OneShot(kept), distribution=Uniform(), type=NofM(n, m))
    pruner.prune()
    assert pruner.kept().count == 108 * n // m


def test_the_advice_is_exact() -> None:
    with pytest.raises(ValueError, match=re.escape("Uniform with 1/3 for the schedule's share")):
        Pruner(nn.Linear(12, 9), OneShot(0.33), distribution=Uniform(), type=NofM(1, 3))


# ---- choices of the user's


class Own:
    """A score that gives back what ``of`` makes of the weights."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def __repr__(self) -> str:
        return "Own()"


SCORES = {
    "tensors": (lambda w: {n: v.stored.abs() for n, v in w.items()}, TypeError, "must be a Weight"),
    "missing": (lambda w: {"0": w["0"]}, ValueError, "with the names ['0', '2'], got ['0']"),
    "extra": (lambda w: {**w, "z": w["0"]}, ValueError, "with the names ['0', '2'], got"),
    "a list": (lambda w: list(w.values()), ValueError, "with the names ['0', '2'], got list"),
    "shape": (
        lambda w: {n: Weight(torch.rand(v.stored.shape[::-1])) for n, v in w.items()},
        ValueError,
        "must have the shape of the weight, (30, 20), got (20, 30)",
    ),
    "whole numbers": (
        lambda w: {n: Weight(torch.ones(v.stored.shape, dtype=torch.int64)) for n, v in w.items()},
        TypeError,
        "must be of a floating dtype, got torch.int64",
    ),
}


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("type", [None, ConstantFanIn()], ids=str)
def test_a_score_that_gives_back_something_else(
    make_model: MakeModel, score: str, type: Any
) -> None:
    of, error, message = SCORES[score]
    model = make_model("plain")
    options = {} if type is None else {"type": type}
    pruner = Pruner(model, OneShot(0.5), score=Own(of), distribution=Uniform(), **options)
    before = model[0].weight.detach().clone()
    with pytest.raises(error, match=re.escape("Pruner: Own()") + ".*" + re.escape(message)):
        pruner.prune()
    assert torch.equal(model[0].weight, before)
    assert model[0].update_mask is None
    assert pruner.kept().share == 1


class Shares(Global):
    """A distribution that gives what it was made with."""

    def __init__(self, given: Any) -> None:
        object.__setattr__(self, "given", given)

    def shares(self, sizes: Any, kept: float | None) -> Any:
        return self.given


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"0": 0.5}, ValueError),
        ({"0": 0.5, "2": 1, "z": 1}, ValueError),
        (2.0, ValueError),
        ({"0": 1, "2": -0.1}, ValueError),
        (None, TypeError),
    ],
    ids=str,
)
def test_shares_of_other_layers(make_model: MakeModel, given: Any, error: type[Exception]) -> None:
    model = make_model("plain")
    with pytest.raises(error, match=r"Pruner: |Shares: "):
        Pruner(model, OneShot(0.5), distribution=Shares(given))
    assert type(model[0]) is nn.Linear


# ---- gradients that are not finite


@pytest.mark.parametrize("score", [Gradient(), Sensitivity()], ids=str)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_pruning_waits_for_finite_gradients(
    make_model: MakeModel, backward: Backward, score: Any, bad: float
) -> None:
    model = make_model("plain")
    pruner = Pruner(model, Cubic(0.2, 0, 4, 2), score=score)
    is_pruned = []
    for step in range(1, 7):
        backward(model)
        if step in (2, 4):
            model[2].weight.grad[0, 0] = bad
            with pytest.raises(ValueError, match="the gradient of '2' has an infinity or a NaN"):
                pruner.prune()
        if step == 5:
            # It waits in another process too.
            state, pruner = pruner.state_dict(), Pruner(model, pruner.schedule, score=score)
            pruner.load_state_dict(state)
        is_pruned.append(pruner.step())
    assert is_pruned == [False, False, True, False, True, False]
    assert pruner.steps == 6
    assert pruner.kept().share == 0.2
