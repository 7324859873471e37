"""pp.optim.PowerSGD as an optimizer: which weights it takes, its state, its options.
Longer than 350 lines: one table of behaviours, most of them five lines each.
"""

from __future__ import annotations

import copy
import gc
import io
import sys
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ppkernels as pp

RULES = ["virtual", "chain"]


def tensor_of(alpha: float) -> torch.Tensor:
    return torch.tensor(alpha, dtype=torch.float64)


# ---- which parameters, with which exponent


def with_gradients(model: nn.Module) -> nn.Module:
    model(torch.ones(2, 4)).square().sum().backward()
    return model


@pytest.mark.parametrize(
    "given",
    [
        lambda model: model,
        lambda model: model.parameters(),
        lambda model: [{"params": [p]} for p in model.parameters()],
        lambda model: model.named_parameters(),
    ],
)
def test_weights_are_found_whatever_way_they_come(
    given: object, stepped: Callable[..., torch.Tensor]
) -> None:
    torch.manual_seed(0)
    model = pp.powerize(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), 2.0)
    optimizer = pp.optim.PowerSGD(given(model), 0.1)
    with_gradients(model)
    weight, bias = model[0].weight, model[0].bias
    expected = stepped(weight.detach(), weight.grad, model[0].alpha, 0.1)
    expected_bias = bias.detach() - 0.1 * bias.grad
    optimizer.step()
    assert torch.equal(weight, expected)
    torch.testing.assert_close(bias.detach(), expected_bias)


def test_a_layer_powerized_after_the_optimizer(stepped: Callable[..., torch.Tensor]) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = pp.optim.PowerSGD(model, 0.1)
    with_gradients(pp.powerize(model, 2.0))
    weight = model[0].weight
    expected = stepped(weight.detach(), weight.grad, model[0].alpha, 0.1)
    optimizer.step()
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("looked", [False, True], ids=["before the first step", "after one"])
@pytest.mark.parametrize("stores", ["theta", "phi"])
def test_the_weight_of_a_layer_that_is_gone_is_not_stepped(stores: str, looked: bool) -> None:
    model = pp.powerize(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), 2.0, stores)
    optimizer = pp.optim.PowerSGD(with_gradients(model), 0.1, momentum=0.9)
    if looked:
        optimizer.step()
    parameters = [model[0].weight, model[1].weight, model[1].bias]
    before = [parameter.detach().clone() for parameter in parameters]
    model[0] = nn.Identity()
    gc.collect()
    message = r"PowerSGD: the powered layer whose weight of shape \(3, 4\) is .* keep the model"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        pp.optim.PowerSGD(nn.Linear(2, 2), 0.1)  # reads the layers anew
    assert all(map(torch.equal, parameters, before))
    parameters[0].grad = None
    optimizer.step()
    assert not any(map(torch.equal, parameters[1:], before[1:]))


def test_the_optimizer_keeps_no_layer_alive() -> None:
    layer = with_gradients(pp.nn.PowerLinear(4, 4, alpha=2.0))
    optimizer = pp.optim.PowerSGD(layer, 0.1)
    optimizer.step()
    reference = weakref.ref(layer)
    del layer
    gc.collect()
    assert reference() is None
    assert optimizer.param_groups


def test_a_weight_that_has_left_its_layer_is_plain(stepped: Callable[..., torch.Tensor]) -> None:
    """Folded, exchanged, or passed on to a layer that lives on: that of the moment counts."""
    folded, exchanged, first, second = (
        with_gradients(pp.nn.PowerLinear(4, 4, alpha=alpha, bias=False)) for alpha in (2, 2, 2, 3)
    )
    weights = [folded.weight, exchanged.weight, first.weight]
    optimizer = pp.optim.PowerSGD(weights, 0.1)
    optimizer.step()
    starts = [weight.detach().clone() for weight in weights]
    pp.fold(folded)
    exchanged.weight = nn.Parameter(torch.ones(4, 4))
    second.weight = first.weight
    del first
    gc.collect()
    optimizer.step()
    for weight, start, alpha in zip(weights, starts, (1, 1, 3), strict=True):
        assert torch.equal(weight, stepped(start, weight.grad, tensor_of(alpha), 0.1))
    del folded, exchanged
    gc.collect()
    optimizer.step()


def test_set_alpha_holds_from_the_next_step(stepped: Callable[..., torch.Tensor]) -> None:
    layer = with_gradients(pp.nn.PowerLinear(4, 4, alpha=1.5))
    optimizer = pp.optim.PowerSGD(layer, 0.1)
    optimizer.step()
    pp.set_alpha(layer, 3.0, keep="phi")
    before = layer.weight.detach().clone()
    optimizer.step()
    expected = stepped(before, layer.weight.grad, tensor_of(3.0), 0.1)
    assert torch.equal(layer.weight, expected)


def test_an_alpha_that_is_assigned_holds_from_the_next_step(
    stepped: Callable[..., torch.Tensor],
) -> None:
    layer = with_gradients(pp.nn.PowerLinear(4, 4, alpha=1.5))
    optimizer = pp.optim.PowerSGD(layer, 0.1)
    optimizer.step()
    before = layer.weight.detach().clone()
    layer.alpha = tensor_of(3.0)
    optimizer.step()
    assert torch.equal(layer.weight, stepped(before, layer.weight.grad, 3.0, 0.1))
    tied = pp.nn.PowerLinear(4, 4, alpha=3.0)
    tied.weight = layer.weight
    optimizer.step()
    tied.alpha = tensor_of(2.0)
    with pytest.raises(ValueError, match="share one weight, so they need the same alpha"):
        optimizer.step()


@pytest.mark.parametrize("of_layer", [True, False])
def test_parameters_exchanged_after_the_optimizer(
    of_layer: bool, stepped: Callable[..., torch.Tensor]
) -> None:
    layer = pp.nn.PowerLinear(4, 4, alpha=2.0, bias=False)
    optimizer = pp.optim.PowerSGD(layer if of_layer else nn.Linear(4, 4, bias=False), 0.1)
    weight = nn.Parameter(torch.full((4, 4), 0.5))
    weight.grad = torch.ones(4, 4)
    optimizer.param_groups[0]["params"] = [weight]
    optimizer.step()
    # By now the optimizer knows it, as a plain tensor.
    before = weight.detach().clone()
    layer._parameters["weight"] = weight
    optimizer.step()
    assert torch.equal(weight, stepped(before, weight.grad, 2.0, 0.1))


def test_other_threads_make_no_step_a_plain_one(stepped: Callable[..., torch.Tensor]) -> None:
    layer = pp.nn.PowerLinear(4, 4, alpha=3.0, bias=False)
    others = [pp.nn.PowerLinear(2, 2, alpha=2) for _ in range(100)]
    optimizer, start = pp.optim.PowerSGD(layer, 0.1), torch.full((4, 4), 0.5)
    expected = stepped(start, torch.ones(4, 4), 3.0, 0.1)
    done, errors = threading.Event(), []

    def make() -> None:
        try:
            while not done.is_set():
                pp.optim.PowerSGD(others[0], 0.1)
                pp.nn.PowerLinear(2, 2, alpha=2)
        except Exception as error:
            errors.append(error)

    thread, interval = threading.Thread(target=make), sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread.start()
    try:
        for _ in range(300):
            layer.set_theta(start)
            layer.weight.grad = torch.ones(4, 4)
            optimizer.step()
            assert torch.equal(layer.weight, expected)
    finally:
        done.set()
        thread.join()
        sys.setswitchinterval(interval)
    assert errors == []


def test_layers_tied_after_the_optimizer_need_one_alpha() -> None:
    first, second = pp.nn.PowerLinear(4, 4, alpha=2), pp.nn.PowerLinear(4, 4, alpha=3)
    optimizer = pp.optim.PowerSGD(with_gradients(first), 0.1)
    second.weight = first.weight
    for _ in range(2):
        with pytest.raises(ValueError, match="share one weight, so they need the same alpha"):
            optimizer.step()
    second.load_state_dict(first.state_dict())
    optimizer.step()


@pytest.mark.parametrize("rule", RULES)
def test_gradients_of_another_dtype(rule: str, stepped: Callable[..., torch.Tensor]) -> None:
    layer = pp.nn.PowerLinear(4, 4, alpha=2, bias=False)
    grad = torch.randn(4, 4).bfloat16()
    expected = stepped(layer.weight.detach(), grad.float(), 2.0, 0.1, rule)
    layer.weight.grad_dtype = torch.bfloat16
    layer.weight.grad = grad
    pp.optim.PowerSGD(layer, 0.1, rule=rule).step()
    assert torch.equal(layer.weight, expected)


def test_the_first_step_of_a_gradient_of_another_dtype_is_not_dampened() -> None:
    """The buffer starts as the gradient itself, as torch.optim.SGD's does."""
    weight = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    weight.grad_dtype = None
    optimizer = pp.optim.PowerSGD([weight], 0.1, momentum=0.9, dampening=0.5)
    buffer = 0.0
    for grad in (0.5, 0.25):
        weight.grad = torch.full((4,), grad)
        optimizer.step()
        buffer = 0.9 * buffer + 0.5 * grad if buffer else grad
        came = optimizer.state[weight]["momentum_buffer"]
        assert torch.equal(came, torch.full((4,), buffer, dtype=torch.bfloat16))


def test_plain_tensors_with_an_alpha_of_their_own(stepped: Callable[..., torch.Tensor]) -> None:
    values, grad = torch.randn(3, 3), torch.randn(3, 3)
    tensors = [values.clone().requires_grad_() for _ in range(3)]
    for tensor in tensors:
        tensor.grad = grad.clone()
    optimizer = pp.optim.PowerSGD([{"params": tensors[:1], "alpha": 2.0}], 0.1)
    optimizer.add_param_group({"params": tensors[1:2], "alpha": tensor_of(2.0), "lr": 0.2})
    optimizer.add_param_group({"params": tensors[2:]})
    optimizer.step()
    assert torch.equal(tensors[0], stepped(values, grad, tensor_of(2.0), 0.1))
    assert torch.equal(tensors[1], stepped(values, grad, tensor_of(2.0), 0.2))
    assert torch.equal(tensors[2], values.add(grad, alpha=-0.1))


def test_frozen_weights_and_weights_without_gradient_stay() -> None:
    model = pp.powerize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 2.0)
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = pp.optim.PowerSGD(model, 0.1, momentum=0.9)
    with_gradients(model)
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert model[0].weight not in optimizer.state
    optimizer.zero_grad()
    optimizer.step()


# ---- as an optimizer


def run(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        with_gradients(model)
        optimizer.step()


@pytest.mark.parametrize("rule", RULES)
def test_state_dict_round_trip(rule: str) -> None:
    torch.manual_seed(0)
    model = pp.powerize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 1.5)
    optimizer = pp.optim.PowerSGD(model, 0.01, momentum=0.9, rule=rule)
    run(optimizer, model, 3)
    twin = copy.deepcopy(model)
    other = pp.optim.PowerSGD(twin, 1.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["rule"] == rule
    run(optimizer, model, 3)
    run(other, twin, 3)
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


def test_the_state_of_a_torch_sgd_may_be_loaded() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    stock = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    run(stock, model, 2)
    pp.powerize(model, 1.5)
    optimizer = pp.optim.PowerSGD(model, 0.5, rule="chain")
    optimizer.load_state_dict(stock.state_dict())
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["rule"]) == (0.01, 0.9, "chain")
    buffer = stock.state[model[0].weight]["momentum_buffer"]
    assert torch.equal(optimizer.state[model[0].weight]["momentum_buffer"], buffer)
    run(optimizer, model, 2)
    decaying = torch.optim.SGD(model.parameters(), 0.01, weight_decay=0.1).state_dict()
    optimizer.load_state_dict(decaying)
    (group,) = optimizer.param_groups
    assert (group["weight_decay"], group["decay"], group["decay_of"]) == (0.1, "coupled", "theta")


def test_options_that_a_loaded_group_lacks_stay_those_of_the_group() -> None:
    tensors = [torch.ones(2, requires_grad=True) for _ in range(2)]
    stock = torch.optim.SGD([{"params": [t]} for t in tensors], 0.01, momentum=0.5)
    own = {
        "alpha": tensor_of(2.0),
        "rule": "chain",
        "decay": "decoupled",
        "decay_of": "phi",
        "master_weights": True,
    }
    optimizer = pp.optim.PowerSGD(
        [{"params": tensors[:1], **own, "note": 1}, {"params": tensors[1:]}], 1.0
    )
    optimizer.load_state_dict(stock.state_dict())
    for group, options in zip(optimizer.param_groups, (own, {}), strict=True):
        assert (group["lr"], group["momentum"]) == (0.01, 0.5)
        assert {name: group[name] for name in own} == {
            name: options.get(name, optimizer.defaults[name]) for name in own
        }
        assert "note" not in group


def test_what_hooks_make_of_a_state_is_what_is_loaded() -> None:
    """The whole of it: a new dict too, and float32 beside half weights."""
    weight = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    options = {"lr": 0.1, "momentum": 0.9, "master_weights": True}
    source, target = (pp.optim.PowerSGD([weight], **options) for _ in range(2))
    source.step()
    state = source.state_dict()
    precise = torch.full((2,), 1 + 2**-12)

    def renamed(_: torch.optim.Optimizer, given: dict) -> dict:
        (values,) = given["state"].values()
        group = {**given["param_groups"][0], "params": ["w"]}
        return {"state": {"w": {**values, "master": precise}}, "param_groups": [group]}

    handle = target.register_load_state_dict_pre_hook(renamed)
    target.load_state_dict(state)
    assert torch.equal(target.state[weight]["master"], precise)
    assert state["param_groups"][0]["params"] == [0]
    handle.remove()
    target.load_state_dict(state)
    assert torch.equal(target.state[weight]["master"], state["state"][0]["master"])


@pytest.mark.parametrize("rule", RULES)
def test_a_whole_compiled_step(rule: str) -> None:
    model = pp.powerize(nn.Sequential(nn.Linear(4, 4)), 2.0)
    twin = copy.deepcopy(model)

    def stepping(model: nn.Module) -> Callable[[], None]:
        optimizer = pp.optim.PowerSGD(model, 0.01, momentum=0.9, rule=rule)
        return lambda: run(optimizer, model, 1)

    compiled, eager = torch.compile(stepping(model), backend="eager"), stepping(twin)
    for _ in range(3):
        compiled()
        eager()
    assert all(map(torch.equal, model.parameters(), twin.parameters()))
    optimizer = pp.optim.PowerSGD(model, 0.01)
    torch.compile(optimizer.step, backend="eager")()


def test_deepcopy_of_model_and_optimizer() -> None:
    model = pp.powerize(nn.Sequential(nn.Linear(4, 4)), 1.5)
    optimizer = pp.optim.PowerSGD(model, 0.01, momentum=0.9)
    run(optimizer, model, 2)
    twin, other = copy.deepcopy((model, optimizer))
    run(optimizer, model, 2)
    run(other, twin, 2)
    assert torch.equal(model[0].weight, twin[0].weight)


def test_schedulers_and_closures() -> None:
    model = pp.powerize(nn.Sequential(nn.Linear(4, 4)), 1.5)
    optimizer = pp.optim.PowerSGD(model, torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(3):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[2] < losses[1] < losses[0]
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.0125)


def test_steps_bump_versions_and_leave_no_graph() -> None:
    layer = with_gradients(pp.nn.PowerLinear(4, 4, alpha=1.5))
    version = layer.weight._version
    pp.optim.PowerSGD(layer, 0.1).step()
    assert layer.weight._version > version
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad


def test_the_reference_takes_the_same_step(stepped: Callable[..., torch.Tensor]) -> None:
    theta, grad = torch.randn(100), torch.randn(100)
    step = stepped(theta, grad, tensor_of(1.7), 0.1)
    with pp.backend("reference"):
        torch.testing.assert_close(stepped(theta, grad, tensor_of(1.7), 0.1), step)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "lr must be a number >= 0, got -0.1"),
        ({"lr": float("nan")}, "lr must be a finite number, got nan"),
        ({"lr": torch.tensor(torch.inf)}, "lr must be a finite number, got inf"),
        ({"lr": torch.ones((), requires_grad=True)}, "there is no gradient with respect to lr"),
        ({"momentum": -1}, "momentum must be a number >= 0, got -1"),
        (
            {"momentum": 0.9, "dampening": float("nan")},
            "dampening must be a finite number, got nan",
        ),
        ({"nesterov": True}, "nesterov needs momentum > 0 and dampening = 0, got 0 and 0"),
        ({"rule": "target"}, "rule must be 'virtual' or 'chain', got 'target'"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    layer = pp.nn.PowerLinear(2, 2, alpha=2)
    with pytest.raises(ValueError, match=message):
        pp.optim.PowerSGD(layer, **{"lr": 0.1, **options})
    optimizer = pp.optim.PowerSGD([layer.weight], 0.1)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [layer.bias], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": "0.1"}, "lr must be a number, got '0.1'"),
        ({"lr": torch.ones(2)}, r"must hold one floating-point number, got \(2,\) torch.float32"),
        ({"lr": torch.tensor(True)}, r"must hold one floating-point number, got \(\) torch.bool"),
        ({"lr": torch.tensor(1j)}, r"must hold one floating-point number, got \(\) torch.complex"),
        ({"momentum": None}, "momentum must be a number, got None"),
        ({"weight_decay": "0"}, "weight_decay must be a number, got '0'"),
    ],
)
def test_options_of_the_wrong_kind(options: dict, message: str) -> None:
    layer = pp.nn.PowerLinear(2, 2, alpha=2)
    with pytest.raises(TypeError, match=message):
        pp.optim.PowerSGD(layer, **{"lr": 0.1, **options})
    with pytest.raises(TypeError, match=message):
        pp.optim.PowerSGD([{"params": layer.parameters(), **options}], 0.1)


def test_bad_groups() -> None:
    layer = pp.nn.PowerLinear(2, 2, alpha=2)
    with pytest.raises(ValueError, match=r"alpha must be a finite number >= 1, got 0\.5"):
        pp.optim.PowerSGD([{"params": [torch.ones(1)], "alpha": 0.5}], 0.1)
    with pytest.raises(
        ValueError, match="a group with an alpha of its own has the weight of Power"
    ):
        pp.optim.PowerSGD([{"params": layer.parameters(), "alpha": 2.0}], 0.1)
    other = pp.nn.PowerLinear(2, 2, alpha=3)
    other.weight = layer.weight
    with pytest.raises(ValueError, match="share one weight, so they need the same alpha"):
        pp.optim.PowerSGD(layer, 0.1)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(4, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(
        RuntimeError, match=r"gradients must be dense, got torch.sparse_coo .*\(4, 3"
    ):
        pp.optim.PowerSGD(embedding, 0.1).step()


@pytest.mark.parametrize("together", [True, False], ids=["in one group", "in groups"])
def test_a_refused_gradient_changes_nothing(together: bool) -> None:
    embedding, layer = nn.Embedding(4, 3, sparse=True), pp.nn.PowerLinear(4, 4, alpha=2.0)
    embedding(torch.tensor([1])).sum().backward()
    groups = [{"params": [*with_gradients(layer).parameters()]}, {"params": embedding.parameters()}]
    given = [p for group in groups for p in group["params"]] if together else groups
    twin = copy.deepcopy(layer)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    optimizer = pp.optim.PowerSGD(given, **options)
    with pytest.raises(RuntimeError, match="gradients must be dense"):
        optimizer.step()
    assert all(map(torch.equal, layer.parameters(), twin.parameters()))
    assert not any(optimizer.state.values())
    embedding.weight.grad = None
    optimizer.step()
    for own, parameter in zip(twin.parameters(), layer.parameters(), strict=True):
        own.grad = parameter.grad
    pp.optim.PowerSGD(twin, **options).step()
    assert all(map(torch.equal, layer.parameters(), twin.parameters()))
