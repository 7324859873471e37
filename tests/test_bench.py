"""The benchmark: its registry is well formed, and it times no op whose values are wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import bench.__main__ as command
from bench import machine, memory, models, results, timing, training, update
from bench.contenders import IN_MEMORY
from bench.registry import ROWS, rows_on
from bench.row import OURS, Bar, Call, Row

BY_NAME = {row.name: row for row in ROWS}
CPU = torch.device("cpu")
CACHE_ROW = BY_NAME["power/cache/float32/alpha=1.25"]


@pytest.fixture
def small() -> Row:
    """A row that takes milliseconds: in cache, against eager and the roof."""
    rivals = {name: CACHE_ROW.rivals[name] for name in ("copy_", "eager", "torch.pow")}
    return replace(CACHE_ROW, rivals=rivals)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_contenders_agree(row: Row) -> None:
    row = row if "cuda" not in row.devices else row.on_gpu()  # which has all the rivals
    # The formulas are what is tested; the bench compares the compiled code's values at full size.
    with torch.compiler.set_stance("force_eager"):
        calls = results.build_calls(row, min(row.quick_size, 1024))
        results.check_agreement(row, calls)


def test_names_are_unique_and_bars_name_rivals() -> None:
    assert len(BY_NAME) == len(ROWS)
    for row in ROWS:
        assert OURS not in row.rivals
        assert row.roof is None or row.roof in row.rivals
        assert {bar.rival for bar in row.bars} <= row.rivals.keys()
        assert set(row.other_work) <= row.rivals.keys() | row.gpu_rivals.keys()
        assert {bar.promiser for bar in row.bars} <= row.contenders.keys()
        assert row.memory is None or row.memory.rival in row.rivals
        assert (Path(machine.__file__).parent / f"test_{row.suite}.py").exists()


TRAINING = "training_step/mlp-2048/batch=128"


def test_contenders_take_the_same_step() -> None:
    # Without a past, momentum makes no difference between the rules: all of these end at one θ.
    row = BY_NAME[f"{TRAINING}/sgd/alpha=1.5"]
    inputs = row.inputs(32, CPU)
    # The losses of two steps differ in the sixth digit.
    inputs = replace(inputs, input=inputs.input.double(), plain=inputs.plain.double())
    falls = {}
    for name in (OURS, "stores=phi", "eager", "dense"):
        call = row.contenders[name](inputs)
        falls[name] = (call() - call()).item()
    assert falls["stores=phi"] == pytest.approx(falls[OURS], rel=1e-6)
    assert falls["eager"] == pytest.approx(falls[OURS], rel=1e-6)
    assert abs(falls["dense"] - falls[OURS]) > 0.1 * abs(falls[OURS])


@pytest.mark.parametrize("rule", ["virtual", "chain"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_steps_by_hand(optimizer: str, rule: str) -> None:
    inputs = update.one_weight(is_masked=False)(64, CPU)
    # Weights so small that the slope, which Adam's chain rule averages, changes at each step.
    with torch.no_grad():
        next(inputs.plain.parameters()).mul_(1e-7)
    powered = training.OPTIMIZERS[optimizer].powered
    ours = update.update(lambda parameters: powered(parameters, rule=rule), 2.0)(inputs)
    with torch.compiler.set_stance("force_eager"):
        by_hand = update.written_out(optimizer, update.by_hand(optimizer, 2.0, rule))(inputs)
        for _ in range(5):
            torch.testing.assert_close(by_hand(), ours().detach(), rtol=1e-4, atol=1e-14)
            inputs.grads[0].normal_(std=1e-3)


def test_masked_inputs_are_frozen_at_zero() -> None:
    inputs = BY_NAME[f"{TRAINING}/sgd/alpha=1.5/masks"].inputs(64, CPU)
    layers = models.weight_layers(inputs.plain)
    assert inputs.update_masks.keys() == layers.keys()
    for name, layer in layers.items():
        assert torch.equal(layer.weight != 0, inputs.update_masks[name])
    shares = [mask.float().mean().item() for mask in inputs.update_masks.values()]
    assert shares[0] == pytest.approx(0.1, abs=0.02)


def test_flops_and_mask_bytes_of_a_network() -> None:
    width, batch = 20, 3
    weights = 3 * width * width + models.CLASSES * width
    # 2 operations a weight in the forward and 4 in the backward, but for the input of the first.
    flops = batch * (6 * weights - 2 * width * width)
    assert models.MLP_2048.flops(batch, width) == flops
    assert models.MLP_2048.mask_bytes(width) == 3 * 50 + 25
    assert models.MLP_2048.mask_bytes(3) == 3 * 2 + 4


@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [
        ("power/memory/float32/alpha=1.25", 512),
        ("power/memory/bfloat16/alpha=1.25", 256),
        ("power_backward/memory/float32/alpha=1.25", 768),
        ("power_double_backward/allocating/float32/alpha=1.25", 1024),
        ("step/sgd/alpha=1.5", 1280),
        ("step/adamw/alpha=1.5/masks", 1792),
        ("step/adamw/alpha=1.5/bfloat16+master", 30 * 64),
        ("apply_mask/memory/bfloat16", 4 * 64 + 8),
        ("count_bits/memory", 8),
    ],
)
def test_bytes_moved(name: str, mebibytes: int) -> None:
    assert BY_NAME[name].bytes_moved(IN_MEMORY) == mebibytes * 2**20


def test_bar_of_another_contender_says_whose_it_is() -> None:
    assert Bar("times", 1.5, "dense").sentence() == "at most 1.5x the time of dense"
    said = Bar("faster", 2, "eager", "stores=phi").sentence()
    assert said == "stores=phi: at least 2x faster than eager"


@pytest.mark.parametrize(
    ("bar", "ours", "rival", "measured", "is_reached"),
    [
        (Bar("times", 1.15, "copy_"), [1.1, 1.2, 9.0], [1.0, 1.0, 1.0], 1.2, False),
        (Bar("times", 1.15, "copy_"), [1.1, 1.1, 9.0], [1.0, 1.0, 1.0], 1.1, True),
        (Bar("faster", 10, "eager"), [1.0, 2.0, 1.0], [10.0, 22.0, 1.0], 10.0, True),
        (Bar("us_above", 2, "nn.Linear"), [5e-6, 6e-6, 7e-6], [2e-6, 3e-6, 4e-6], 3.0, False),
    ],
)
def test_bar(
    bar: Bar, ours: list[float], rival: list[float], measured: float, is_reached: bool
) -> None:
    value = bar.measured(ours, rival)
    assert value == pytest.approx(measured)
    assert bar.reached(value) is is_reached


def test_measure_takes_turns_and_restores_threads() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or torch.ones(10**5) for name in "ab"}
    with timing.thread_count(1):
        assert torch.get_num_threads() == 1
        measured = timing.measure(calls, budget=0.0, min_rounds=5)
    assert [len(seconds) for seconds in measured.seconds.values()] == [5, 5]
    first = [measured.calls_per_sample[name] for name in "ab"]
    timed = order[-5 * sum(first) :]
    assert timed.count("a") == 5 * first[0]
    assert {"a", "b"} == set(timed[: sum(first)])
    assert measured.ratio("a", "b") > 0
    low, high = measured.quartiles("a")
    assert low <= measured.median("a") <= high


def test_load_of_other_work(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(timing.core_ids())
    times = iter(
        [
            timing.CpuTimes(wall=0.0, busy=10.0, stolen=1.0, own=2.0),
            timing.CpuTimes(wall=10.0, busy=16.0 + cores, stolen=1.0, own=8.0),
        ]
    )
    monkeypatch.setattr(timing, "cpu_times", lambda: next(times))
    load = timing.LoadMeter().read()
    assert load.others == pytest.approx(0.1)
    assert load.stolen == 0
    assert load.is_busy
    assert "other work used 10% of the cores" in load.sentence()


def test_load_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cpu_times", lambda: None)
    load = timing.LoadMeter().read()
    assert load.others is None
    assert load.is_busy == (load.waited > timing.BUSY_SHARE)


def test_failing_op_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(op: str, device: str) -> None:
        raise AssertionError(f"{op}: 3 where 2 was wanted\nand more")

    timed: list[object] = []
    monkeypatch.setattr(results, "check_values", fail)
    monkeypatch.setattr(results, "measure_row", lambda *args, **options: timed.append(args))
    monkeypatch.setattr(machine, "roof", lambda *args: [])
    assert command.main(["--quick", "power/cache"]) == 1
    assert timed == []
    printed = " ".join(capsys.readouterr().out.split())
    assert "power is not timed: its values are wrong. power: 3 where 2 was wanted" in printed


def test_contenders_that_disagree_are_refused(small: Row) -> None:
    wrong = replace(small, rivals={**small.rivals, "eager": lambda x: lambda: x.weight * 2})
    with pytest.raises(results.WrongValues, match="eager and ppkernels differ by up to"):
        results.measure_row(wrong, 1, budget=0.0, is_quick=True)


def test_other_work_is_timed_and_not_compared(small: Row) -> None:
    rivals = {**small.rivals, "eager": lambda x: lambda: x.weight * 2}
    row = replace(small, rivals=rivals, other_work=("eager",))
    measured = results.measure_row(row, 1, budget=0.0, is_quick=True)
    assert measured.contenders["eager"].median_s > 0


def test_results_round_trip(small: Row, tmp_path: Path) -> None:
    row = results.measure_row(small, 1, budget=0.0, is_quick=True)
    assert row.bars[0].reached is None
    assert set(row.contenders) == {OURS, *small.rivals}
    assert row.contenders["copy_"].share_of_roof == pytest.approx(1)

    path = tmp_path / "new" / "machine.json"
    others = [replace(row, name=name) for name in ("another", "gone")]
    names = {row.name, "another", "weighed"}
    weighed = memory.MemoryResult(
        "weighed", 8, "features", 2, {OURS: memory.Peak(1, 2)}, OURS, 0, 0, True, "today", "2.14"
    )
    results.save(path, machine.facts(1), {*names, "gone"}, roof=[], rows=others)
    results.save(path, machine.facts(1), names, roof=[{"elements": 1}], rows=[row])
    results.save(path, machine.facts(1), names, memory=[weighed])
    read = json.loads(path.read_text())
    assert read["rows"].keys() == {"another", row.name}
    assert read["rows"][row.name] == json.loads(json.dumps(asdict(row)))
    assert read["memory"] == {"weighed": asdict(weighed)}
    assert read["roof"] == [{"elements": 1}]
    assert read["machine"]["cores"] == len(timing.core_ids())


def test_bars_are_judged_at_full_size(small: Row) -> None:
    row = replace(small, size=small.quick_size)
    assert results.measure_row(row, 1, budget=0.0).bars[0].reached in (True, False)


def _event(ts: int, name: str = "[memory]", **args: int) -> dict[str, object]:
    return {"ts": ts, "name": name, "ph": "X", "args": args}


def test_peak_is_the_largest_sum_after_the_steps_begin() -> None:
    events = [
        {"name": "process_name", "ph": "M"},
        _event(9, Bytes=-7),
        _event(1, Bytes=1000),
        _event(2, Bytes=-990),
        _event(4, memory.STEPS_MARK),
        _event(3, Bytes=5),
        _event(7, Bytes=20),
        _event(8, "aten::empty"),
        _event(6, Bytes=-5),
    ]
    assert memory.read_trace(events) == memory.Peak(at_rest=15, peak=30)
    with pytest.raises(RuntimeError, match="has no event 'bench: steps'"):
        memory.read_trace(events[:3])


def test_memory_is_counted_to_the_byte() -> None:
    def build(size: int) -> Call:
        source = torch.zeros(size, dtype=torch.uint8)
        # Before the steps begin; it is no part of their peak.
        torch.zeros(100 * size, dtype=torch.uint8)
        return lambda: source.clone().clone()

    size = 10_007
    assert memory.count(build, lambda: size) == memory.Peak(at_rest=size, peak=3 * size)


@pytest.mark.parametrize(
    "name", [f"{TRAINING}/{rest}/alpha=1.5{m}" for rest in ("sgd", "adamw") for m in ("", "/masks")]
)
def test_powered_step_needs_the_memory_of_the_dense_one(name: str) -> None:
    row, size = BY_NAME[name], 256
    assert row.memory is not None
    peaks = {
        contender: memory.count(row.contenders[contender], lambda: row.inputs(size, CPU)).peak
        for contender in (OURS, row.memory.rival)
    }
    assert peaks[OURS] - peaks[row.memory.rival] <= row.memory.extra_bytes(size)


def test_memory_is_counted_in_processes_of_their_own() -> None:
    row = BY_NAME[f"{TRAINING}/sgd/alpha=1.5"]
    small = replace(row, rivals={"dense": row.rivals["dense"]})
    result = memory.measure(small, 1, is_quick=True)
    assert result.reached is None
    assert result.contenders.keys() == {OURS, "dense"}
    dense = memory.count(row.rivals["dense"], lambda: row.inputs(row.quick_size, CPU))
    assert result.contenders["dense"] == dense
    with pytest.raises(RuntimeError, match=r"^gone: ppkernels failed:(.|\n)*KeyError: 'gone'"):
        memory.measure(replace(row, name="gone"), 1, is_quick=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--quick", "--save"], "leave --quick away"),
        (["pwoer"], "no row is named pwoer"),
        (["--memory", "power/", "layer"], "of power/ and layer, memory is measured for no row"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_rows_are_selected_by_the_start_of_a_part() -> None:
    assert {row.ops for row in command.selected(["power/"])} == {("power",)}
    assert all("alpha=2" in row.name for row in command.selected(["alpha=2"]))
    assert command.selected([]) == list(rows_on("cpu"))


def test_results_file_is_named_by_processor_and_cores() -> None:
    name = machine.results_path().name
    assert name == f"{machine.slug()}.json"
    assert name.endswith(f"-{len(timing.core_ids())}-cores.json")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
