"""`pp.sparsify` and `pp.densify`: the same network, gradients and training, in place."""
# Longer than 350 lines: many short tests of one subject, which all change one network.

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import ppkernels as pp

KINDS = ["plain", "zeros", "theta", "phi"]
SPARSE = ("first", "second", "flat", "twice", "head")
Make = Callable[..., nn.Module]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "power sgd": lambda p: pp.optim.PowerSGD(p, 0.05, momentum=0.9),
    "power adamw": lambda p: pp.optim.PowerAdamW(p, 0.01, weight_decay=0.1),
}


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(5))


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    """θ of every layer as the dense network has it."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, pp.nn.Sparse):
            found[name] = layer.dense()
        elif isinstance(layer, (nn.Linear, nn.Conv2d)):
            found[name] = layer.theta if isinstance(layer, pp.nn.Masked) else layer.weight
    return {name: weight.detach().clone() for name, weight in found.items()}


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)  # of the dropout
    return model(x)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        seeded(model, images() + step).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_stay(pruned: Make, faster: Any, kind: str) -> None:
    model = pruned(kind)
    dense, x = copy.deepcopy(model), images().requires_grad_()
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    plan = pp.sparsify(model, x.detach(), measure=faster)
    assert plan.sparse == SPARSE
    assert dict(model.named_modules()) == modules
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    outputs, grads = [], []
    for each in (model, dense):
        y = seeded(each, x)
        y.square().sum().backward()
        outputs.append(y)
        assert x.grad is not None
        grads.append([x.grad, each.norm.weight.grad, each.second.weight.grad])
        x.grad = None
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(grads[0][:2], grads[1][:2])
    # Gradients of what is kept, of an entry's own values: φ where that is stored.
    torch.testing.assert_close(grads[0][2], model.second.topology.gather(grads[1][2]))
    torch.testing.assert_close(model.norm.running_mean, dense.norm.running_mean)
    model.eval(), dense.eval()
    torch.testing.assert_close(model(x), dense(x))


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_bit_for_bit(pruned: Make, faster: Any, kind: str) -> None:
    model = pruned(kind).eval()
    classes = [type(each) for each in model.modules()]
    before = copy.deepcopy(model.state_dict())
    ids = [id(parameter) for parameter in model.parameters()]
    calls: list[str] = []
    model.flat.register_forward_hook(lambda *_: calls.append("flat"))
    model.flat.note = "mine"
    pp.sparsify(model, images(), measure=faster)
    calls.clear()
    model(images())
    assert calls == ["flat"]
    assert model.flat.note == "mine"
    assert pp.densify(model) is model
    assert [type(each) for each in model.modules()] == classes
    assert [id(parameter) for parameter in model.parameters()] == ids
    after = model.state_dict()
    assert list(after) == list(before)
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    model(images())
    assert calls == ["flat", "flat"]
    assert model.flat.note == "mine"
    pp.sparsify(model, images(), measure=faster)
    assert isinstance(model.flat, pp.nn.SparseLinear)


def test_a_layer_itself(faster: Any) -> None:
    layer = pp.nn.MaskedLinear(6, 4)
    layer.update_mask = pp.BitMask.pack(layer.weight > 0)
    layer.set_theta(pp.apply_mask(layer.weight.detach(), layer.update_mask.words))
    x = torch.randn(2, 6)
    expected = layer(x)
    expected.sum().backward()  # a graph of the dense weight stays alive
    pp.sparsify(layer, x, measure=faster)
    assert isinstance(layer, pp.nn.SparseLinear)
    torch.testing.assert_close(layer(x), expected)
    kept = layer.weight.numel()
    assert layer.weight.grad is not None
    assert layer.weight.grad.shape == (kept,)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == (kept,)
    pp.densify(layer)
    assert type(layer) is pp.nn.MaskedLinear
    assert layer.weight.grad.shape == (4, 6)
    assert not layer.weight.grad[~layer.update_mask.unpack()].any()


def test_entries_that_are_frozen_or_hidden(faster: Any) -> None:
    layer = pp.nn.PowerLinear(4, 4, alpha=2.0)
    trained = torch.tensor([True, True, False, False]).expand(4, 4)
    layer.update_mask = pp.BitMask.pack(trained.contiguous())
    layer.mask = pp.BitMask.pack(torch.tensor([True, False, True, False]).repeat(4, 1))
    before, x = layer.theta.detach().clone(), torch.randn(2, 4)
    pp.sparsify(layer, x, measure=faster)
    # Seen or trained is kept; the last column is neither.
    assert layer.topology.count() == 12
    optimizer = pp.optim.PowerSGD(layer.parameters(), 0.1)
    layer(x).square().sum().backward()
    optimizer.step()
    after = layer.dense()
    assert torch.equal(after[:, 1:], before[:, 1:])
    assert not torch.equal(after[:, 0], before[:, 0])
    pp.densify(layer)
    assert torch.equal(layer.update_mask.unpack(), trained)
    assert torch.equal(layer.theta, after)


# Stock optimizers are refused the step of a weight that holds θ, sparse or not.
TRAINED = [
    (kind, name)
    for kind in ("plain", "theta", "phi")
    for name in OPTIMIZERS
    if kind != "theta" or name.startswith("power")
]


@pytest.mark.parametrize(("kind", "name"), TRAINED)
def test_training_goes_on(pruned: Make, faster: Any, kind: str, name: str) -> None:
    model = pruned(kind)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 3)
    dense = copy.deepcopy(model)
    dense_optimizer = OPTIMIZERS[name](dense.parameters())
    dense_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    groups = [[*group["params"]] for group in optimizer.param_groups]
    pp.sparsify(model, images(), optimizer=optimizer, measure=faster)
    assert all(a is b for a, b in zip(groups[0], optimizer.param_groups[0]["params"], strict=True))
    for state in optimizer.state.values():
        assert all(v.dim() == 0 or v.numel() < 500 for v in state.values())
    train(model, optimizer, 3)
    train(dense, dense_optimizer, 3)
    expected = dense_weights(dense)
    for layer, weight in dense_weights(model).items():
        torch.testing.assert_close(weight, expected[layer], rtol=1e-4, atol=1e-6)
    # And back: what is kept has the state that it had, all else has none.
    momentum = {id(p): dict(state) for p, state in optimizer.state.items()}
    topology = model.flat.topology
    pp.densify(model, optimizer=optimizer)
    for key, value in optimizer.state[model.flat.weight].items():
        if value.dim() > 0:
            assert value.shape == model.flat.weight.shape
            assert torch.equal(topology.gather(value), momentum[id(model.flat.weight)][key])
            assert not value[~topology.mask().unpack()].any()
    train(model, optimizer, 2)
    train(dense, dense_optimizer, 2)
    expected = dense_weights(dense)
    for layer, weight in dense_weights(model).items():
        torch.testing.assert_close(weight, expected[layer], rtol=1e-4, atol=1e-6)


def test_master_weights_and_several_optimizers(faster: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).to(torch.bfloat16)
    pp.powerize(model, 2.0)
    pp.sparsity.Pruner(model, pp.sparsity.OneShot(0.25)).prune()
    optimizers = [
        pp.optim.PowerSGD(each.parameters(), 0.01, momentum=0.9, master_weights=True)
        for each in model
    ]
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    for _ in range(2):
        model(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    masters = [each.state[m.weight]["master"] for each, m in zip(optimizers, model, strict=True)]
    pp.sparsify(model, x, optimizer=optimizers, measure=faster)
    for optimizer, layer, master in zip(optimizers, model, masters, strict=True):
        kept = optimizer.state[layer.weight]["master"]
        assert kept.dtype == torch.float32
        assert torch.equal(kept, layer.topology.gather(master))
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("way", ["sparse", "dense"])
def test_an_optimizer_that_was_not_told(pruned: Make, faster: Any, name: str, way: str) -> None:
    model = pruned("zeros")
    if way == "dense":
        pp.sparsify(model, images(), measure=faster)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 1)
    pp.sparsify(model, images(), measure=faster) if way == "sparse" else pp.densify(model)
    message = r"in its state has the shape .* before it became .*pp\.sparsify\(.*optimizer=opt"
    with pytest.raises(RuntimeError, match=message):
        train(model, optimizer, 1)


def test_a_state_of_before_a_checkpoint() -> None:
    layer, other = (pp.nn.PowerSparseLinear(8, 8, kept=k, alpha=2.0) for k in (0.5, 0.25))
    optimizer = pp.optim.PowerSGD(layer, 0.1, momentum=0.9)
    for _ in range(2):
        layer(torch.ones(2, 8)).sum().backward()
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    layer.load_state_dict(other.state_dict())
    layer(torch.ones(2, 8)).sum().backward()
    before = layer.weight.detach().clone()
    message = r"PowerSGD\.step: 'momentum_buffer' in its state has the shape \(32,\) that"
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    fresh = pp.optim.PowerSGD(layer, 0.1, momentum=0.9)
    fresh.load_state_dict(state)
    with pytest.raises(RuntimeError, match=message):
        fresh.step()
    assert torch.equal(layer.weight, before)
    pp.optim.PowerSGD(layer, 0.1, momentum=0.9).step()
    assert not torch.equal(layer.weight, before)


def test_states_that_do_not_follow(pruned: Make, faster: Any) -> None:
    model = pruned()
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="nobody has said how 'row_var' in the state that Adafa"):
        pp.sparsify(model, images(), optimizer=optimizer, measure=faster)
    assert not any(isinstance(each, pp.nn.Sparse) for each in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    history = torch.optim.LBFGS(model.parameters(), max_iter=1)
    history.step(lambda: seeded(model, images()).square().mean())
    with pytest.raises(RuntimeError, match="'old_dirs' in the state that LBFGS keeps"):
        pp.sparsify(model, images(), optimizer=history, select=["head"], measure=faster)
    with pytest.raises(TypeError, match=r"sparsify: optimizer must be a torch\.optim\.Optimizer"):
        pp.sparsify(model, images(), optimizer=[3])


def test_an_optimizer_of_another_model(pruned: Make, faster: Any) -> None:
    model, other = pruned(), pruned()
    optimizers = [torch.optim.SGD(each.parameters(), 0.1) for each in (other, model)]
    message = "optimizer must have a weight of the ConvNet, got SGD without"
    with pytest.raises(ValueError, match=f"sparsify: {message}"):
        pp.sparsify(model, images(), optimizer=optimizers[:1], measure=faster)
    pp.sparsify(model, images(), optimizer=optimizers, measure=faster)
    with pytest.raises(ValueError, match=f"densify: {message}"):
        pp.densify(model, optimizer=optimizers[0])
    assert isinstance(model.flat, pp.nn.SparseLinear)
    pp.densify(model, optimizer=optimizers)


def test_the_sample_leaves_nothing_behind(pruned: Make) -> None:
    model = pruned()
    model.twice.eval()
    modes = [each.training for each in model.modules()]
    x, before = images(), copy.deepcopy(model.state_dict())
    buffers = [id(buffer) for buffer in model.buffers()]
    random = torch.get_rng_state()
    pp.sparsify(model, x, at_least=1e9)
    assert [each.training for each in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [id(buffer) for buffer in model.buffers()] == buffers
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(each._forward_pre_hooks for each in model.modules())


def test_folded_and_powered_afterwards(pruned: Make, faster: Any) -> None:
    model = pruned("zeros").eval()
    expected = model(images())
    pp.sparsify(model, images(), measure=faster)
    pp.powerize(model, 1.5, select=["flat"])
    torch.testing.assert_close(model(images()), expected)
    folded = pp.fold(copy.deepcopy(model))
    torch.testing.assert_close(folded(images()), expected)
    assert pp.densify(folded) is folded
    assert isinstance(folded.flat, pp.nn.FoldedSparse)
    pp.densify(model)
    assert type(model.flat) is pp.nn.PowerLinear
    assert type(model.head) is nn.Linear
    torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_inference_mode(pruned: Make, faster: Any, kind: str) -> None:
    """What changes in it can be trained afterwards."""
    model = pruned(kind)
    if kind == "theta":
        bits = torch.rand_like(model.flat.weight) < 0.9
        model.flat.mask = pp.BitMask.pack(bits | ~model.flat.update_mask.unpack())
    optimizer = pp.optim.PowerSGD(model, 0.05, momentum=0.9)
    train(model, optimizer, 2)
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match=r"in torch\.inference_mode no backward can be mea"):
            pp.sparsify(model, images(), optimizer=optimizer, measure=faster)
        pp.sparsify(model, images(), training=False, optimizer=optimizer, measure=faster)
        assert torch.is_inference_mode_enabled()
    assert isinstance(model.flat, pp.nn.SparseLinear)
    train(model, optimizer, 2)
    none = torch.empty(0, dtype=torch.int64)
    with torch.inference_mode():
        dropped = torch.tensor([0, 1])
        place = model.flat.topology.places()[:1]
        model.flat.change_topology(dropped, place, optimizer=optimizer)
        model.flat.change_topology(none, none, optimizer=optimizer)
    train(model, optimizer, 2)
    state, plan = copy.deepcopy(model.state_dict()), pp.sparsify(model, images(), measure=faster)
    fresh = type(model)()
    if kind in ("theta", "phi"):
        pp.powerize(fresh, 1.5, kind)
    with torch.inference_mode():
        pp.sparsify(fresh, plan=plan)
        fresh.load_state_dict(state)
    assert not any(parameter.is_inference() for parameter in fresh.parameters())
    train(fresh, pp.optim.PowerSGD(fresh, 0.05, momentum=0.9), 2)
    with torch.inference_mode():
        pp.densify(model, optimizer=optimizer)
    train(model, optimizer, 2)


REPLACED: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "normalised": nn.utils.parametrizations.weight_norm,
    "pruned bias": lambda layer: prune.identity(layer, "bias"),
    "parametrized bias": lambda layer: parametrize.register_parametrization(
        layer, "bias", nn.Identity()
    ),
}


@pytest.mark.parametrize("way", REPLACED)
def test_parameters_that_torch_has_replaced(pruned: Make, faster: Any, way: str) -> None:
    dense = pruned()
    REPLACED[way](dense.head)
    plan = pp.sparsify(dense, images(), measure=faster)
    assert plan.sparse == SPARSE[:-1]
    model = pruned()
    pp.sparsify(model, images(), measure=faster)
    REPLACED[way](model.head)
    text, y = str(model), seeded(model, images())
    of = "bias" if "bias" in way else "weight"
    message = rf"densify of 'head': the {of} of .* is no longer a Parameter of its own"
    with pytest.raises(RuntimeError, match=re.compile(message, re.DOTALL)):
        pp.densify(model)
    assert str(model) == text
    assert torch.equal(seeded(model, images()), y)
    with pytest.raises(RuntimeError, match=f"to_dense: the {of} of"):
        model.head.to_dense()


def test_layers_with_a_forward_of_their_own(pruned: Make, faster: Any) -> None:
    def wrap(layer: nn.Module) -> None:
        inner = layer.forward
        layer.forward = lambda x: inner(x)

    model = pruned()
    wrap(model.flat)
    plan = pp.sparsify(model, images(), measure=faster)
    reason = "something has put a forward of its own in place of its class's"
    assert {row.name: row.reason for row in plan.layers}["flat"] == reason
    with pytest.raises(TypeError, match=f"cannot be sparse: {reason}"):
        pp.nn.SparseLinear.from_linear(model.flat)
    seeded(model, images())
    wrap(model.head)
    with pytest.raises(RuntimeError, match="densify of 'head': something has put a forward of its"):
        pp.densify(model)
    assert isinstance(model.first, pp.nn.SparseConv2d)
    seeded(model, images())


def tied(stores: str | None = None) -> nn.Sequential:
    """Two sparse layers of one weight, with a gradient."""
    options = {} if stores is None else {"alpha": 2.0, "stores": stores}
    make = pp.nn.SparseLinear if stores is None else pp.nn.PowerSparseLinear
    first = make(8, 8, kept=0.3, **options)
    second = make(8, 8, kept=first.topology, **options)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


@pytest.mark.parametrize("stores", [None, "theta", "phi"])
def test_tied_layers_come_back(stores: str | None) -> None:
    model, x = tied(stores), torch.randn(4, 8)
    optimizer = pp.optim.PowerSGD(model, 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    topology, weight = model[0].topology, model[0].weight
    y, grad = model(x), weight.grad.clone()
    momentum = optimizer.state[weight]["momentum_buffer"].clone()
    pp.densify(model, optimizer=optimizer)
    assert model[0].weight is model[2].weight is weight
    assert torch.equal(weight.grad, topology.scatter(grad))
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], topology.scatter(momentum))
    torch.testing.assert_close(model(x), y)
    optimizer.step()


def test_layers_that_share_a_weight_in_other_places() -> None:
    model = tied()
    mixed = nn.Sequential(model[0], pp.nn.SparseLinear(8, 8, kept=0.3))
    mixed[1].weight = mixed[0].weight
    y = mixed(torch.ones(2, 8))
    with pytest.raises(ValueError, match="shares the weight and has another topology"):
        pp.densify(mixed)
    assert torch.equal(mixed(torch.ones(2, 8)), y)
    model = tied()
    with pytest.raises(ValueError, match=r"'0' .* shares its weight with .* outside the model"):
        pp.densify(model[:1])
    assert isinstance(model[0], pp.nn.SparseLinear)


def test_copies_and_pickles_come_back_too(pruned: Make, faster: Any, tmp_path: Any) -> None:
    model = pruned("zeros")
    pp.sparsify(model, images(), measure=faster)
    torch.save(model, tmp_path / "model.pt")
    for each in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert type(pp.densify(each).flat) is nn.Linear
    made = pp.densify(nn.Sequential(pp.nn.SparseLinear(4, 4, kept=0.5)))
    assert type(made[0]) is pp.nn.MaskedLinear
    assert made[0].update_mask.count() == 8


def test_wrapped_models_are_refused(pruned: Make) -> None:
    for wrapper in (nn.DataParallel(pruned()), torch.compile(pruned())):
        with pytest.raises(ValueError, match="wraps a model whose layers are to change"):
            pp.sparsify(wrapper, images())
        with pytest.raises(ValueError, match=r"densify: .* wraps a model"):
            pp.densify(wrapper)
    with pytest.raises(TypeError, match=r"densify: model must be a torch\.nn\.Module"):
        pp.densify("model")
