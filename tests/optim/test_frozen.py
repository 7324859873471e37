"""Frozen means frozen: where the update mask's bit is 0, weight and state keep their bits."""

from __future__ import annotations

import copy
import io
import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import ppkernels as pp

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "momentum": (pp.optim.PowerSGD, {"lr": 0.003, "momentum": 0.9, "dampening": 0.1}),
    "nesterov": (pp.optim.PowerSGD, {"lr": 0.003, "momentum": 0.9, "nesterov": True}),
    "adam": (pp.optim.PowerAdamW, {"lr": 0.003}),
    "amsgrad": (pp.optim.PowerAdamW, {"lr": 0.003, "amsgrad": True}),
}
RULES = ("virtual", "chain")
DECAYS = list(itertools.product(("coupled", "decoupled"), ("theta", "phi")))

pytestmark = pytest.mark.usefixtures("one_thread")


def optimizer_of(model: nn.Module, name: str, **options: Any) -> torch.optim.Optimizer:
    kind, own = OPTIMIZERS[name]
    return kind(model, **{**own, **options})


def layers(stores: str, **options: Any) -> list[nn.Module]:
    """A layer of each kind; odd sizes, so that a mask ends within a byte."""
    options = {"alpha": 1.5, "stores": stores, **options}
    conv = pp.nn.PowerConv2d(3, 5, 3, **options).to(memory_format=torch.channels_last)
    return [
        pp.nn.PowerLinear(19, 7, **options),
        pp.nn.PowerConv2d(3, 5, 3, **options),
        conv,
        pp.nn.PowerConv1d(3, 5, 3, **options),
    ]


def model_of_all(**options: Any) -> nn.ModuleList:
    """Powered layers of both forms, and plain ones."""
    powered = [layer for stores in ("theta", "phi") for layer in layers(stores, **options)]
    return nn.ModuleList([*powered, nn.Linear(3, 3), nn.LayerNorm(4)]).to(
        options.get("dtype", torch.float32)
    )


def random_mask(layer: nn.Module) -> pp.BitMask:
    return pp.BitMask.pack(torch.rand(layer.weight.shape) < 0.6)


class Gradients:
    """Random gradients, drawn beforehand and given out in turn."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.sets = [[torch.randn_like(p) for p in self.parameters] for _ in range(7)]
        self.turn = 0

    def give(self) -> None:
        self.turn += 1
        for parameter, grad in zip(
            self.parameters, self.sets[self.turn % len(self.sets)], strict=True
        ):
            parameter.grad = grad.clone()


def take_steps(optimizer: torch.optim.Optimizer, gradients: Gradients, steps: int) -> None:
    for _ in range(steps):
        gradients.give()
        nn.utils.clip_grad_norm_(gradients.parameters, 1.0)
        optimizer.step()


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


def entries(layer: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The bits of the weight and of all its state, one number an entry."""
    state = optimizer.state[layer.weight]
    tensors = {name: value for name, value in state.items() if value.shape == layer.weight.shape}
    return {name: bits(tensor).clone() for name, tensor in {"θ": layer.weight, **tensors}.items()}


def check_frozen(
    model: nn.Module, optimizer: torch.optim.Optimizer, gradients: Gradients, steps: int
) -> None:
    """Over ``steps`` steps each masked entry keeps its bits, and each other one does not."""
    masked = [layer for layer in model.modules() if getattr(layer, "update_mask", None) is not None]
    plain = [p for p in gradients.parameters if all(p is not layer.weight for layer in masked)]
    before = [entries(layer, optimizer) for layer in masked]
    plain_before = [parameter.detach().clone() for parameter in plain]
    take_steps(optimizer, gradients, steps)
    for layer, was in zip(masked, before, strict=True):
        free, now = layer.update_mask.unpack(), entries(layer, optimizer)
        assert now.keys() == was.keys()
        for name in was:
            assert torch.equal(now[name][~free], was[name][~free]), (layer, name)
        moved = now["θ"] != was["θ"]
        # Some may be back where they were, in a half type more than others.
        assert moved[free].float().mean() > 0.8, layer
    for parameter, was in zip(plain, plain_before, strict=True):
        assert (parameter != was).float().mean() > 0.8


# ---- over a long time


@pytest.mark.parametrize(("decay", "decay_of"), DECAYS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_thousand_steps(name: str, rule: str, decay: str, decay_of: str) -> None:
    model = model_of_all()
    options = {"rule": rule, "weight_decay": 0.05, "decay": decay, "decay_of": decay_of}
    optimizer, gradients = optimizer_of(model, name, **options), Gradients(model)
    # Momentum first: a frozen entry has one that would move it.
    take_steps(optimizer, gradients, 5)
    for layer in model[:8]:
        layer.update_mask = random_mask(layer)
    check_frozen(model, optimizer, gradients, 1000)


@pytest.mark.parametrize("master_weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_dtypes(name: str, dtype: torch.dtype, master_weights: bool) -> None:
    model = model_of_all(dtype=dtype)
    # At this rate bfloat16 moves without a master copy.
    options = {"lr": 0.05, "weight_decay": 0.05, "master_weights": master_weights}
    optimizer, gradients = optimizer_of(model, name, **options), Gradients(model)
    take_steps(optimizer, gradients, 5)
    assert ("master" in optimizer.state[model[0].weight]) == (
        master_weights and dtype.itemsize == 2
    )
    for layer in model[:8]:
        layer.update_mask = random_mask(layer)
    check_frozen(model, optimizer, gradients, 100)


@pytest.mark.parametrize("backend", ["kernels", "reference"])
@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_from_the_first_step_and_whatever_the_gradient(
    name: str, stores: str, backend: str
) -> None:
    """No state yet, zeros of either sign, and gradients that are not finite."""
    for layer in layers(stores, bias=False):
        draw = torch.rand(layer.weight.shape)
        with torch.no_grad():
            layer.weight[draw < 0.2] = 0.0
            layer.weight[draw > 0.8] = -0.0
        layer.update_mask = random_mask(layer)
        frozen = ~layer.update_mask.unpack()
        optimizer = optimizer_of(layer, name, weight_decay=0.1)
        before = bits(layer.weight).clone()
        for bad in (torch.inf, -torch.inf, torch.nan):
            layer.weight.grad = torch.randn_like(layer.weight)
            layer.weight.grad[frozen] = bad
            with pp.backend(backend):
                optimizer.step()
        assert torch.equal(bits(layer.weight)[frozen], before[frozen])
        for value in optimizer.state[layer.weight].values():
            if value.dim():
                assert not value[frozen].any()
                assert value.isfinite().all()


# ---- masks that come, change and go


@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mask_counts_from_the_next_step(name: str, stores: str) -> None:
    for layer in layers(stores):
        free = copy.deepcopy(layer)
        optimizers = [optimizer_of(each, name, weight_decay=0.1) for each in (layer, free)]
        gradients = [Gradients(each) for each in (layer, free)]
        gradients[1].sets = gradients[0].sets
        masks = [random_mask(layer) for _ in range(2)]
        for mask in (None, masks[0], masks[1], None):
            layer.update_mask = mask
            # The unmasked step from the same place, taken where the mask says so.
            free.load_state_dict({**layer.state_dict(), "weight": layer.weight.detach()})
            free.update_mask = None
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            before = entries(layer, optimizers[0])
            for optimizer, own in zip(optimizers, gradients, strict=True):
                take_steps(optimizer, own, 1)
            after = entries(free, optimizers[1])
            is_free = torch.ones_like(layer.weight).bool() if mask is None else mask.unpack()
            for key, came in entries(layer, optimizers[0]).items():
                # State begins at 0 with the first step.
                was = before.get(key, torch.zeros_like(came))
                assert torch.equal(came, torch.where(is_free, after[key], was)), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_of_a_checkpoint_freeze(name: str) -> None:
    model, other = model_of_all(), model_of_all()
    for layer in model[:8]:
        layer.update_mask = random_mask(layer)
    optimizer, gradients = optimizer_of(other, name, weight_decay=0.05), Gradients(other)
    take_steps(optimizer, gradients, 2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other[0].update_mask == model[0].update_mask
    check_frozen(other, optimizer, gradients, 20)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_masked_layer_among_plain_ones(name: str) -> None:
    model = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 7), nn.LayerNorm(7))
    model[2] = pp.nn.PowerLinear(7, 7, alpha=1.0)
    model[2].update_mask = random_mask(model[2])
    optimizer, gradients = optimizer_of(model, name, weight_decay=0.05), Gradients(model)
    take_steps(optimizer, gradients, 1)
    check_frozen(model, optimizer, gradients, 50)


@pytest.mark.parametrize("fill", ["zeros", "ones"])
def test_masks_of_all_and_of_nothing(fill: str) -> None:
    layer = pp.nn.PowerLinear(19, 7, alpha=2.0, bias=False)
    free = copy.deepcopy(layer)
    layer.update_mask = getattr(pp.BitMask, fill)((7, 19))
    start = layer.weight.detach().clone()
    for each in (layer, free):
        torch.manual_seed(0)
        take_steps(optimizer_of(each, "momentum"), Gradients(each), 3)
    expected = free.weight if fill == "ones" else start
    assert torch.equal(layer.weight, expected)


# ---- layers that share a weight


def tied() -> tuple[nn.Module, nn.Module]:
    first, second = (pp.nn.PowerLinear(7, 7, alpha=2.0) for _ in range(2))
    second.weight = first.weight
    return first, second


def test_tied_layers_with_different_masks_are_refused() -> None:
    first, second = tied()
    model = nn.ModuleList([first, second])
    message = re.escape("share one weight, so their update masks have to be equal")
    optimizer, gradients = pp.optim.PowerSGD(model, 0.1), Gradients(model)
    take_steps(optimizer, gradients, 1)
    first.update_mask, second.update_mask = random_mask(first), random_mask(second)
    before = first.weight.detach().clone()
    with pytest.raises(ValueError, match=f"PowerSGD: PowerLinear.* {message}"):
        optimizer.step()
    with pytest.raises(ValueError, match=f"PowerAdamW: PowerLinear.* {message}"):
        pp.optim.PowerAdamW(model)
    assert torch.equal(first.weight, before)
    second.update_mask = pp.BitMask.pack(first.update_mask.unpack())
    check_frozen(model, optimizer, gradients, 20)


def test_a_mask_on_one_of_two_tied_layers_freezes() -> None:
    first, second = tied()
    model = nn.ModuleList([first, second])
    second.update_mask = random_mask(second)
    optimizer, gradients = pp.optim.PowerSGD(model, 0.1, momentum=0.9), Gradients(model)
    take_steps(optimizer, gradients, 1)
    check_frozen(second, optimizer, gradients, 20)


def test_a_mask_of_another_shape_is_refused() -> None:
    """The weight was exchanged behind the layer's back, where nothing is checked."""
    layer = pp.nn.PowerLinear(7, 7, alpha=2.0, bias=False)
    layer.update_mask = random_mask(layer)
    layer._parameters["weight"] = weight = nn.Parameter(torch.ones(49))
    weight.grad = torch.ones(49)
    message = r"update_mask of PowerLinear.* has shape \(7, 7\), and its weight has shape \(49,\)"
    with pytest.raises(RuntimeError, match=f"^PowerSGD: the {message}"):
        pp.optim.PowerSGD([weight], 0.1).step()
    assert torch.equal(weight, torch.ones(49))


@pytest.mark.parametrize("replace", [prune.identity, lambda *names: weight_norm(names[0])])
def test_entries_of_a_replaced_weight_cannot_be_frozen(replace: Any) -> None:
    layer = pp.nn.PowerLinear(7, 7, alpha=2.0, stores="phi")
    layer.update_mask = random_mask(layer)
    replace(layer, "weight")
    optimizer, gradients = pp.optim.PowerSGD(layer, 0.1), Gradients(layer)
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    with pytest.raises(RuntimeError, match=r"(?s)^PowerSGD: .* has an update_mask, but its weight"):
        take_steps(optimizer, gradients, 1)
    assert all(map(torch.equal, layer.parameters(), before))
    layer.update_mask = None
    take_steps(optimizer, gradients, 1)
    assert not any(map(torch.equal, layer.parameters(), before))
