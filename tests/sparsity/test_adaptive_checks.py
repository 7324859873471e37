"""pp.AdaptiveAlpha: what it refuses before it changes anything, and which layers it looks after."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.utils import prune

import ppkernels as pp
from ppkernels.sparsity import OneShot, Pruner


def net(stores: str = "theta", alpha: float = 1.25) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 4))
    return pp.powerize(model, alpha, stores)


X = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (model(X) - X.sum(1, keepdim=True)).square().mean()
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(loss)


# ---- optimizers, when θ is kept


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("one_process")
def test_momentum_inside_another_optimizer_follows() -> None:
    arguments = {"lr": 0.05, "momentum": 0.9, "rule": "chain"}
    ends = []
    for wrapped in (False, True):
        model = net()
        if wrapped:
            optimizer = ZeroRedundancyOptimizer(model.parameters(), pp.optim.PowerSGD, **arguments)
            inner = optimizer.optim
        else:
            optimizer = inner = pp.optim.PowerSGD(model.parameters(), **arguments)
        adaptive = pp.AdaptiveAlpha(model, period=1, keep="theta", optimizer=optimizer)
        adaptive.step()
        train(model, optimizer)
        buffer = inner.state[model[0].weight]["momentum_buffer"]
        before = buffer.clone()
        adaptive.step()
        assert not torch.equal(before, buffer)
        ends.append(buffer.clone())
    assert torch.equal(*ends)


OPTIM = torch.optim
UNKNOWN = [OPTIM.Adafactor, OPTIM.Adadelta, OPTIM.Rprop, OPTIM.ASGD, OPTIM.Adamax]


@pytest.mark.parametrize("make", UNKNOWN)
def test_states_of_unknown_meaning_are_refused(make: Any) -> None:
    model = net("phi")
    optimizer = make(model.parameters(), lr=1e-3)
    adaptive = pp.AdaptiveAlpha(model, period=1, keep="theta", optimizer=optimizer)
    adaptive.step()
    train(model, optimizer)
    message = rf"in the state that {make.__name__} keeps of the weight of '0'"
    with pytest.raises(RuntimeError, match=message):
        adaptive.step()
    assert (model[0].alpha.item(), adaptive.epoch, len(adaptive.history)) == (1.25, 1, 1)
    # A state that is there already is found when the controller is made.
    with pytest.raises(RuntimeError, match=message):
        pp.AdaptiveAlpha(model, keep="theta", optimizer=optimizer)
    # Nothing has to follow where φ is kept.
    pp.AdaptiveAlpha(model, period=1, optimizer=optimizer).step()
    for _ in range(2):
        pp.AdaptiveAlpha(model, period=1, optimizer=optimizer).step()


@pytest.mark.parametrize("make", [OPTIM.NAdam, OPTIM.RAdam, OPTIM.SGD, OPTIM.AdamW])
def test_states_with_single_numbers_are_taken(make: Any) -> None:
    model = net("phi")
    optimizer = make(model.parameters(), lr=1e-3)
    adaptive = pp.AdaptiveAlpha(model, period=1, keep="theta", optimizer=optimizer)
    adaptive.step()
    train(model, optimizer)
    assert adaptive.step()[0].decision == "rise"


def test_one_history_of_all_weights_is_refused() -> None:
    """Whichever parameter comes first, under which LBFGS keeps it."""
    model = net("phi")
    for parameters in (model.parameters(), reversed(list(model.parameters()))):
        with pytest.raises(RuntimeError, match="LBFGS keeps of the weight of '0'"):
            pp.AdaptiveAlpha(model, keep="theta", optimizer=OPTIM.LBFGS(parameters))


def test_every_trained_weight_needs_its_optimizer() -> None:
    model = net()
    part = pp.optim.PowerSGD(model[2].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"given \(PowerSGD\) holds the weight of '0'"):
        pp.AdaptiveAlpha(model, keep="theta", optimizer=part)
    pp.AdaptiveAlpha(model, keep="theta", optimizer=part, select=["2"])
    model[0].weight.requires_grad_(False)
    pp.AdaptiveAlpha(model, keep="theta", optimizer=part, select=["0", "2"])


# ---- which layers


def test_layers_that_are_not_selected_keep_their_alpha() -> None:
    for select in (["2"], {"2"}, lambda name, layer: layer.out_features == 4):
        model = net()
        model[0].set_alpha(7.0, keep="phi")
        adaptive = pp.AdaptiveAlpha(model, period=1, select=select)
        adaptive.step()
        adaptive.step()
        assert (model[0].alpha.item(), model[2].alpha.item()) == (7.0, 1.375)


def test_frozen_layers_are_left_out_unless_selected() -> None:
    model = net()
    model[0].weight.requires_grad_(False)
    before = model[0](X)
    for select, alpha in ((None, 1.25), (["0"], 1.375)):
        adaptive = pp.AdaptiveAlpha(model, period=1, per_layer=True, select=select)
        adaptive.step()
        adaptive.step()
        assert model[0].alpha.item() == alpha
        assert torch.equal(model[0](X), before) == (select is None)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no powered layer was selected, for none requires a grad"):
        pp.AdaptiveAlpha(model)


def test_wrappers_are_looked_through() -> None:
    model = net()
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.compile(model[0])):
        adaptive = pp.AdaptiveAlpha(wrapped, per_layer=True)
        names = [record.layer for record in adaptive.step()]
        assert names == (
            ["PowerLinear"] if wrapped._modules.get("_orig_mod") is model[0] else ["0", "2"]
        )
    names = [layer.name for layer in pp.report(nn.DataParallel(model)).layers]
    assert names == list(Pruner(nn.DataParallel(model), OneShot(0.5)).masks()) == ["0", "2"]


def test_a_layer_without_entries_holds_its_alpha() -> None:
    model = net()
    adaptive = pp.AdaptiveAlpha(model, period=1, per_layer=True, entries="trained")
    adaptive.step()
    model[0].update_mask = pp.BitMask.zeros((9, 12))
    for _ in range(2):
        first, second = adaptive.step()
        assert (first.decision, first.alpha, first.next_alpha) == ("hold", 1.25, 1.25)
        assert first.sparsity != first.sparsity
        assert second.decision == "rise"
    model[0].update_mask = None
    first, _ = adaptive.step()
    assert (first.decision, first.next_alpha) == ("rise", 1.375)
    for layer in (model[0], model[2]):
        layer.update_mask = pp.BitMask.zeros(layer.weight.shape)
    with pytest.raises(ValueError, match="no entries to count in '0', '2'"):
        adaptive.step()


# ---- layers that are not what they were


def exchange(model: nn.Sequential) -> None:
    model[2] = pp.nn.PowerLinear(9, 4, alpha=1.25)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (pp.fold, "'0' is no longer the powered layer that it was when the controller was made"),
        (exchange, "'2' is no longer the powered layer that it was when the controller was made"),
        (
            lambda model: prune.identity(model[2], "weight"),
            "the weight of '2' is no longer a Parameter of its own",
        ),
    ],
)
def test_layers_that_went_away_are_noticed(spoil: Any, message: str) -> None:
    model = net()
    adaptive = pp.AdaptiveAlpha(model, period=1)
    adaptive.step()
    spoil(model)
    for act in (adaptive.step, adaptive.measure):
        with pytest.raises(RuntimeError, match=message):
            act()
    assert (adaptive.epoch, len(adaptive.history)) == (1, 1)


def test_a_copy_looks_after_the_copied_model() -> None:
    model = net()
    adaptive = pp.AdaptiveAlpha(model, period=1)
    adaptive.step()
    again, other = copy.deepcopy((model, adaptive))
    other.step()
    assert (model[0].alpha.item(), again[0].alpha.item()) == (1.25, 1.375)


@pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.usefixtures("one_process")
def test_sharded_weights_are_refused_by_name() -> None:
    model = net("phi")
    adaptive = pp.AdaptiveAlpha(model)
    fully_shard(model[2], mesh=init_device_mesh("cpu", (1,)))
    for call in (adaptive.step, lambda: pp.AdaptiveAlpha(model), lambda: pp.report(model)):
        with pytest.raises(TypeError, match="the weight of '2' is a DTensor"):
            call()


# ---- all or nothing


@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize("per_layer", [False, True])
def test_an_overflow_is_refused_before_anything_changes(per_layer: bool, stores: str) -> None:
    model = net(stores).half()
    with torch.no_grad():
        model[2].set_theta(torch.full((4, 9), -60000.0, dtype=torch.float16))
    adaptive = pp.AdaptiveAlpha(model, period=1, per_layer=per_layer)
    adaptive.step()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"alpha 1\.375 the weight of '2' would overflow float16"):
        adaptive.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (adaptive.epoch, len(adaptive.history)) == (1, 1 + per_layer)
    assert (
        adaptive.state_dict()["phases"]
        == pp.AdaptiveAlpha(model, period=1, per_layer=per_layer).state_dict()["phases"]
    )


def test_layers_that_store_different_things_in_one_weight_are_refused() -> None:
    first, second = net()[0], net("phi")[0]
    model = nn.Sequential(net()[2], first)
    adaptive = pp.AdaptiveAlpha(model, period=1, per_layer=True)
    adaptive.step()
    second.weight = first.weight
    with pytest.raises(ValueError, match="'1' stores theta in a weight that another layer shares"):
        adaptive.step()
    assert model[0].alpha.item() == 1.25


def test_an_exponent_above_the_bound_is_an_error() -> None:
    model = net()
    adaptive = pp.AdaptiveAlpha(model, period=1)
    adaptive.step()
    pp.set_alpha(model, 3.5, keep="theta")
    with pytest.raises(ValueError, match=r"'model' has alpha 3\.5, above alpha_max 3\.0"):
        adaptive.step()
    assert model[0].alpha.item() == 3.5


def test_numbers_of_numpy_are_numbers() -> None:
    adaptive = pp.AdaptiveAlpha(net(), np.float64(1e-3), period=np.int64(2))
    assert (adaptive.options.epsilon, adaptive.options.period) == (1e-3, 2)
