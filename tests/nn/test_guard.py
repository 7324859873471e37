"""Optimizers that know nothing of powered layers may not step a stored θ."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

import ppkernels as pp

WAYS_OUT = r"holds theta.* an optimizer of pp\.optim \(PowerSGD, PowerAdamW\).*stores='phi'"


def trained(model: nn.Module) -> nn.Module:
    """``model`` with gradients, as before a step."""
    model(torch.randn(2, 4)).sum().backward()
    return model


def refuses(optimizer: torch.optim.Optimizer, *args: object) -> bool:
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    message = ""
    try:
        optimizer.step(*args)
    except RuntimeError as error:
        message = str(error)
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert not message or all(map(torch.equal, before, after))
    assert not message or "holds theta" in message
    return bool(message)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.1)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_the_error_names_layer_optimizer_and_ways_out(optimizer: type) -> None:
    layer = trained(pp.nn.PowerLinear(4, 4, alpha=1.5))
    name = optimizer.__name__
    with pytest.raises(RuntimeError, match=rf"{name}.step: the weight of PowerLinear.* {WAYS_OUT}"):
        optimizer(layer.parameters(), lr=0.1).step()


@pytest.mark.parametrize(
    "make",
    [
        lambda: pp.nn.PowerLinear(4, 4, alpha=2),
        lambda: pp.nn.PowerLinear(4, 4, alpha=1),
        lambda: pp.powerize(nn.Sequential(nn.Linear(4, 4)), 2.0),
        lambda: copy.deepcopy(pp.nn.PowerLinear(4, 4, alpha=2)),
        lambda: copy.copy(pp.nn.PowerLinear(4, 4, alpha=2)),
        lambda: pickle.loads(pickle.dumps(nn.Sequential(pp.nn.PowerLinear(4, 4, alpha=2)))),
        lambda: AveragedModel(pp.nn.PowerLinear(4, 4, alpha=2)),
        lambda: torch.compile(pp.nn.PowerLinear(4, 4, alpha=2), backend="eager"),
        lambda: pp.nn.PowerLinear(4, 4, alpha=2).double().float(),
    ],
)
def test_every_way_to_make_a_layer(make: object) -> None:
    assert refuses(sgd(trained(make())))


def test_an_optimizer_made_before_powerize() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = sgd(trained(model))
    assert not refuses(optimizer)
    pp.powerize(model, 2.0)
    assert refuses(optimizer)
    assert refuses(optimizer)
    pp.fold(model)
    assert not refuses(optimizer)


def test_a_group_added_later() -> None:
    plain, powered = trained(nn.Linear(4, 4)), trained(pp.nn.PowerLinear(4, 4, alpha=2))
    optimizer = sgd(plain)
    assert not refuses(optimizer)
    optimizer.add_param_group({"params": powered.parameters()})
    assert refuses(optimizer)


def test_a_weight_exchanged_later() -> None:
    layer = pp.nn.PowerLinear(4, 4, alpha=2)
    other = nn.Parameter(torch.ones(4, 4))
    other.grad = torch.ones(4, 4)
    optimizer = torch.optim.SGD([other], 0.1)
    assert not refuses(optimizer)
    layer.weight = other
    assert refuses(optimizer)


@pytest.mark.parametrize("given", ["list", "group", "in place"])
def test_parameters_exchanged_at_equal_count(given: str) -> None:
    plain, powered = trained(nn.Linear(4, 4)), trained(pp.nn.PowerLinear(4, 4, alpha=2))
    optimizer = sgd(plain)
    assert not refuses(optimizer)
    if given == "list":
        optimizer.param_groups[0]["params"] = list(powered.parameters())
    elif given == "group":
        optimizer.param_groups[0] = {**optimizer.param_groups[0], "params": [*powered.parameters()]}
    else:
        optimizer.param_groups[0]["params"][:] = powered.parameters()
    assert refuses(optimizer)


def test_a_weight_exchanged_behind_the_layers_back() -> None:
    layer = pp.nn.PowerLinear(4, 4, alpha=2, bias=False)
    optimizer = sgd(trained(nn.Linear(4, 4, bias=False)))
    assert not refuses(optimizer)
    layer._parameters["weight"] = nn.Parameter(torch.ones(4, 4))
    trained(layer)
    optimizer.param_groups[0]["params"] = [layer.weight]
    assert refuses(optimizer)


def test_a_layer_that_is_gone() -> None:
    model, alive = nn.Sequential(pp.nn.PowerLinear(4, 4, alpha=2)), pp.nn.PowerLinear(4, 4, alpha=2)
    optimizer = sgd(trained(model))
    assert refuses(optimizer)
    model[0] = nn.Linear(4, 4)
    gc.collect()
    assert not refuses(optimizer)
    assert alive.alpha == 2


def test_wrappers_whose_inner_optimizer_steps() -> None:
    layer = trained(pp.nn.PowerLinear(4, 4, alpha=2))

    class Wrapper(torch.optim.SGD):
        pass

    optimizer = Wrapper(layer.parameters(), 0.1)
    assert refuses(optimizer)
    optimizer.optim = pp.optim.PowerSGD(layer, 0.1)
    assert not refuses(optimizer)
    optimizer.optim = sgd(layer)
    assert refuses(optimizer)


def test_replicas_are_not_enrolled() -> None:
    layer = pp.nn.PowerLinear(4, 4, alpha=2, stores="phi")
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight.detach(), layer.bias.detach()
    x = torch.randn(2, 4)
    assert torch.equal(replica(x), layer(x))
    with pytest.raises(ValueError, match="holds no powered layer"):
        pp.set_alpha(replica, 2.0, keep="phi")


def test_closures() -> None:
    layer = pp.nn.PowerLinear(4, 4, alpha=2)
    closure = lambda: trained(layer)(torch.ones(1, 4)).sum()  # noqa: E731
    assert refuses(torch.optim.LBFGS(layer.parameters()), closure)
    assert refuses(sgd(layer), closure)


def test_who_may_step() -> None:
    powered = trained(pp.nn.PowerLinear(4, 4, alpha=2))
    assert not refuses(sgd(trained(pp.nn.PowerLinear(4, 4, alpha=2, stores="phi"))))
    assert not refuses(sgd(trained(nn.Linear(4, 4))))
    assert not refuses(torch.optim.SGD([powered.bias], 0.1))
    assert not refuses(pp.optim.PowerSGD(powered, 0.1))

    class Own(torch.optim.SGD):
        steps_theta = True

    assert not refuses(Own(powered.parameters(), 0.1))


def test_frozen_weights() -> None:
    layer = pp.nn.PowerLinear(4, 4, alpha=2)
    layer.weight.requires_grad_(False)
    optimizer = sgd(trained(layer))
    assert not refuses(optimizer)
    layer.weight.requires_grad_(True)
    assert refuses(optimizer)
    trained(layer).weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"frozen, but its .grad is not None"):
        optimizer.step()


@pytest.mark.parametrize(
    "replace",
    [
        lambda layer: prune.identity(layer, "weight"),
        nn.utils.parametrizations.weight_norm,
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity()),
    ],
)
def test_a_weight_that_torch_replaced_cannot_be_stepped(replace: object) -> None:
    model = nn.Sequential(pp.nn.PowerLinear(4, 4, alpha=2))
    optimizers = [sgd(model), pp.optim.PowerSGD(model, 0.1)]
    replace(model[0])
    trained(model)
    for optimizer in (*optimizers, sgd(model), copy.deepcopy(pp.optim.PowerSGD(model, 0.1))):
        if all(p.grad is None for p in optimizer.param_groups[0]["params"][:1]):
            continue  # the Parameter it was given is in use no more
        with pytest.raises(RuntimeError, match="no longer a Parameter of its own"):
            optimizer.step()
    stored_phi = pp.nn.PowerLinear(4, 4, alpha=2, stores="phi")
    replace(stored_phi)
    assert not refuses(sgd(trained(stored_phi)))


def test_the_guard_keeps_nothing_alive() -> None:
    layer = trained(pp.nn.PowerLinear(4, 4, alpha=2))
    optimizer = sgd(layer)
    assert refuses(optimizer)
    references = [weakref.ref(layer), weakref.ref(optimizer), weakref.ref(layer.weight)]
    del layer, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None] * 3


def test_a_compiled_step_is_refused_too() -> None:
    layer = trained(pp.nn.PowerLinear(4, 4, alpha=2))
    optimizer = sgd(layer)
    step = torch.compile(optimizer.step, backend="eager")
    with pytest.raises(Exception, match="holds theta"):
        step()
    plain = sgd(trained(nn.Linear(4, 4)))
    torch.compile(plain.step, backend="eager")()
