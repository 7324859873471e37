"""The benchmark of sparse layers: its rivals, its bars, memory counted in bytes, and the sweep."""

from __future__ import annotations

import copy
import itertools
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import bench.__main__ as command
import ppkernels as pp
from bench import machine, models, results, rivals, sparse, sweep, training
from bench.crossover import apart, crossover
from bench.registry import ROWS
from bench.row import Bar, Call
from bench.sparse import BOTH, DENSE, FORWARD

BY_NAME = {row.name: row for row in ROWS}
CPU = torch.device("cpu")
needs_csr = pytest.mark.skipif(rivals.CSR in rivals.absent(), reason="torch was built without MKL")


# ---- rows


def test_rows_have_the_entries_they_say() -> None:
    for name, numel in (
        ("spmm/forward/2048x2048/kept=0.05/batch=64", 40 * 40),
        ("sparse_conv/forward+backward/3x3/256-256/14x14/batch=32/kept=0.1", 9 * 40 * 40),
    ):
        inputs = BY_NAME[name].inputs(40, CPU)
        kept = float(name.partition("kept=")[2].partition("/")[0])
        assert inputs.plain.weight.numel() == numel
        assert torch.count_nonzero(inputs.plain.weight) == round(kept * numel)
        assert inputs.grad_output.shape == inputs.plain(inputs.input).shape


def test_a_row_of_another_shape_keeps_its_ratio() -> None:
    row = sparse.linear_row(FORWARD, 3, 0.5, out_features=300, in_features=784)
    assert row.name == "spmm/forward/300x784/kept=0.5/batch=3"
    inputs = row.inputs(75, CPU)
    assert inputs.plain.weight.shape == (75, 196)
    assert inputs.input.shape == (3, 196)
    assert row.flops is not None
    assert row.flops(300) == 3 * 300 * 784


def test_operations_are_those_of_the_entries() -> None:
    forward = BY_NAME["spmm/forward/2048x2048/kept=0.1/batch=64"].flops
    both = BY_NAME["spmm/forward+backward/2048x2048/kept=0.1/batch=64"].flops
    assert forward is not None
    assert both is not None
    assert forward(100) == 2 * 64 * 1000
    assert both(100) == 3 * forward(100)


CONV = [(DENSE, 2), (sparse.CHANNELS_LAST, 2)]


@pytest.mark.parametrize(
    ("name", "promised"),
    [
        ("spmm/forward/2048x2048/kept=0.01/batch=1", [(DENSE, 20)]),
        ("spmm/forward/2048x2048/kept=0.1/batch=64", [(DENSE, 4), (rivals.CSR, 1.5)]),
        ("spmm/forward/2048x2048/kept=0.1/batch=256", [(rivals.CSR, 1.5)]),
        ("spmm/forward+backward/2048x2048/kept=0.2/batch=256", [(DENSE, 1.8)]),
        ("sparse_conv/forward+backward/3x3/256-256/14x14/batch=32/kept=0.05", CONV),
        ("sparse_conv/forward+backward/3x3/256-256/14x14/batch=32/kept=0.2", []),
    ],
)
def test_promises(name: str, promised: list[tuple[str, float]]) -> None:
    here = [Bar("faster", limit, who) for who, limit in promised if who not in rivals.absent()]
    assert list(BY_NAME[name].bars) == here


@needs_csr
@pytest.mark.parametrize("batch", [1, 5])
def test_csr_has_the_gradients_of_the_layer(batch: int) -> None:
    row = sparse.linear_row(BOTH, batch, 0.2)
    inputs = row.inputs(32, CPU)
    plain = inputs.plain
    plain(inputs.input.requires_grad_()).backward(inputs.grad_output)
    csr = rivals.CsrLinear(plain)
    input = inputs.input.detach()
    found = csr.backward(inputs.grad_output.t().contiguous(), input)
    torch.testing.assert_close(found[0].t(), inputs.input.grad)
    is_kept = plain.weight != 0
    torch.testing.assert_close(found[1].values(), plain.weight.grad[is_kept])
    torch.testing.assert_close(found[2], plain.bias.grad)
    output = csr.forward(input.t().contiguous()).t()
    torch.testing.assert_close(output, plain(input).detach())


def test_a_library_of_its_own_threads_is_told_how_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with rivals.own_openmp():
        assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "OMP_WAIT_POLICY" not in os.environ


def test_who_takes_no_part_is_said_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: None)
    monkeypatch.setattr(rivals, "has_amx", lambda: False)
    rivals.absent.cache_clear()
    try:
        rows = [sparse.linear_row(FORWARD, batch, 0.1) for batch in (1, 8)]
        conv = sparse.conv_row(0.1)
    finally:
        rivals.absent.cache_clear()
    assert set(rows[0].rivals) <= {DENSE, rivals.CSR}
    assert set(conv.rivals) == {DENSE, sparse.CHANNELS_LAST}
    assert not any("sparselab" in sentence for sentence in conv.absent)
    monkeypatch.setattr(command, "rows_on", lambda device: rows)
    monkeypatch.setattr(results, "failing_ops", lambda ops, device: {})
    monkeypatch.setattr(machine, "roof", lambda *args: [])
    monkeypatch.setattr(results, "measure_row", _stop)
    command.main(["--quick"])
    printed = " ".join(capsys.readouterr().out.split())
    for sentence in (
        "sparselab takes no part: it is not installed (pip install sparselab)",
        "sparseprop takes no part: it is not installed (pip install sparseprop)",
        "dense bfloat16 takes no part: this processor has no AMX",
    ):
        assert printed.count(sentence) == 1


def _stop(*args: object, **options: object) -> None:
    raise results.WrongValues("not measured")


def test_a_library_that_is_there_becomes_a_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals, "find_spec", lambda name: object())
    monkeypatch.setattr(rivals, "has_amx", lambda: True)
    rivals.absent.cache_clear()
    try:
        linear, conv = sparse.linear_row(FORWARD, 4, 0.1), sparse.conv_row(0.1)
    finally:
        rivals.absent.cache_clear()
    assert {rivals.SPARSELAB, rivals.SPARSEPROP, rivals.BFLOAT16} <= set(linear.rivals)
    assert {rivals.SPARSEPROP, rivals.BFLOAT16} <= set(conv.rivals)
    assert linear.other_work == (rivals.BFLOAT16,)  # its values are those of another dtype
    half = linear.rivals[rivals.BFLOAT16](linear.inputs(16, CPU))()
    assert half.dtype == torch.bfloat16

    # The modules themselves may be missing where this runs.
    layer = type("SparseLinear", (), {"from_dense": staticmethod(lambda plain: plain)})
    found = ModuleType("sparseprop.modules.linear")
    found.SparseLinear = layer
    for name in ("sparseprop", "sparseprop.modules"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, found.__name__, found)
    calls = {
        name: build(linear.inputs(16, CPU))
        for name, build in linear.contenders.items()
        if name not in (rivals.SPARSELAB, rivals.CSR)
    }
    results.check_agreement(linear, calls)


# ---- memory of weights and optimizer


@pytest.mark.parametrize(("name", "most"), [("sgd", 0.30), ("adamw", 0.25)])
def test_weights_and_optimizer_state_at_a_tenth_kept(name: str, most: float) -> None:
    """Bytes of values, indices (those of the transposed weight too) and state, after a step."""
    batch, width = 8, 256
    optimizers = training.OPTIMIZERS[name]
    inputs = training.training_inputs(models.MLP_2048, batch, True)(width, CPU)

    def used(prepare: models.Prepare, make: training.MakeOptimizer) -> int:
        model = prepare(copy.deepcopy(inputs.plain))
        optimizer = make(model.parameters())
        nn.functional.cross_entropy(model(inputs.input), inputs.target).backward()
        optimizer.step()
        tensors = [*model.parameters()]
        for state in optimizer.state.values():
            tensors += [each for each in state.values() if isinstance(each, torch.Tensor)]
        indices = sum(
            layer.topology.nbytes
            for layer in model.modules()
            if isinstance(layer, pp.nn.SparseLinear | pp.nn.PowerSparseLinear)
        )
        return indices + sum(each.numel() * each.element_size() for each in tensors)

    dense = used(models.dense, optimizers.stock)
    powered = models.powered(1.5, "theta", inputs.update_masks)
    for sparse_bytes in (
        used(models.sparse(models.dense), optimizers.stock),
        used(models.sparse(powered), optimizers.powered),
    ):
        assert sparse_bytes <= most * dense


# ---- the sweep


def _points(faster: dict[int, float]) -> list[sweep.Point]:
    return [
        sweep.Point(FORWARD, 8, 8, 1, zeros, 1.0, ratio, None, ratio, None, False)
        for zeros, ratio in faster.items()
    ]


@pytest.mark.parametrize(
    ("faster", "wanted"),
    [
        ({50: 0.5, 80: 1.1, 99: 9.0}, 80),
        ({50: 1.2, 80: 0.9, 99: 9.0}, 99),
        ({50: 1.0, 99: 9.0}, 50),
        ({50: 0.5, 99: 0.9}, None),
    ],
)
def test_where_sparse_begins_to_pay(faster: dict[int, float], wanted: int | None) -> None:
    assert sweep.pays_from(_points(faster)) == wanted


def test_points_of_a_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "MIN_ROUNDS", 1)
    found = list(itertools.chain.from_iterable(sweep.sweep(sweep.QUICK, budget=0.0)))
    combinations = itertools.product(
        sweep.QUICK.sizes, (FORWARD, BOTH), sweep.QUICK.batches, sweep.QUICK.zeros
    )
    assert [
        ((point.out_features, point.in_features), point.passes, point.batch, point.zeros)
        for point in found
    ] == list(combinations)
    assert all(point.ours_s > 0 and point.dense_s > 0 for point in found)
    assert {point.csr_s is None for point in found} == {rivals.CSR in rivals.absent()}


def test_a_sweep_times_no_wrong_values(monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(layer: nn.Module, *args: object) -> Call:
        call = layer_call(layer, *args)
        return lambda: 2 * call()

    layer_call = sparse.layer_call
    monkeypatch.setattr(sparse, "layer_call", doubled)
    sentence = r"ppkernels, forward of \(64, 64\) with 50 % zeros, batch 1: off by"
    with pytest.raises(results.WrongValues, match=sentence):
        next(sweep.sweep(sweep.QUICK, budget=0.0))


def test_a_sweep_is_written_and_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "spmm_crossover.json"
    monkeypatch.setattr(sweep, "PATH", path)
    monkeypatch.setattr(sweep, "FULL", sweep.QUICK)
    monkeypatch.setattr(sweep, "BUDGET_SECONDS", 0.0)
    monkeypatch.setattr(sweep, "MIN_ROUNDS", 1)
    monkeypatch.setattr(results, "failing_ops", lambda ops: {})
    assert sweep.main(["--threads", "1", "--save"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "64 -> 64, forward+backward: times faster than dense" in printed
    assert "written: bench/results/spmm_crossover.json and spmm_crossover.png" in printed
    about, points = sweep.read(path)
    assert about["machine"]["threads"] == 1
    assert len(points) == len(json.loads(path.read_text())["points"]) == 16
    picture = path.with_suffix(".png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    assert sweep.main(["--draw"]) == 0
    assert picture.exists()


def test_the_picture_is_drawn_for_any_ratios(tmp_path: Path) -> None:
    about = {"machine": machine.facts(2), "date": "today"}
    for ratios in ({50: 0.01, 99: 0.02}, {50: 40.0, 99: 400.0}):
        crossover(about, _points(ratios), tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("places", "wanted"),
    [
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.55, 0.45]),
        ([0.5, 0.52, 0.9], [0.46, 0.56, 0.9]),
        ([0.99, 0.98], [0.95, 0.85]),
        ([0.0, 0.1, 0.16], [0.05, 0.15, 0.25]),
    ],
)
def test_labels_stand_apart(places: list[float], wanted: list[float]) -> None:
    assert sorted(apart(places, 0.1)) == pytest.approx(sorted(wanted))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--quick", "--save"], "leave --quick away"),
        (["--draw", "--save"], "--draw measures nothing"),
        (["--draw"], "there is no bench/results/gone.json to draw"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sweep, "PATH", tmp_path / "gone.json")
    with pytest.raises(SystemExit) as stopped:
        sweep.main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
