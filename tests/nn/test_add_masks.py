"""Plain layers with masks: pp.nn.add_masks, the layers it makes, and the ways to powered ones."""
# Longer than 350 lines: one subject, what a plain layer with masks is, becomes and is made of.

from __future__ import annotations

import copy
import gc
import inspect
import re
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import ppkernels as pp
from ppkernels import BitMask

PAIRS = [
    (pp.nn.MaskedLinear, nn.Linear, (6, 5)),
    (pp.nn.MaskedConv1d, nn.Conv1d, (4, 6, 3)),
    (pp.nn.MaskedConv2d, nn.Conv2d, (4, 6, 3)),
    (pp.nn.MaskedConv3d, nn.Conv3d, (4, 6, 3)),
]
each_pair = pytest.mark.parametrize(("masked", "plain", "sizes"), PAIRS)
STORES = ("theta", "phi")


def random_mask(layer: nn.Module) -> BitMask:
    return BitMask.pack(torch.rand(layer.weight.shape) < 0.5)


def with_masks(layer: nn.Module) -> nn.Module:
    layer.update_mask, layer.mask = random_mask(layer), random_mask(layer)
    return layer


def same_masks(layer: nn.Module, other: nn.Module) -> bool:
    return layer.update_mask == other.update_mask and layer.mask == other.mask


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Sequential(nn.Linear(5, 5)))


def batch(layer: nn.Module) -> torch.Tensor:
    dims = layer.weight.dim() - 2
    return torch.randn(3, 4, *[7] * dims) if dims else torch.randn(3, 6)


# ---- the layers


@each_pair
def test_constructor_start_and_outputs_are_the_plain_ones(
    masked: type, plain: type, sizes: tuple[int, ...]
) -> None:
    assert inspect.signature(masked) == inspect.signature(plain)
    assert issubclass(masked, plain)
    torch.manual_seed(0)
    layer = masked(*sizes)
    torch.manual_seed(0)
    reference = plain(*sizes)
    assert torch.equal(layer.weight, reference.weight)
    assert list(layer.state_dict()) == list(reference.state_dict())
    assert repr(layer) == repr(reference).replace(plain.__name__, masked.__name__)
    x = batch(layer)
    assert torch.equal(layer(x), reference(x))
    assert layer.theta is layer.weight


@each_pair
def test_without_a_mask_the_ops_are_the_plain_ones(
    masked: type, plain: type, sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    layer, reference = masked(*sizes), plain(*sizes)
    layer.update_mask = random_mask(layer)
    ops = []
    for each in (layer, reference):
        with torch.profiler.profile() as profile:
            each(batch(layer)).sum().backward()
        ops.append([event.name for event in profile.events() if "::" in event.name])
    assert ops[0] == ops[1]


@each_pair
def test_with_a_mask_the_network_sees_theta(
    masked: type, plain: type, sizes: tuple[int, ...]
) -> None:
    layer, reference = with_masks(masked(*sizes)), plain(*sizes)
    kept = layer.mask.unpack()
    with torch.no_grad():
        reference.weight.copy_(torch.where(kept, layer.weight, 0.0))
        reference.bias.copy_(layer.bias)
    assert torch.equal(layer.theta, reference.weight)
    x = batch(layer)
    for each in (layer, reference):
        each(x).square().sum().backward()
    assert torch.equal(layer(x), reference(x))
    assert torch.equal(layer.weight.grad, torch.where(kept, reference.weight.grad, 0.0))


def test_set_theta() -> None:
    layer = pp.nn.MaskedLinear(3, 2)
    weight, values = layer.weight, torch.randn(2, 3)
    layer.set_theta(values.double())
    assert layer.weight is weight
    assert torch.equal(layer.theta, values)
    with pytest.raises(ValueError, match=r"must have the shape of weight, \(2, 3\), got \(3,\)"):
        layer.set_theta(values[0])
    with pytest.raises(RuntimeError, match=r"set_theta: the weight of MaskedLinear.* is no longer"):
        prune.identity(layer, "weight").set_theta(values)


def test_replicas_of_data_parallel() -> None:
    layer = with_masks(pp.nn.MaskedLinear(6, 5))
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight.detach(), layer.bias.detach()
    x = torch.randn(3, 6)
    assert torch.equal(replica(x), layer(x))


# ---- add_masks


def test_a_model_changes_in_place_and_back() -> None:
    model = nn.Sequential(nn.Conv1d(6, 6, 3), nn.Conv1d(6, 6, 1), nn.Flatten(), nn.Linear(24, 3))
    x, seen = torch.randn(2, 6, 6), []
    model[3].register_forward_hook(lambda *_: seen.append(1))
    modules, parameters = list(model.modules()), list(model.parameters())
    expected, keys = model(x), list(model.state_dict())
    assert pp.nn.add_masks(model) is model
    names = ["MaskedConv1d", "MaskedConv1d", "Flatten", "MaskedLinear"]
    assert [type(module).__name__ for module in model] == names
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    assert model[0].update_mask is model[0].mask is None
    with_masks(model[3])
    masked, theta = model(x), model[3].theta.detach().clone()
    assert pp.fold(model) is model
    assert [type(module) for module in model] == [nn.Conv1d, nn.Conv1d, nn.Flatten, nn.Linear]
    assert torch.equal(model[3].weight, theta)
    assert torch.equal(model(x), masked)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert len(seen) == 4
    assert not hasattr(model[3], "update_mask")


@each_pair
def test_every_kind(masked: type, plain: type, sizes: tuple[int, ...]) -> None:
    layer = plain(*sizes)
    assert type(pp.nn.add_masks(layer)) is masked
    assert type(pp.fold(layer)) is plain
    assert type(pp.fold(masked(*sizes))) is plain


def test_what_has_masks_already_stays() -> None:
    model = mlp()
    pp.powerize(model, 2.0, "phi", select=["0"])
    with_masks(model[0])
    twin = copy.deepcopy(model[0])
    pp.nn.add_masks(model)
    assert type(model[0]) is pp.nn.PowerLinear
    assert same_masks(model[0], twin)
    with_masks(model[2][0])
    twin = copy.deepcopy(model)
    pp.nn.add_masks(model)
    pp.nn.add_masks(model, select=["0", "2.0"])
    assert same_masks(model[2][0], twin[2][0])
    assert [type(layer).__name__ for layer in (model[0], model[2][0])] == [
        "PowerLinear",
        "MaskedLinear",
    ]


def test_choice_of_layers() -> None:
    for select in (["2.0"], lambda name, _: name != "0", lambda _, layer: layer.in_features == 5):
        model = pp.nn.add_masks(mlp(), select=select)
        assert [type(model[0]), type(model[2][0])] == [nn.Linear, pp.nn.MaskedLinear]


class OwnLinear(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("model", "select", "error", "message"),
    [
        (mlp(), ["7"], ValueError, "Sequential has no module named '7'"),
        (mlp(), "2", TypeError, "select must be several names or a function, got '2'"),
        (mlp(), [], ValueError, "of Sequential no layer at all was selected"),
        (mlp(), ["1"], TypeError, "'1' (ReLU) cannot be given masks: only nn.Linear, nn.Conv1d"),
        ("x", None, TypeError, "model must be a torch.nn.Module, got str"),
        (nn.ReLU(), None, ValueError, "ReLU holds no layer that can be given masks: only nn.Lin"),
        (OwnLinear(2, 2), None, TypeError, "the OwnLinear given cannot be given masks: only nn."),
        (nn.LazyLinear(2), None, TypeError, "the LazyLinear given cannot be given masks: it is la"),
        (nn.Embedding(2, 2), None, TypeError, "the Embedding given cannot be given masks"),
        (
            prune.identity(nn.Linear(2, 2), "weight"),
            None,
            TypeError,
            "the Linear given cannot be given masks: its weight is no Parameter",
        ),
        (
            nn.Linear(2, 2, dtype=torch.complex64),
            None,
            TypeError,
            "the Linear given cannot be given masks: its weight is torch.complex64",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refusals(model: object, select: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^add_masks: " + re.escape(message)):
        pp.nn.add_masks(model, select=select)


def test_others_are_left_alone() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), OwnLinear(2, 2), nn.Embedding(2, 2), normed)
    before = [type(module) for module in model]
    pp.nn.add_masks(model)
    assert [type(module) for module in model] == [pp.nn.MaskedLinear, *before[1:]]


@pytest.mark.parametrize("name", ["theta", "mask", "update_mask"])
def test_an_attribute_in_the_way(name: str) -> None:
    layer = nn.Linear(2, 2)
    setattr(layer, name, 1)
    with pytest.raises(TypeError, match=f"it has an attribute '{name}' of its own"):
        pp.nn.add_masks(layer)
    delattr(layer, name)
    # Only powerize wants these.
    layer.alpha, layer.stores = 16, "heat"
    pp.nn.add_masks(layer)
    with pytest.raises(TypeError, match="it has an attribute 'alpha' of its own"):
        pp.powerize(layer, 2.0)


def test_attention_reads_the_weight_itself() -> None:
    model = nn.MultiheadAttention(4, 2).eval()
    before, x = type(model.out_proj), torch.randn(3, 1, 4)
    expected = model(x, x, x)[0]
    pp.nn.add_masks(model)
    projection = model.out_proj
    assert type(projection) is pp.nn.MaskedLinear
    projection.mask = BitMask.zeros((4, 4))
    assert torch.equal(model(x, x, x)[0], expected)
    projection.mask = None
    projection.update_mask = random_mask(projection)
    twin = copy.deepcopy(model)
    model(x, x, x)[0].sum().backward()
    pp.optim.PowerSGD(model, 1.0).step()
    frozen = ~projection.update_mask.unpack()
    assert torch.equal(projection.weight[frozen], twin.out_proj.weight[frozen])
    assert not torch.equal(projection.weight, twin.out_proj.weight)
    for each in (pp.powerize(model, 2.0), twin):
        assert type(pp.fold(each).out_proj) is before


def test_tied_weights(tied_model: type[nn.Module]) -> None:
    model, x = tied_model().eval(), torch.randint(17, (2, 4))
    expected = model(x)
    pp.nn.add_masks(model)
    assert model.head.weight is model.tokens.weight
    assert torch.equal(model(x), expected)
    model.head.update_mask = random_mask(model.head)
    twin = copy.deepcopy(model)
    assert twin.head.weight is twin.tokens.weight
    assert twin.head.update_mask == model.head.update_mask
    model.head.mask = random_mask(model.head)
    with pytest.raises(ValueError, match=r"fold: 'head'.* and 'tokens'.* share one weight, and th"):
        pp.fold(model)
    model.head.mask = None
    pp.fold(model)
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    pp.nn.add_masks(nn.ModuleList([first, second]))
    first.mask = second.mask = random_mask(first)
    with pytest.raises(ValueError, match=r"a mask hides in part, with MaskedLinear.* outside"):
        pp.fold(first)
    theta = first.theta.detach().clone()
    pp.fold(nn.ModuleList([first, second]))
    assert torch.equal(second.weight, theta)


def test_a_subclass_does_not_fold_and_is_not_powered() -> None:
    class Own(pp.nn.MaskedLinear):
        pass

    model = nn.Sequential(Own(3, 3), nn.Linear(3, 3))
    assert pp.nn.add_masks(model)[0].update_mask is None
    with pytest.raises(TypeError, match=r"'0' \(Own\) is a subclass of a masked layer"):
        pp.fold(model)
    with pytest.raises(TypeError, match=r"'0' \(Own\) cannot be powered: only nn.Linear"):
        pp.powerize(model, 2.0, select=["0"])


def test_layers_are_kept_by_nobody() -> None:
    layer = with_masks(pp.nn.add_masks(nn.Linear(3, 3)))
    references = [weakref.ref(layer), weakref.ref(layer.weight)]
    del layer
    gc.collect()
    assert [reference() for reference in references] == [None, None]


# ---- plain and powered


@pytest.mark.parametrize("stores", STORES)
def test_powerize_keeps_masks(stores: str) -> None:
    layer = with_masks(nn.Sequential(pp.nn.add_masks(nn.Linear(6, 5)))[0])
    twin, weight, x = copy.deepcopy(layer), layer.weight, torch.randn(3, 6)
    pp.powerize(nn.Sequential(layer), 1.5, stores)
    assert type(layer) is pp.nn.PowerLinear
    assert layer.weight is weight
    assert same_masks(layer, twin)
    torch.testing.assert_close(layer(x), twin(x))
    # What the mask hides has become φ too.
    layer.mask = twin.mask = None
    torch.testing.assert_close(layer.theta, twin.theta)
    assert type(pp.fold(layer)) is nn.Linear
    assert torch.allclose(layer(x), twin(x))


@each_pair
def test_powerize_of_every_kind(masked: type, plain: type, sizes: tuple[int, ...]) -> None:
    layer = pp.powerize(masked(*sizes), 2.0)
    assert type(layer).__name__ == f"Power{plain.__name__}"
    assert type(pp.fold(layer)) is plain


def test_a_masked_layer_is_not_powered() -> None:
    model = pp.nn.add_masks(mlp())
    with pytest.raises(ValueError, match="set_alpha: Sequential holds no powered layer"):
        pp.set_alpha(model, 2.0, keep="theta")
    pp.powerize(model, 1.5, select=["0"])
    pp.set_alpha(model, 2.0, keep="theta")
    assert model[0].alpha.item() == 2.0
    assert not hasattr(model[2][0], "alpha")
    for stores, message in (("phi", "would take phi for theta"), ("theta", None)):
        pair = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
        pair[1].weight = pair[0].weight
        pp.nn.add_masks(pair)
        if message is None:
            pp.powerize(pair[0], 2.0, stores)
            pp.set_alpha(pair, 3.0, keep="theta")
            continue
        with pytest.raises(ValueError, match=f"MaskedLinear.* outside the model .*{message}"):
            pp.powerize(pair[0], 2.0, stores)


# ---- checkpoints


def test_checkpoints_of_plain_and_masked_layers() -> None:
    plain, masked = nn.Linear(6, 5), with_masks(pp.nn.MaskedLinear(6, 5))
    before = copy.deepcopy(masked)
    masked.load_state_dict(plain.state_dict())
    assert torch.equal(masked.weight, plain.weight)
    assert same_masks(masked, before)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*update_mask"):
        plain.load_state_dict(masked.state_dict())
    masked.update_mask = masked.mask = None
    plain.load_state_dict(masked.state_dict())


@pytest.mark.parametrize("stores", STORES)
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_a_masked_checkpoint_in_a_powered_layer(stores: str, alpha: float) -> None:
    masked = with_masks(pp.nn.MaskedLinear(6, 5))
    powered = pp.nn.PowerLinear(6, 5, alpha=alpha, stores=stores)
    powered.load_state_dict(masked.state_dict())
    assert powered.alpha.item() == alpha
    assert same_masks(powered, masked)
    torch.testing.assert_close(powered.theta, masked.theta)


@pytest.mark.parametrize("stores", STORES)
def test_a_powered_checkpoint_in_a_masked_layer(stores: str) -> None:
    masked = nn.Sequential(with_masks(pp.nn.MaskedLinear(6, 5)))
    powered = nn.Sequential(with_masks(pp.nn.PowerLinear(6, 5, alpha=1.0, stores=stores)))
    masked.load_state_dict(powered.state_dict())
    assert same_masks(masked[0], powered[0])
    assert torch.equal(masked[0].theta, powered[0].theta)
    powered[0].mask = None
    masked.load_state_dict(powered.state_dict())
    assert masked[0].mask is None
    before = copy.deepcopy(masked[0])
    pp.set_alpha(powered, 2.0, keep="phi")
    message = {
        "theta": r'Unexpected key.*"0\.alpha"',
        "phi": r'"0\.weight": the checkpoint holds phi, under an exponent of 2\.0, and the layer i',
    }
    with pytest.raises(RuntimeError, match=message[stores]):
        masked.load_state_dict(powered.state_dict())
    if stores == "theta":
        masked.load_state_dict(powered.state_dict(), strict=False)
        assert torch.equal(masked[0].weight, powered[0].weight)
    else:
        with pytest.raises(RuntimeError, match="holds phi"):
            masked.load_state_dict(powered.state_dict(), strict=False)
    assert before.update_mask == powered[0].update_mask


@pytest.mark.parametrize("alpha", ["2", torch.ones(2)])
def test_an_exponent_that_is_none(alpha: object) -> None:
    layer = pp.nn.MaskedLinear(6, 5)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"alpha"'):
        layer.load_state_dict({**layer.state_dict(), "alpha": alpha})


# ---- the optimizers of pp.optim


def optimizers(params: object) -> list[torch.optim.Optimizer]:
    return [
        pp.optim.PowerSGD(params, 0.1, momentum=0.9, weight_decay=0.1),
        pp.optim.PowerAdamW(params, 0.1, weight_decay=0.1),
    ]


@pytest.mark.parametrize("place", [0, 1], ids=["sgd", "adamw"])
@each_pair
def test_power_optimizers_honour_the_mask_and_step_as_on_a_plain_layer(
    masked: type, plain: type, sizes: tuple[int, ...], place: int
) -> None:
    layer, reference = masked(*sizes), plain(*sizes)
    reference.load_state_dict(layer.state_dict())
    optimizer, other = (optimizers(each)[place] for each in (layer, reference))
    layer.update_mask = random_mask(layer)
    free = layer.update_mask.unpack()
    start = layer.weight.detach().clone()
    for _ in range(20):
        for mine, theirs in zip(layer.parameters(), reference.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            theirs.grad = mine.grad.clone()
        optimizer.step()
        other.step()
    assert torch.equal(layer.weight, torch.where(free, reference.weight, start))
    for value in optimizer.state[layer.weight].values():
        if value.dim():
            assert not value[~free].any()


def test_power_optimizers_and_what_layers_say_of_a_weight() -> None:
    first, second = (pp.nn.MaskedLinear(4, 4, bias=False) for _ in range(2))
    second.weight = first.weight
    optimizer = pp.optim.PowerSGD(first, 0.1)
    first.update_mask, second.update_mask = BitMask.zeros((4, 4)), BitMask.ones((4, 4))
    first.weight.grad = torch.ones(4, 4)
    with pytest.raises(ValueError, match=r"MaskedLinear.*share one weight, so their update masks"):
        optimizer.step()
    del second, optimizer
    gc.collect()
    # A group's own exponent holds for a plain layer's weight, masked or not.
    grouped, before = torch.ones(4, 4, requires_grad=True), first.weight.detach().clone()
    grouped.grad = torch.ones(4, 4)
    with torch.no_grad():
        grouped.copy_(first.weight)
    first.update_mask = BitMask.pack(torch.eye(4).bool())
    pp.optim.PowerSGD([{"params": [first.weight, grouped], "alpha": 2.0}], 0.1).step()
    assert torch.equal(first.weight, torch.where(torch.eye(4).bool(), grouped, before))
    # Its layer may go: there is no exponent that would be missed.
    weight = first.weight
    optimizer = pp.optim.PowerSGD([weight], 0.1)
    optimizer.step()
    del first
    gc.collect()
    optimizer.step()
