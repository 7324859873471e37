"""`change_topology`: entries are dropped and grown in place, and all that belongs to them moves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import ppkernels as pp

FORMS = [None, "theta", "phi"]


def linear(kept: object = 0.3, stores: str | None = None, **options: object) -> nn.Module:
    if stores is None:
        return pp.nn.SparseLinear(16, 12, kept=kept, **options)
    return pp.nn.PowerSparseLinear(16, 12, kept=kept, alpha=2.0, stores=stores, **options)


def conv(kept: object = 0.3, stores: str | None = None, **options: object) -> nn.Module:
    if stores is None:
        return pp.nn.SparseConv2d(4, 6, 3, kept=kept, **options)
    return pp.nn.PowerSparseConv2d(4, 6, 3, kept=kept, alpha=2.0, stores=stores, **options)


KINDS = {"linear": (linear, (5, 16)), "conv": (conv, (2, 4, 6, 6))}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Callable[..., nn.Module], Tensor]:
    """What makes a layer, and an input of it."""
    make, size = KINDS[request.param]
    return make, torch.randn(size)


def choice(layer: nn.Module, drop: int, grow: int) -> tuple[Tensor, Tensor]:
    """Some entries, and some places that are not kept, in no order."""
    entries = torch.randperm(layer.topology.count())[:drop]
    free = (~layer.topology.mask()).unpack().flatten().nonzero().flatten()
    return entries, free[torch.randperm(len(free))[:grow]]


@pytest.mark.parametrize(("drop", "grow"), [(0, 0), (7, 7), (3, 20), (20, 3), (57, 5)])
@pytest.mark.parametrize("as_bools", [False, True])
@pytest.mark.parametrize("stores", FORMS)
def test_what_moves_where(
    kind: tuple, stores: str | None, as_bools: bool, drop: int, grow: int
) -> None:
    make, x = kind
    layer = make(57 / make(1.0).weight.numel() + 1e-9, stores)
    layer.update_mask = pp.BitMask.pack(torch.rand(57) < 0.7)
    layer.mask = pp.BitMask.pack(torch.rand(57) < 0.8)
    weight, entries, places = layer.weight, *choice(layer, drop, grow)
    values = torch.randn(grow)
    expected = layer.topology.scatter(layer.weight).flatten()
    expected[layer.topology.places()[entries]] = 0
    theta = values.double()
    expected[places] = (pp.inverse_power(theta, 2.0) if stores == "phi" else theta).float()
    masks = {}
    for name in ("update_mask", "mask"):
        bits = layer.topology.scatter(getattr(layer, name).unpack().float()).flatten()
        bits[layer.topology.places()[entries]] = 0
        bits[places] = 1
        masks[name] = bits
    before = layer.topology.places()
    layer(x).sum().backward()

    is_dropped = torch.zeros(57, dtype=torch.bool)
    is_dropped[entries] = True
    origin = layer.change_topology(is_dropped if as_bools else entries, places, values)
    topology = layer.topology
    assert layer.weight is weight
    assert weight.grad is None
    assert topology.count() == weight.numel() == 57 - drop + grow
    torch.testing.assert_close(topology.scatter(weight).flatten(), expected)
    for name, bits in masks.items():
        own = getattr(layer, name).unpack().float()
        assert torch.equal(topology.scatter(own).flatten(), bits)
    assert torch.equal(topology.places()[origin >= 0], before[origin[origin >= 0]])
    assert torch.equal(topology.places()[origin < 0], places.sort().values)
    # Hidden values are 0 to the network.
    torch.testing.assert_close(layer(x), layer.to_dense()(x))
    layer(x).sum().backward()
    assert weight.grad.shape == weight.shape


@pytest.mark.parametrize("stores", FORMS)
def test_grown_values_are_drawn(stores: str | None) -> None:
    layer = linear(0.1, stores, dtype=torch.bfloat16)
    entries, places = choice(layer, 0, 150)
    origin = layer.change_topology(entries, places)
    grown = layer.theta[origin < 0]
    assert (grown != 0).all()
    assert 0.2 < grown.abs().max() <= 0.25 * 1.01  # 1/√16
    assert (grown > 0).any()
    assert (grown < 0).any()


OPTIMIZERS = {
    "sgd": (None, lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9)),
    "adamw": (None, lambda params: torch.optim.AdamW(params, lr=0.01, amsgrad=True)),
    "adamw on phi": ("phi", lambda params: torch.optim.AdamW(params, lr=0.01)),
    "power sgd": ("theta", lambda params: pp.optim.PowerSGD(params, lr=0.05, momentum=0.9)),
    "power adamw": ("theta", lambda params: pp.optim.PowerAdamW(params, lr=0.01)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_with_changes_is_the_dense_one(kind: tuple, optimizer: str) -> None:
    make, x = kind
    stores, make_optimizer = OPTIMIZERS[optimizer]
    layer = make(0.3, stores)
    dense = layer.to_dense()
    dense.bias = nn.Parameter(layer.bias.detach().clone())
    pairs = [
        (layer, make_optimizer(layer.parameters())),
        (dense, make_optimizer(dense.parameters())),
    ]
    for step in range(20):
        for each, own in pairs:
            own.zero_grad()
            loss = (each(x) - 1).square().mean()
            loss.backward()
            own.step()
        if step % 5 == 4:
            entries, places = choice(layer, 10, 12)
            values = 0.1 * torch.randn(12).sign() * (1 + torch.rand(12))
            dropped = layer.topology.places()[entries]
            layer.change_topology(entries, places, values, optimizer=pairs[0][1])
            with torch.no_grad():
                dense.weight.view(-1)[dropped] = 0
                stored = pp.inverse_power(values, 2.0) if stores == "phi" else values
                dense.weight.view(-1)[places] = stored
            dense.update_mask = layer.topology.mask()
            for value in pairs[1][1].state[dense.weight].values():
                if value.shape == dense.weight.shape:
                    value.view(-1)[torch.cat([dropped, places])] = 0
    torch.testing.assert_close(layer.dense(), dense.theta.detach(), rtol=1e-4, atol=1e-5)
    steps = [own.state[each.weight].get("step") for each, own in pairs]
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    "make_optimizer",
    [
        lambda params: pp.optim.PowerSGD(params, lr=0.01, momentum=0.9, master_weights=True),
        lambda params: pp.optim.PowerAdamW(params, lr=0.01, master_weights=True),
    ],
)
def test_master_copies_of_grown_entries_are_their_values(make_optimizer: Callable) -> None:
    layer, x = linear(0.3, "theta", dtype=torch.bfloat16), torch.randn(5, 16).bfloat16()
    optimizer = make_optimizer(layer.parameters())
    layer(x).sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    before = state["master"].clone()
    values = torch.tensor([0.1, -0.2, 0.3])
    entries, places = choice(layer, 4, 3)
    origin = layer.change_topology(entries, places, values, optimizer=optimizer)
    master = state["master"]
    assert master.dtype == torch.float32
    assert torch.equal(master[origin >= 0], before[origin[origin >= 0]])
    assert torch.equal(master[origin < 0], values[places.argsort()])
    assert torch.equal(layer.weight[origin < 0], values[places.argsort()].bfloat16())
    layer(x).sum().backward()
    optimizer.step()
    assert (state["master"] - layer.weight.float()).abs().max() < 0.01


def test_one_of_several_optimizers_has_the_weight() -> None:
    first, second, x = linear(), linear(), torch.randn(5, 16)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (first, second)]
    for _ in range(2):
        (first(x) + second(x)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        second.change_topology(*choice(second, 3, 9), optimizer=optimizers)
    assert optimizers[1].state[second.weight]["exp_avg"].shape == second.weight.shape


def test_layers_that_share_the_weight_change_along() -> None:
    first, x = linear(), torch.randn(5, 16)
    second = linear(first.topology)
    second.weight = first.weight
    second.update_mask = pp.BitMask.pack(torch.rand(57) < 0.5)
    first.change_topology(*choice(first, 3, 9))
    assert second.topology == first.topology
    assert second.update_mask.numel() == 63
    assert first.update_mask is None
    assert torch.equal(first.dense(), second.dense())
    (first(x) + second(x)).sum().backward()
    # As many entries, and others.
    apart = linear(linear(0.33).topology)
    apart.weight = first.weight
    before = first.dense()
    with pytest.raises(ValueError, match="shares the weight and has another topology"):
        first.change_topology(*choice(first, 3, 9))
    assert torch.equal(first.dense(), before)


def test_a_live_graph_of_before_is_an_error() -> None:
    layer, x = linear(), torch.randn(5, 16, requires_grad=True)
    old = layer(x).sum()
    layer.change_topology(*choice(layer, 3, 3))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        old.backward()
    layer(x).sum().backward()
    assert layer.weight.grad.shape == layer.weight.shape


def test_hooks_survive() -> None:
    layer, x, seen = linear(), torch.randn(5, 16), []
    layer.weight.register_hook(lambda grad: seen.append(grad.numel()))
    layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.numel()))
    loss = layer(x).sum()
    loss.backward()
    layer.change_topology(*choice(layer, 3, 9))
    layer(x).sum().backward()
    assert seen == [57, 57, 63, 63]


def test_compiled_models_follow() -> None:
    layer = linear()
    model = nn.Sequential(nn.Linear(16, 16), layer)
    x = torch.randn(5, 16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for drop, grow in [(0, 0), (5, 5), (5, 9), (9, 3)]:
        layer.change_topology(*choice(layer, drop, grow))
        grads = []
        for run in (compiled, model):
            model.zero_grad()
            run(x).square().sum().backward()
            grads.append([parameter.grad.clone() for parameter in model.parameters()])
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([99], []), ValueError, "drop must be positions of entries >= 0 and < 57, got 99"),
        (([], ["kept"]), ValueError, "grow has place .*, which is kept already"),
        (([], [500]), ValueError, "grow must be places >= 0 and < 192, got 500"),
        (([], ["free"], torch.randn(2)), ValueError, r"a value for each place of grow, \(1,\)"),
        (([], ["free"], torch.ones(1).long()), TypeError, "values must be float32"),
        (([], ["free"], torch.zeros(1)), ValueError, "values must not be 0, nor become 0 in"),
        (([], ["free"], torch.tensor([float("nan")])), ValueError, "values must be finite"),
        (([], ["free"], torch.tensor([-float("inf")])), ValueError, "values must be finite"),
        (
            ([], ["free"], None, "sgd"),
            TypeError,
            "must be a torch.optim.Optimizer or several, got str",
        ),
        (
            ([], ["free"], None, None),
            ValueError,
            "optimizer must have the layer's weight, got SGD without",
        ),
    ],
)
def test_what_is_refused_changes_nothing(arguments: tuple, error: type, message: str) -> None:
    layer = linear(0.3, "theta")
    kept = layer.topology.places()
    free = (~layer.topology.mask()).unpack().flatten().nonzero().flatten()
    words = {"kept": int(kept[3]), "free": int(free[3])}
    drop, grow, *more = arguments
    drop = torch.tensor(drop, dtype=torch.int64)
    grow = torch.tensor([words.get(place, place) for place in grow], dtype=torch.int64)
    values = more[0] if more else None
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1)
    options = {"optimizer": more[1] or optimizer} if len(more) > 1 else {}
    before = copy.deepcopy(layer)
    with pytest.raises(error, match=message):
        layer.change_topology(drop, grow, values, **options)
    assert layer.topology == before.topology
    assert torch.equal(layer.weight, before.weight)


def test_values_may_be_0_where_they_come_back() -> None:
    for layer in (linear(), pp.nn.PowerSparseLinear(16, 12, kept=0.3, alpha=1.0)):
        origin = layer.change_topology(*choice(layer, 0, 2), torch.zeros(2))
        assert (layer.weight[origin < 0] == 0).all()


@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize(
    ("value", "message"), [(1e-20, "nor become 0 in torch.float16"), (1e30, "finite numbers")]
)
def test_what_half_precision_makes_of_values(stores: str, value: float, message: str) -> None:
    layer = linear(0.3, stores, dtype=torch.float16)
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=message):
        layer.change_topology(*choice(layer, 0, 2), torch.tensor([0.1, value]))
    assert torch.equal(layer.weight, before)
    origin = layer.change_topology(*choice(layer, 0, 2), torch.tensor([0.1, -0.2]))
    grown = layer.theta[origin < 0].abs().sort().values.float()
    torch.testing.assert_close(grown, torch.tensor([0.1, 0.2]), rtol=2e-3, atol=0)


def test_a_pruned_weight_is_refused() -> None:
    layer = prune.identity(linear(), "weight")
    with pytest.raises(RuntimeError, match="no longer a Parameter of its own"):
        layer.change_topology(*choice(layer, 1, 1))


def test_an_average_of_before_is_an_error() -> None:
    layer = linear()
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    averaged.update_parameters(layer)
    layer.change_topology(*choice(layer, 3, 9))
    with pytest.raises(RuntimeError, match="size"):
        averaged.update_parameters(layer)
