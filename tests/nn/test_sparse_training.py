"""Sparse layers in training: as the dense ones, and in the company of PyTorch's tools."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import ppkernels as pp

FORMS = [None, "theta", "phi"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


# ---- training

STOCK = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
}
POWERED = {
    "power sgd": lambda params: pp.optim.PowerSGD(params, lr=0.05, momentum=0.9),
    "power adamw": lambda params: pp.optim.PowerAdamW(params, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("sparse_pair", ["linear", "conv"], indirect=True)
@pytest.mark.parametrize(
    ("stores", "optimizer"),
    [(form, name) for form in FORMS for name in POWERED]
    + [(form, name) for form in (None, "phi") for name in STOCK],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_training_is_the_dense_one(
    sparse_pair: Callable[..., tuple], stores: str | None, optimizer: str, frozen: bool
) -> None:
    dense, sparse, x = sparse_pair(stores)
    sparse.bias = nn.Parameter(sparse.bias.detach().clone())
    if frozen:
        is_free = torch.rand(sparse.weight.shape) < 0.6
        sparse.update_mask = pp.BitMask.pack(is_free)
        free = sparse.topology.scatter(is_free.float()) > 0
        dense.update_mask = pp.BitMask.pack(free)
    make = {**STOCK, **POWERED}[optimizer]
    start = sparse.theta.detach().clone()
    for layer in (dense, sparse):
        own = make(layer.parameters())
        for _ in range(20):
            own.zero_grad()
            (layer(x) - 1).square().mean().backward()
            own.step()
    torch.testing.assert_close(sparse.dense(), dense.theta.detach(), **CLOSE)
    torch.testing.assert_close(sparse.bias, dense.bias, **CLOSE)
    moved = sparse.theta != start
    assert moved.any()
    assert not (frozen and moved[~is_free].any())


def test_a_stock_optimizer_may_not_step_theta() -> None:
    layer = pp.nn.PowerSparseLinear(6, 4, kept=0.5, alpha=2.0)
    layer(torch.randn(2, 6)).sum().backward()
    with pytest.raises(RuntimeError, match=r"the weight of PowerSparseLinear.* holds theta"):
        torch.optim.SGD(layer.parameters(), lr=0.1).step()


def test_hidden_values_survive() -> None:
    layer, x = pp.nn.SparseLinear(6, 4, kept=0.5), torch.randn(2, 6)
    before = layer(x)
    layer.mask = pp.BitMask.pack(torch.arange(12) % 2 == 0)
    layer(x).sum().backward()
    assert (layer.weight.grad[1::2] == 0).all()
    assert (layer.theta[1::2] == 0).all()
    layer.mask = None
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize("keep", ["theta", "phi"])
def test_set_alpha_as_on_the_dense_layer(
    sparse_pair: Callable[..., tuple], stores: str, keep: str
) -> None:
    dense, sparse, _ = sparse_pair(stores)
    for layer in (dense, sparse):
        pp.set_alpha(layer, 2.7, keep=keep)
    torch.testing.assert_close(sparse.dense(), dense.theta)
    assert torch.equal(sparse.topology.scatter(sparse.weight), dense.weight)


def test_powerize_takes_a_sparse_layer() -> None:
    model = nn.Sequential(pp.nn.SparseLinear(6, 4, kept=0.5), pp.nn.SparseConv2d(2, 3, 3, kept=0.5))
    weights = [layer.weight for layer in model]
    dense = [layer.dense() for layer in model]
    pp.powerize(model, 2.0, "phi")
    assert [type(layer) for layer in model] == [
        pp.nn.PowerSparseLinear,
        pp.nn.PowerSparseConv2d,
    ]
    for layer, weight, theta in zip(model, weights, dense, strict=True):
        assert layer.weight is weight
        torch.testing.assert_close(layer.dense(), theta, rtol=1e-6, atol=0)
    assert pp.nn.add_masks(model) is model


def test_the_powered_initialiser_knows_the_fan_in() -> None:
    layer = pp.nn.PowerSparseLinear(400, 300, kept=0.1, alpha=2.0, stores="phi")
    pp.nn.init.truncated_normal_(layer)
    assert abs(layer.theta.std() * 20 - 1) < 0.03


@pytest.mark.parametrize(
    "documented",
    [
        pp.nn.SparseLinear,
        pp.nn.SparseLinear.from_linear,
        pp.nn.PowerSparseLinear,
        pp.nn.FoldedSparseLinear,
        pp.nn.SparseConv2d,
        pp.nn.PowerSparseConv2d,
        pp.nn.FoldedSparseConv2d,
        pp.nn.Sparse.change_topology,
    ],
)
def test_the_examples_run(documented: Callable) -> None:
    layer = pp.nn.SparseLinear(64, 64, kept=0.2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    example = inspect.cleandoc(inspect.getdoc(documented).split("Example::")[1])
    exec(example, {"torch": torch, "pp": pp, "layer": layer, "optimizer": optimizer})


# ---- in the company of PyTorch's tools


@pytest.mark.parametrize("stores", FORMS)
@pytest.mark.parametrize("sparse_pair", ["linear", "conv"], indirect=True)
def test_compiled_training(sparse_pair: Callable[..., tuple], stores: str | None) -> None:
    _, layer, x = sparse_pair(stores)
    layer.mask = pp.BitMask.pack(torch.rand(layer.weight.shape) < 0.8)
    # So that the sparse layer's input has a gradient too.
    model = nn.Sequential(nn.Linear(24, 24) if x.dim() == 2 else nn.Conv2d(4, 4, 1), layer)
    layer.topology.transposed()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            grads = []
            for run in (compiled, model):
                model.zero_grad()
                run(x).square().sum().backward()
                grads.append([parameter.grad.clone() for parameter in model.parameters()])
            torch.testing.assert_close(*grads)
            with torch.no_grad():
                layer.weight.mul_(0.9)


@pytest.mark.parametrize("stores", FORMS)
def test_autocast(sparse_pair: Callable[..., tuple], stores: str | None) -> None:
    dense, layer, x = sparse_pair(stores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), dense(x), rtol=0.05, atol=0.05)
    out.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("stores", FORMS)
def test_gradient_checkpointing(sparse_pair: Callable[..., tuple], stores: str | None) -> None:
    _, layer, x = sparse_pair(stores)
    x.requires_grad_()
    grads = []
    for out in (layer(x), checkpoint(layer, x, use_reentrant=False)):
        grads.append(torch.autograd.grad(out.square().sum(), [x, *layer.parameters()]))
    for came, wanted in zip(*grads, strict=True):
        assert torch.equal(came, wanted)


@pytest.mark.parametrize("stores", FORMS)
def test_functional_call_and_per_sample_gradients(
    sparse_pair: Callable[..., tuple], stores: str | None
) -> None:
    _, layer, x = sparse_pair(stores)
    layer.topology.transposed()
    values = {name: value.detach() for name, value in layer.named_parameters()}

    def loss(values: dict, one: Tensor) -> Tensor:
        return functional_call(layer, values, one.unsqueeze(0)).square().sum()

    doubled = {**values, "weight": 2 * values["weight"]}
    out = functional_call(layer, doubled, x)
    assert not torch.allclose(out, layer(x))
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    layer(x).square().sum().backward()
    torch.testing.assert_close(each["weight"].sum(0), layer.weight.grad, **CLOSE)


# ---- what differs from the dense layer


def test_clipping_counts_what_is_kept(sparse_pair: Callable[..., tuple]) -> None:
    dense, sparse, x = sparse_pair(None)
    norms = []
    for layer in (dense, sparse):
        layer.zero_grad()
        layer(x).square().sum().backward()
        norms.append(nn.utils.clip_grad_norm_(layer.weight, 1.0))
    assert norms[1] < norms[0]
    # Frozen entries out of it, the dense one is the same.
    dense.zero_grad()
    dense(x).square().sum().backward()
    kept = pp.apply_mask(dense.weight.grad, dense.update_mask.words)
    torch.testing.assert_close(kept.norm(), norms[1], rtol=1e-4, atol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_muon_refuses_a_row_of_values() -> None:
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([pp.nn.SparseLinear(8, 4, kept=0.5).weight])


def test_adafactor_factors_nothing() -> None:
    layer = pp.nn.SparseLinear(8, 4, kept=0.5)
    optimizer = torch.optim.Adafactor(layer.parameters())
    layer(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert "row_var" not in state
    assert state["variance"].shape == layer.weight.shape


def test_norms_are_of_the_row() -> None:
    layer = pp.nn.SparseLinear(8, 4, kept=0.5)
    single = nn.utils.parametrizations.weight_norm(copy.deepcopy(layer))
    assert single.parametrizations.weight.original0.shape == layer.weight.shape
    row = nn.utils.parametrizations.spectral_norm(copy.deepcopy(layer))
    torch.testing.assert_close(row.weight, layer.weight / layer.weight.norm())
