"""What looks after a model's layers, and sparse ones among them: entries not stored are zeros."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ppkernels as pp

Make = Callable[..., nn.Sequential]
X = torch.randn(8, 20, generator=torch.Generator().manual_seed(1))


def faster(dense: nn.Module, sparse: nn.Module, calls: Any, training: bool) -> tuple[float, float]:
    return 2e-3, 1e-3


def pruned(model: nn.Sequential, kept: float = 0.2) -> pp.sparsity.Pruner:
    pruner = pp.sparsity.Pruner(
        model, pp.sparsity.OneShot(kept), distribution=pp.sparsity.Uniform()
    )
    pruner.prune()
    return pruner


@pytest.mark.parametrize("kind", ["plain", "theta", "phi"])
def test_a_report_counts_what_is_not_stored(make_model: Make, kind: str) -> None:
    model = make_model(kind)
    pruned(model)
    dense = pp.report(model, bins=5)
    pp.sparsify(model, X, measure=faster)
    found = pp.report(model, bins=5)
    for row, expected in zip(
        (*found.layers, found.total), (*dense.layers, dense.total), strict=True
    ):
        assert (row.shape, row.kept, row.frozen) == (expected.shape, expected.kept, expected.frozen)
        assert (row.bytes_dense, row.bytes_packed) == (expected.bytes_dense, expected.bytes_packed)
        for name in ("count", "min", "max", "counts_below", "histogram", "range"):
            assert getattr(row.statistics, name) == getattr(expected.statistics, name)
        assert math.isclose(row.statistics.sum, expected.statistics.sum, rel_tol=1e-12)
        assert (row.alpha, row.stores) == (expected.alpha, expected.stores)
    assert found.other_parameters == dense.other_parameters
    sparse = "SparseLinear" if kind == "plain" else "PowerSparseLinear"
    assert [row.kind for row in found.layers] == [sparse, sparse]
    folded = pp.report(pp.fold(model), bins=5)
    assert [row.kept for row in folded.layers] == [row.kept for row in dense.layers]
    assert folded.total.frozen == folded.total.entries
    assert folded.layers[0].statistics.histogram == dense.layers[0].statistics.histogram


def test_a_report_of_nothing_kept() -> None:
    layer = pp.nn.MaskedLinear(4, 4)
    layer.set_theta(torch.zeros(4, 4))
    layer.update_mask = pp.BitMask.pack(torch.zeros(4, 4, dtype=torch.bool))
    pp.sparsify(layer, torch.ones(1, 4), measure=faster)
    row = pp.report(layer).layers[0]
    assert (row.kept, row.frozen, row.entries, row.statistics.max) == (0, 16, 16, 0.0)
    assert torch.equal(layer(torch.ones(1, 4))[0], layer.bias)


@pytest.mark.parametrize("entries", ["all", "trained"])
@pytest.mark.parametrize("keep", ["phi", "theta"])
def test_adaptive_alpha_sees_the_same(make_model: Make, entries: Any, keep: Any) -> None:
    model = make_model("theta", 1.5)
    pruned(model)
    histories = []
    sparse = copy.deepcopy(model)
    pp.sparsify(sparse, X, measure=faster)
    for each in (model, sparse):
        optimizer = pp.optim.PowerSGD(each.parameters(), 0.1, momentum=0.9, rule="chain")
        each(X).square().mean().backward()
        optimizer.step()
        adaptive = pp.AdaptiveAlpha(
            each, 1e-2, period=1, entries=entries, keep=keep, optimizer=optimizer
        )
        for _ in range(3):
            adaptive.step()
        histories.append(adaptive.history)
        each(X).square().mean().backward()
        optimizer.step()
    assert histories[0] == histories[1]
    for dense, layer in zip(model[::2], sparse[::2], strict=True):
        torch.testing.assert_close(layer.dense(), dense.theta.detach())


def test_pruners_refuse_sparse_layers(make_model: Make) -> None:
    model = make_model("theta")
    pruner = pruned(model)
    pp.sparsify(model, X, select=["0"], measure=faster)
    message = r"Pruner: '0' \(PowerSparseLinear\) cannot be pruned: it is sparse.*pp\.densify"
    for call in (
        pruner.step,
        lambda: pruner.prune(0.1),
        pruner.kept,
        lambda: pruner.load_state_dict(pruner.state_dict()),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
    for select in (None, ["0"], lambda name, _: name == "0"):
        with pytest.raises(TypeError, match=message):
            pp.sparsity.Pruner(model, pp.sparsity.OneShot(0.1), select=select)
    # What is dense can be pruned further, and all of it once it is dense again.
    assert pp.sparsity.Pruner(model, pp.sparsity.OneShot(0.5), select=["2"]).kept().count == 60
    pp.densify(model)
    pruner.prune(0.05)
    assert pruner.kept().counts == {"0": 30, "2": 15}
    assert pp.report(model).layers[0].kept == 30
    pp.sparsify(model, X, measure=faster)
    assert model[0].topology.count() == 30


def test_masks_and_powers_of_sparse_layers(make_model: Make) -> None:
    model = make_model("plain")
    pruned(model)
    pp.sparsify(model, X, measure=faster)
    classes = [type(each) for each in model]
    assert [type(each) for each in pp.nn.add_masks(model)] == classes
    expected = model(X)
    pp.powerize(model, 2.0)
    assert [type(each) for each in model[::2]] == [pp.nn.PowerSparseLinear] * 2
    torch.testing.assert_close(model(X), expected)
    pp.nn.init.truncated_normal_(model[0])
    # Of the dense layer's fan_in, 20, and not of the one value in a row of [E].
    assert 0.5 < model[0].theta.var() * 20 < 1.5
    folded = pp.fold(model)
    with pytest.raises(TypeError, match=r"powerize: '0' \(FoldedSparseLinear\) cannot be powered"):
        pp.powerize(folded, 2.0, select=["0"])


def test_statistics_of_norms_are_measured_anew() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 4))
    pruned(model, 0.3)
    batches = [torch.randn(4, 3, 4, 4) for _ in range(3)]
    dense = copy.deepcopy(model)
    pp.sparsify(model, batches[0], measure=faster)
    assert isinstance(model[0], pp.nn.SparseConv2d)
    for each in (model, dense):
        pp.sparsity.reestimate_batch_norm(each, batches)
    torch.testing.assert_close(model[1].running_var, dense[1].running_var)
