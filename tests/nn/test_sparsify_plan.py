"""What `pp.sparsify` chooses, why, and how a plan is written, read and replayed."""
# Longer than 350 lines: a third of it is tables of what is refused or left dense.

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ppkernels as pp

KINDS = ["plain", "zeros", "theta", "phi"]
Make = Callable[..., nn.Module]
IMAGES = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(5))


class Measured:
    """A measure that remembers what it was asked, and answers by the weight's rows."""

    def __init__(self, times: dict[int, tuple[float, float]]) -> None:
        self.times, self.asked = times, []

    def __call__(
        self, dense: nn.Module, sparse: nn.Module, calls: Sequence[Any], training: bool
    ) -> tuple[float, float]:
        assert isinstance(sparse, pp.nn.Sparse)
        assert not isinstance(dense, pp.nn.Sparse)
        torch.testing.assert_close(sparse.dense(), dense.theta)
        self.asked.append((sparse.topology.rows, calls, training))
        return self.times.get(sparse.topology.rows, (1.0, 2.0))


def rows_of(plan: pp.SparsifyPlan) -> dict[str, pp.nn.PlannedLayer]:
    return {row.name: row for row in plan.layers}


def test_what_is_measured(pruned: Make) -> None:
    measure = Measured({24: (3e-3, 1e-3)})
    model = pruned("theta")
    plan = pp.sparsify(model, IMAGES, measure=measure)
    by_rows = {rows: calls for rows, calls, _ in measure.asked}
    # The input of the first layer asks for no gradient; `twice` is called twice, with one shape.
    assert [(c.shape, c.requires_grad, c.times) for c in by_rows[8]] == [((6, 3, 4, 4), False, 1)]
    assert [(c.shape, c.requires_grad, c.times) for c in by_rows[24]] == [((6, 24), True, 2)]
    assert all(training for *_, training in measure.asked)
    found = rows_of(plan)
    assert plan.sparse == ("flat", "twice")
    assert (found["twice"].calls, found["twice"].inputs) == (2, ((6, 24),))
    assert found["twice"].reason == "sparse is faster: 1 ms against 3 ms"
    assert found["head"].reason == "dense is faster: 1e+03 ms against 2e+03 ms"
    assert found["grouped"].reason == "it has 2 groups, and the sparse convolution has none"
    assert found["spare"].reason == "not reached by the sample input"
    assert found["second"].kind == "PowerConv2d"
    assert found["second"].shape == (16, 8, 3, 3)
    assert found["second"].kept == model.second.update_mask.count()
    assert (plan.training, plan.at_least, plan.threads) == (True, 1.0, 2)
    # Again: what is sparse stays, all else is asked about once more.
    again = pp.sparsify(model, IMAGES, training=False, measure=Measured({}))
    assert again.sparse == plan.sparse
    assert rows_of(again)["flat"].reason == "it is already"
    assert not again.training


@pytest.mark.parametrize(
    ("at_least", "sparse", "reason"),
    [
        (1.9, ("0",), "sparse is faster: 1 ms against 2 ms; 1.9 times are asked for"),
        (2.1, (), "sparse is faster: 1 ms against 2 ms; 2.1 times are asked for"),
        (1.0, ("0",), "sparse is faster: 1 ms against 2 ms"),
    ],
)
def test_how_much_faster(at_least: float, sparse: tuple[str, ...], reason: str) -> None:
    model = nn.Sequential(pp.nn.MaskedLinear(4, 4))
    model[0].set_theta(torch.eye(4))
    plan = pp.sparsify(model, torch.ones(1, 4), at_least=at_least, measure=lambda *_: (2e-3, 1e-3))
    assert (plan.sparse, plan.layers[0].reason) == (sparse, reason)


def test_reasons(faster: Any) -> None:
    class Own(nn.Linear):
        pass

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tied, self.tie = nn.Linear(4, 4), nn.Linear(4, 4)
            self.tie.weight = self.tied.weight
            self.whole, self.zero = nn.Linear(4, 4), nn.Linear(4, 4)
            self.own, self.normed = (
                Own(4, 4),
                nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            )
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.block = nn.TransformerEncoderLayer(4, 2, 4, batch_first=True)
            self.double = nn.Linear(4, 4).double()
            self.line = nn.Conv1d(4, 4, 1)
            self.circle = nn.Conv2d(4, 4, 1, padding_mode="circular")
            self.other = nn.Linear(4, 4)
            self.lazy = nn.LazyLinear(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(self.zero(self.whole(x)))

    model = Model()
    with torch.no_grad():
        model.zero.weight.zero_()
        for name, layer in model.named_modules():
            if (
                name not in ("whole", "lazy")
                and isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d))
                and "weight" in layer._parameters
            ):
                layer.weight[0] = 0
    plan = pp.sparsify(
        model, torch.ones(2, 4), select=lambda name, _: name != "other", measure=faster
    )
    assert plan.sparse == ()
    classes = "only layers of the classes {0}, Masked{0}, Power{0} can be, and no subclasses"
    assert {name: row.reason for name, row in rows_of(plan).items()} == {
        "tied": "its weight is shared with 'tie' (Linear)",
        "tie": "its weight is shared with 'tied' (Linear)",
        "whole": "not pruned",
        "zero": "all of its entries are 0, and none is frozen",
        "own": classes.format("Linear"),
        "normed": "torch.nn.utils has parametrized it",
        "attention.out_proj": "'attention' (MultiheadAttention) reads its weight",
        "block.self_attn.out_proj": "'block' (TransformerEncoderLayer) reads its weight",
        "block.linear1": "'block' (TransformerEncoderLayer) reads its weight",
        "block.linear2": "'block' (TransformerEncoderLayer) reads its weight",
        "double": "its weight is torch.float64, and the kernels have float32 and bfloat16",
        "line": classes.format("Conv2d"),
        "circle": "its padding_mode is 'circular', not 'zeros'",
        "other": "not selected",
        "lazy": "lazy; run a batch through the model first",
    }
    assert all(line == line.rstrip() for line in str(plan).splitlines())


def test_inputs_that_kernels_lack(faster: Any) -> None:
    model = nn.Sequential(pp.nn.MaskedLinear(4, 4))
    model[0].set_theta(torch.eye(4))
    with torch.autocast("cpu", dtype=torch.float16):
        plan = pp.sparsify(model, torch.ones(1, 4, dtype=torch.float16), measure=faster)
    assert plan.layers[0].reason == "input dtype float16 has no kernel"


@pytest.mark.parametrize("way", ["tensor", "tuple", "dict", "keyword"])
def test_sample_inputs(faster: Any, way: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = pp.nn.MaskedLinear(4, 4)
            self.layer.set_theta(torch.eye(4))

        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return self.layer(input=scale * x) if way == "keyword" else self.layer(scale * x)

    x = torch.ones(3, 4)
    sample = {"tensor": x, "tuple": (x, 2.0), "dict": {"x": x}, "keyword": x}[way]
    plan = pp.sparsify(Scaled(), sample, measure=faster)
    assert plan.layers[0].inputs == ((3, 4),)


@pytest.mark.parametrize("training", [True, False])
def test_the_clock(pruned: Make, training: bool) -> None:
    plan = pp.sparsify(pruned(), IMAGES, training=training)
    measured = [row for row in plan.layers if row.dense_ms is not None]
    assert [row.name for row in measured] == ["first", "second", "flat", "twice", "head"]
    for row in measured:
        assert row.dense_ms > 0
        assert row.sparse_ms > 0
        assert (row.choice == "sparse") == (row.speedup >= 1)


@pytest.mark.parametrize("kind", ["plain", "theta"])
def test_replay_and_checkpoint(pruned: Make, faster: Any, tmp_path: Path, kind: str) -> None:
    model = pruned(kind).eval()
    plan = pp.sparsify(model, IMAGES, select=["flat", "second"], measure=faster)
    plan.save(tmp_path / "plan.json")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    loaded = pp.SparsifyPlan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert str(loaded) == str(plan)
    # A model without zeros, and one with others.
    for fresh in (type(model)().eval(), pruned("plain", 0.6).eval()):
        if kind == "theta":
            pp.powerize(fresh, 1.25)
        own = pp.report(fresh).layers[3].kept
        assert pp.sparsify(fresh, plan=loaded) is loaded
        kept = own if own < 64 * 24 else rows_of(plan)["flat"].kept
        assert fresh.flat.topology.count() == kept
        fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
        assert isinstance(fresh.second, pp.nn.SparseConv2d)
        assert not isinstance(fresh.first, pp.nn.Sparse)
        assert fresh.flat.topology == model.flat.topology
        assert torch.equal(fresh(IMAGES), model(IMAGES))
        # The plan fits what it has made.
        pp.sparsify(fresh, plan=loaded)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_made_of_sparse_layers(pruned: Make, faster: Any, kind: str) -> None:
    model = pruned(kind)
    classes = [type(each) for each in model.modules()]
    first = pp.sparsify(model, IMAGES, select=["flat"], measure=faster)
    second = pp.sparsify(model, IMAGES, measure=faster)
    assert [row.kind for row in second.layers] == [row.kind for row in first.layers]
    fresh = type(model)()
    if kind in ("theta", "phi"):
        pp.powerize(fresh, 1.5, kind)
    pp.sparsify(fresh, plan=second)
    fresh.load_state_dict(model.state_dict())
    for each in (model, fresh):
        pp.densify(each)
    assert [type(each) for each in model.modules()] == classes
    # Layers that stayed dense have no masks in a fresh model.
    assert type(fresh.flat) is type(model.flat)
    if kind != "zeros":
        assert fresh.flat.update_mask == model.flat.update_mask


def test_the_plan_of_layers_that_were_made_sparse() -> None:
    made = nn.Sequential(pp.nn.SparseLinear(4, 4, kept=0.5), pp.nn.SparseConv2d(4, 4, 1, kept=0.5))
    pp.powerize(made, 2.0, select=["1"])
    plan = pp.sparsify(made, torch.ones(4, 4, 1, 4))
    assert [row.kind for row in plan.layers] == ["MaskedLinear", "PowerConv2d"]
    fresh = pp.powerize(nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1)), 2.0, select=["1"])
    pp.sparsify(fresh, plan=plan)
    assert [type(each) for each in pp.densify(fresh)] == [pp.nn.MaskedLinear, pp.nn.PowerConv2d]


def test_a_replay_keeps_the_largest(faster: Any) -> None:
    layer = pp.nn.MaskedLinear(4, 4)
    layer.set_theta(torch.eye(4))
    plan = pp.sparsify(layer, torch.ones(1, 4), measure=faster)
    fresh = nn.Linear(4, 4)
    expected = fresh.weight.detach().abs().flatten().topk(4).indices.sort().values
    pp.sparsify(fresh, plan=plan)
    assert torch.equal(fresh.topology.places(), expected)
    zero = nn.Linear(4, 4)
    nn.init.zeros_(zero.weight)
    pp.sparsify(zero, plan=plan)
    assert zero.topology.count() == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["assign", "to_empty", "nan"])
def test_a_replay_without_values(pruned: Make, faster: Any, kind: str, way: str) -> None:
    model = pruned(kind).eval()
    plan = pp.sparsify(model, IMAGES, measure=faster)
    with torch.device("cpu" if way == "nan" else "meta"):
        fresh = type(model)().eval()
        if kind in ("theta", "phi"):
            pp.powerize(fresh, 1.5, kind)
        if way == "nan":
            for parameter in fresh.parameters():
                nn.init.constant_(parameter, torch.nan)
        pp.sparsify(fresh, plan=plan)
    for name in plan.sparse:
        layer = fresh.get_submodule(name)
        assert layer.topology.count() == rows_of(plan)[name].kept
        assert layer.weight.is_meta == (way != "nan")
    if way == "to_empty":
        fresh.to_empty(device="cpu")
    fresh.load_state_dict(model.state_dict(), assign=way == "assign")
    assert torch.equal(fresh(IMAGES), model(IMAGES))
    fresh(IMAGES).sum().backward()
    pp.densify(fresh)
    kinds = {row.name: row.kind for row in plan.layers}
    assert all(type(fresh.get_submodule(name)).__name__ == kinds[name] for name in plan.sparse)


def test_a_sample_without_values(faster: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    plan = pp.sparsify(model, torch.ones(1, 4, device="meta"), measure=faster)
    reason = "its weight is on the meta device, where tensors have no values"
    assert [row.reason for row in plan.layers] == [reason]


def test_a_plan_of_another_model(pruned: Make, faster: Any) -> None:
    plan = pp.sparsify(pruned(), IMAGES, measure=faster)

    def changed(change: Callable[[nn.Module], object]) -> nn.Module:
        model = pruned("zeros")
        change(model)
        return model

    def stays_refused(model: nn.Module, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            pp.sparsify(model, plan=plan)
        assert not isinstance(model.first, pp.nn.Sparse)

    stays_refused(changed(lambda m: delattr(m, "head")), "has a MaskedLinear 'head', and ConvNet ")
    stays_refused(
        changed(lambda m: setattr(m, "flat", nn.Linear(32, 24))),
        r"'flat' has shape \(24, 64\) in the plan, and \(24, 32\) in ConvNet",
    )
    stays_refused(
        changed(lambda m: setattr(m, "more", nn.Linear(2, 2))), "a Linear 'more', of which the plan"
    )
    stays_refused(
        changed(lambda m: setattr(m.head, "weight", nn.Parameter(torch.ones(10, 24).double()))),
        r"'head' \(Linear\) is sparse in the plan and cannot be here: its weight is torch.float64",
    )
    powered = pp.sparsify(pruned("theta"), IMAGES, measure=faster)
    with pytest.raises(ValueError, match=r"'first' \(Conv2d\) is a PowerConv2d in the plan; pp"):
        pp.sparsify(pruned("zeros"), plan=powered)
    stays_refused(
        changed(lambda m: setattr(m, "spare", pp.nn.SparseLinear(5, 5, kept=0.5))),
        r"'spare' \(SparseLinear\) is dense in the plan; pp.densify",
    )


def test_what_is_no_plan(pruned: Make, tmp_path: Path) -> None:
    plan, path = pp.sparsify(pruned(), IMAGES, at_least=1e9), tmp_path / "plan.json"
    plan.save(path)
    good = json.loads(path.read_text())
    for change, message in (
        (lambda c: c.pop("format"), "format must be 'ppkernels.SparsifyPlan', got None"),
        (lambda c: c.update(version=9), "version must be 1, which this ppkernels reads, got 9"),
        (lambda c: c.pop("layers"), "the plan must have the keys"),
        (lambda c: c.update(at_least="2"), "at_least must be a number >= 0, got '2'"),
        (lambda c: c["layers"][0].update(choice="no"), r"layers\[0\].choice must be one of"),
        (lambda c: c["layers"][1].update(shape=[-1]), r"layers\[1\].shape must be a list of siz"),
        (lambda c: c["layers"][1].update(kept=10**9), r"layers\[1\].kept must be at most 288"),
        (lambda c: c["layers"][1].update(inputs=[3]), r"layers\[1\].inputs must be a list of sh"),
        (lambda c: c["layers"][1].pop("name"), r"layers\[1\] must have the keys"),
        (lambda c: c["layers"].append(c["layers"][0]), "layers must have different names"),
    ):
        content = copy.deepcopy(good)
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as error:
            pp.SparsifyPlan.load(path)
        assert str(path) in str(error.value)
    path.write_text("no")
    with pytest.raises(ValueError, match="is no JSON"):
        pp.SparsifyPlan.load(path)
    with pytest.raises(FileNotFoundError):
        pp.SparsifyPlan.load(tmp_path / "none.json")


def test_arguments(pruned: Make) -> None:
    model = pruned()
    for kwargs, kind, message in (
        ({}, TypeError, "give sample_input, or plan, and not both"),
        ({"sample_input": IMAGES, "plan": 3}, TypeError, "and not both"),
        ({"sample_input": IMAGES, "training": 1}, TypeError, "training must be True or False, got"),
        ({"plan": 3}, TypeError, r"plan must be a pp\.SparsifyPlan"),
        ({"sample_input": [IMAGES]}, TypeError, "must be a tensor, a tuple of arguments or a dict"),
        ({"sample_input": IMAGES, "at_least": -1}, ValueError, "at_least must be a number >= 0"),
        ({"sample_input": IMAGES, "at_least": "x"}, TypeError, "at_least must be a number"),
        ({"sample_input": IMAGES, "select": "flat"}, TypeError, "select must be several names"),
        ({"sample_input": IMAGES, "select": ["flut"]}, ValueError, "has no module named 'flut'"),
        ({"sample_input": IMAGES, "select": ["norm"]}, TypeError, "'norm' .*is no linear or conv"),
    ):
        with pytest.raises(kind, match=message):
            pp.sparsify(model, **kwargs)
    with pytest.raises(ValueError, match="ReLU holds no linear or convolution layer"):
        pp.sparsify(nn.ReLU(), IMAGES)
    with pytest.raises(TypeError, match=r"sparsify: model must be a torch\.nn\.Module"):
        pp.sparsify(3, IMAGES)


def test_the_table(faster: Any) -> None:
    model = nn.Sequential(*(pp.nn.MaskedLinear(4, 4) for _ in range(3)))
    for layer in model[:2]:
        layer.set_theta(torch.eye(4))
    times = iter([(2e-3, 1e-3), (1e-3, 1.5e-3)])
    plan = pp.sparsify(model, torch.ones(2, 4), measure=lambda *_: next(times))
    lines = str(plan).splitlines()
    assert lines[:5] == [
        "layer  shape     kept  input  dense  sparse  times  choice",
        "----------------------------------------------------------",
        "0      4x4     25.00%  2x4    2.000   1.000   2.00  sparse",
        "1      4x4     25.00%  2x4    1.000   1.500   0.67  dense: faster",
        "2      4x4    100.00%  -          -       -      -  dense: not pruned",
    ]
    assert lines[-2].startswith("dense, sparse: milliseconds, forward and backward, of all calls")
    assert lines[-1] == f"by 2 threads ({pp.cpu_capability()}). times: dense / sparse."
