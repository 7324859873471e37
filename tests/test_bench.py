"""The benchmark: its registry is well formed, and it times no op whose values are wrong."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

import bench.__main__ as command
from bench import machine, results, timing
from bench.registry import IN_MEMORY, ROWS
from bench.row import OURS, Bar, Row

BY_NAME = {row.name: row for row in ROWS}
CACHE_ROW = BY_NAME["power/cache/float32/alpha=1.25"]


@pytest.fixture
def small() -> Row:
    """A row that takes milliseconds: in cache, against eager and the roof."""
    rivals = {name: CACHE_ROW.rivals[name] for name in ("copy_", "eager", "torch.pow")}
    return replace(CACHE_ROW, rivals=rivals)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_contenders_agree(row: Row) -> None:
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
        assert (Path(machine.__file__).parent / f"test_{row.suite}.py").exists()


@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [
        ("power/memory/float32/alpha=1.25", 512),
        ("power/memory/bfloat16/alpha=1.25", 256),
        ("power_backward/memory/float32/alpha=1.25", 768),
        ("power_double_backward/allocating/float32/alpha=1.25", 1024),
    ],
)
def test_bytes_moved(name: str, mebibytes: int) -> None:
    assert BY_NAME[name].bytes_moved(IN_MEMORY) == mebibytes * 2**20


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

    def never(*args: object) -> None:
        raise RuntimeError("a row of a failing op was timed")

    monkeypatch.setattr(results, "check_values", fail)
    monkeypatch.setattr(results, "measure_row", never)
    monkeypatch.setattr(machine, "roof", lambda *args: [])
    assert command.main(["--quick", "power/cache"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "power is not timed: its values are wrong. power: 3 where 2 was wanted" in printed


def test_contenders_that_disagree_are_refused(small: Row) -> None:
    wrong = replace(small, rivals={**small.rivals, "eager": lambda x: lambda: x.weight * 2})
    with pytest.raises(results.WrongValues, match="eager and ppkernels differ by up to"):
        results.measure_row(wrong, 1, budget=0.0, is_quick=True)


def test_results_round_trip(small: Row, tmp_path: Path) -> None:
    row = results.measure_row(small, 1, budget=0.0, is_quick=True)
    assert row.bars[0].reached is None
    assert set(row.contenders) == {OURS, *small.rivals}
    assert row.contenders["copy_"].share_of_roof == pytest.approx(1)

    path = tmp_path / "new" / "machine.json"
    other = replace(row, name="another")
    results.save(path, machine.facts(1), [], [other])
    results.save(path, machine.facts(1), [{"elements": 1}], [row])
    read = json.loads(path.read_text())
    assert read["rows"].keys() == {"another", row.name}
    assert read["rows"][row.name] == json.loads(json.dumps(asdict(row)))
    assert read["roof"] == [{"elements": 1}]
    assert read["machine"]["cores"] == len(timing.core_ids())


def test_bars_are_judged_at_full_size(small: Row) -> None:
    row = replace(small, size=small.quick_size)
    assert results.measure_row(row, 1, budget=0.0).bars[0].reached in (True, False)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--quick", "--save"], "leave --quick away"),
        (["pwoer"], "no row is named pwoer"),
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
    assert command.selected([]) == list(ROWS)


def test_results_file_is_named_by_processor_and_cores() -> None:
    name = machine.results_path().name
    assert name == f"{machine.slug()}.json"
    assert name.endswith(f"-{len(timing.core_ids())}-cores.json")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-.")
