"""The benchmark of GPUs, as far as it goes without one: a simulated clock, tensors without data.
Longer than 350 lines: a run is tested in one piece, from the command line to the file.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bench.__main__ as command
import ppkernels as pp
from bench import gpu, machine, memory, products, results, table, timing, update
from bench.registry import ROWS, rows_on
from bench.row import OURS, Call, Row

ROOT = Path(__file__).parents[1]
CUDA = torch.device("cuda")
BY_NAME = {row.name: row for row in rows_on("cuda")}


# ---- without a GPU


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("more", [[], ["--save"], ["--memory", "--save"], ["step/", "--quick"]])
def test_without_a_gpu_there_is_one_sentence(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "failing_ops", lambda *args: pytest.fail("an op was checked"))
    monkeypatch.setattr(results, "save", lambda *args: pytest.fail("a file was written"))
    assert command.main(["--device", "cuda", *more]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("No GPU is measured: torch ")
    assert line.endswith(" finds none.")


@pytest.mark.usefixtures("no_gpu")
def test_rows_of_a_gpu_are_listed_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cuda", "--list", "power/small"]) == 0
    listed = capsys.readouterr().out.split()
    assert listed == ["power/small/float32/alpha=1.25", "power/small/bfloat16/alpha=1.25"]


def test_without_triton_there_is_a_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert "Triton" in str(gpu.missing())
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: object())
    assert gpu.missing() is None


def make(target: str, python: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs ``make target`` with this interpreter, and without the stamps of .venv."""
    # A make inside another would also print where it is, and take its arguments.
    inherited = {key: value for key, value in os.environ.items() if "MAKE" not in key}
    for variable in ("MFLAGS", "ARGS"):
        inherited.pop(variable, None)
    return subprocess.run(
        ["make", target, f"PY={python}", "INSTALLED=", "COMPILED="],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_says_the_sentence_and_builds_nothing() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    made = make("bench-gpu", sys.executable, **hidden)
    assert made.returncode == 0, made.stderr
    (line,) = made.stdout.splitlines()
    assert line.startswith("No GPU is measured: ")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    ("target", "before", "device"),
    [("bench", [], ""), ("measure-gpu", ["-m pytest -m gpu"], "--device cuda ")],
)
@pytest.mark.parametrize(("time", "memory"), [(0, 0), (1, 0), (0, 2), (1, 2)])
def test_make_measures_memory_whatever_became_of_time(
    target: str, before: list[str], device: str, time: int, memory: int, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'echo "$@" >> "{tmp_path}/calls"\n'
        f'case "$*" in *--memory*) exit {memory};; *bench*) exit {time};; esac\n'
    )
    python.chmod(0o755)
    made = make(target, python)
    calls = [f"-m bench {device}--save", f"-m bench {device}--memory --save"]
    assert (tmp_path / "calls").read_text().splitlines() == [*before, *calls]
    # That of make itself is 2, and it names the recipe's.
    assert (made.returncode == 0) == (time == memory == 0)
    if made.returncode:
        assert f"Error {max(time, memory)}" in made.stderr


def test_threads_are_the_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["--device", "cuda", "--threads", "2"])
    assert stopped.value.code == 2
    assert "--threads is the CPU's" in capsys.readouterr().err


# ---- rows


def test_rows_as_a_gpu_measures_them() -> None:
    assert len(BY_NAME) == len(rows_on("cuda"))
    for row in BY_NAME.values():
        assert row.bars == ()
        assert row.threads is None
        assert not row.name.startswith("power/cache")
    large = BY_NAME["step/adamw/alpha=1.5"]
    assert large.size == 64 * 2**20
    assert "foreach" in large.contenders
    # On a CPU the row is as it was.
    cpu = {row.name: row for row in rows_on("cpu")}
    assert cpu["step/adamw/alpha=1.5"].size == update.ONE_TENSOR
    assert "foreach" not in cpu["step/adamw/alpha=1.5"].contenders
    assert not any("autocast" in name or "master" in name for name in cpu)
    assert cpu.keys() | BY_NAME.keys() == {row.name for row in ROWS}


def test_rows_with_saved_results_of_a_cpu_have_kept_their_names() -> None:
    saved = json.loads((machine.RESULTS / "amd-epyc-2-cores.json").read_text())
    assert saved["rows"].keys() <= {row.name for row in rows_on("cpu")}


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a row's inputs."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from value.state_dict().values()
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_in(entry)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, pp.BitMask):
        yield value.words
    elif not isinstance(value, (int, float, NoneType)):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])


@pytest.fixture
def without_data(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors know shape, dtype and device, any device, and have no values."""
    # A copy of a model would have a copy of the mode, and tensors of two modes do not mix.
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda mode, memo: mode, raising=False)
    with FakeTensorMode(), torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.usefixtures("without_data")
@pytest.mark.parametrize("row", BY_NAME.values(), ids=lambda row: row.name)
def test_inputs_are_on_the_device(row: Row) -> None:
    found = list(tensors_in(row.inputs(row.quick_size, CUDA)))
    assert found
    assert {tensor.device.type for tensor in found} == {"cuda"}


# Nothing knows the shapes of torch's fused optimizers, ours reads exponents when it is made, and
# the two ways of a product are launched at once. What is selected or counted is an answer on the
# host, so those suites are left out.
NOT_WITHOUT_DATA = {"step": {OURS, update.FUSED}, "power": set(products.WAYS)}


@pytest.mark.usefixtures("without_data")
# Copying a model asks whether its tensors have memory.
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    "row", [row for row in BY_NAME.values() if row.suite in NOT_WITHOUT_DATA], ids=lambda r: r.name
)
def test_contenders_stay_on_the_device(row: Row) -> None:
    """No tensor of another device meets theirs, and no value is asked of the GPU."""
    inputs = row.inputs(row.quick_size, CUDA)
    for name, build in row.contenders.items():
        if name not in NOT_WITHOUT_DATA[row.suite]:
            call = build(inputs)
            call()
            assert call().device.type == "cuda", name


# ---- time


class FakeGpu:
    """A host that issues work and a device that does it later, each with its own time in µs."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.issued: list[str] = []

    def work(self, name: str, host: float, device: float, waits: bool = False) -> Call:
        """A call that takes the host so long to issue, and the device to do."""

        def call() -> torch.Tensor:
            self.issued.append(name)
            self.host += host
            self.device = max(self.device, self.host) + device
            if waits:
                self.synchronize()
            return torch.empty(0)

        return call

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=-1.0)

        def record() -> None:
            event.at = max(self.host, self.device)

        def synchronize() -> None:
            self.host = max(self.host, event.at)

        event.record, event.synchronize = record, synchronize
        event.query = lambda: self.host >= event.at
        event.elapsed_time = lambda end: (end.at - event.at) / 1e3
        return event

    def timer(self) -> gpu.GpuTimer:
        """Reading the scratch takes the device 100 µs, and the host 5."""
        scratch: Any = SimpleNamespace(sum=self.work("scratch", 5, 100))
        return gpu.GpuTimer(scratch)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    clock = SimpleNamespace(perf_counter=lambda: fake.host * 1e-6)
    monkeypatch.setattr(torch.cuda, "Event", fake.event)
    monkeypatch.setattr(torch.cuda, "synchronize", fake.synchronize)
    monkeypatch.setattr(gpu, "time", clock)
    monkeypatch.setattr(timing, "time", clock)
    load = timing.Load(0.0, 0.0, 0.0)
    monkeypatch.setattr(timing, "LoadMeter", lambda: SimpleNamespace(read=lambda: load))
    return fake


@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize(("host", "device"), [(10, 3), (10, 50), (400, 1), (20, 4000)])
def test_both_sides_of_a_call(fake: FakeGpu, host: float, device: float, in_cache: bool) -> None:
    timer = fake.timer()
    sample = timer.sample(fake.work("a", host, device), 100, in_cache)
    # The first call finds the device idle, which is what 100 calls make small.
    slower, faster = max(host, device), min(host, device)
    assert sample.seconds == pytest.approx((slower + faster / 100) * 1e-6)
    assert sample.host == pytest.approx(host * 1e-6)
    assert sample.device == pytest.approx(device * 1e-6)


def test_a_call_that_waits_has_no_time_on_the_device_alone(fake: FakeGpu) -> None:
    sample = fake.timer().sample(fake.work("a", 10, 50, waits=True), 100, in_cache=False)
    assert sample.seconds == pytest.approx(60e-6)
    assert sample.device is None
    measured = timing.Measurement({"a": [sample]}, timing.Load(0, 0, 0))
    assert measured.on_device("a") is None
    assert measured.host("a") == pytest.approx(60e-6)


@pytest.mark.parametrize("in_cache", [False, True])
def test_what_else_is_issued_in_a_sample(fake: FakeGpu, in_cache: bool) -> None:
    timer = fake.timer()
    fake.issued.clear()
    timer.sample(fake.work("a", 10, 3), 100, in_cache)
    # 100 calls of 10 µs, twice as long: 2 ms, or 20 times 100 µs.
    first = ["a"] if in_cache else []
    calls = ["a"] * 100
    assert fake.issued == ["scratch", *first, *calls, *["scratch"] * 20, *first, *calls]


def test_contenders_take_turns_on_a_gpu_too(fake: FakeGpu) -> None:
    timer = fake.timer()
    calls = {"short": fake.work("s", 20, 10), "long": fake.work("l", 20, 1000)}
    measured = timing.measure(calls, budget=0.0, min_rounds=6, timer=timer)
    assert measured.calls_per_sample == {"short": 67, "long": 2}
    assert [len(samples) for samples in measured.samples.values()] == [6, 6]
    assert measured.ratio("long", "short") == pytest.approx(1010 / 20.15, rel=0.01)
    assert measured.on_device("short") == pytest.approx(10e-6)
    firsts = []
    turns = "".join(name for name in fake.issued if name != "scratch")
    turns = turns[-6 * (2 * 67 + 2 * 2) :]
    for round in range(6):
        firsts.append(turns[round * 138])
        assert turns[round * 138 : (round + 1) * 138].count("l") == 4
    assert set(firsts) == {"s", "l"}


def test_rounds_end_with_the_budget(fake: FakeGpu) -> None:
    timer, call = fake.timer(), fake.work("a", 10, 2000)
    assert len(timing.measure({"a": call}, 0.0, timer=timer).seconds["a"]) == timing.MIN_ROUNDS
    # A round is two calls and what keeps the device busy before them.
    rounds = len(timing.measure({"a": call}, 0.2, timer=timer).seconds["a"])
    assert 40 <= rounds <= 50
    assert len(timing.measure({"a": call}, 9.0, timer=timer).seconds["a"]) == timing.MAX_ROUNDS


# ---- results


H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 * 2**20,
    clock_rate=1_980_000,
    memory_clock_rate=2_619_000,
    memory_bus_width=5120,
)
MI300X = SimpleNamespace(
    name="AMD Instinct MI300X",
    major=9,
    minor=4,
    gcnArchName="gfx942:sramecc+:xnack-",
    multi_processor_count=304,
    L2_cache_size=4 * 2**20,
    clock_rate=2_100_000,
)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``described(properties, hip)``: torch.cuda says it has this GPU."""

    def describe(properties: SimpleNamespace, hip: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: properties.name)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (79 * 2**30, 80 * 2**30))
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")

    return describe


def test_an_nvidia_gpu(described: Callable[..., None]) -> None:
    pytest.importorskip("triton")
    described(H100)
    facts = gpu.facts()
    assert facts["gpu"] == "NVIDIA H100 80GB HBM3"
    assert (facts["architecture"], facts["runtime"]) == ("sm_90", "CUDA 13.0")
    assert (facts["clock_mhz"], facts["memory_clock_mhz"]) == (1980, 2619)
    assert facts["l2_mib"] == 50
    assert json.loads(json.dumps(facts)) == facts
    assert gpu.results_path() == machine.RESULTS / "nvidia-h100-80gb-hbm3.json"


def test_an_amd_gpu(described: Callable[..., None]) -> None:
    pytest.importorskip("triton")
    described(MI300X, hip="7.0.2")
    facts = gpu.facts()
    assert (facts["architecture"], facts["runtime"]) == ("gfx942", "ROCm 7.0.2")
    assert facts["memory_clock_mhz"] is None
    assert gpu.results_path().name == "amd-instinct-mi300x.json"
    described(SimpleNamespace(**{**vars(MI300X), "name": ""}), hip="7.0.2")
    assert gpu.results_path().name == "gfx942.json"


def test_a_run_from_the_command_line(
    fake: FakeGpu,
    described: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Everything but the GPU is there: tensors are on the CPU, and time is that of the fake."""
    pytest.importorskip("triton")
    described(H100)
    small = copy.copy(BY_NAME["power/small/float32/alpha=1.25"])
    step = BY_NAME["step/resnet-50/sgd/alpha=1.5"]

    def takes(host: float, device: float) -> Callable[[Any], Call]:
        return lambda inputs: lambda: fake.work("x", host, device)() + inputs.weight[:0]

    def fails(inputs: Any) -> Call:
        raise torch.OutOfMemoryError("CUDA out of memory")

    small = replace(small, size=8, ours=takes(10, 3), rivals={"copy_": takes(5, 3)})
    step = replace(step, inputs=lambda size, device: None, ours=fails)
    timer = fake.timer()
    timer.device = torch.device("cpu")
    monkeypatch.setattr(gpu, "gpu_timer", lambda: timer)
    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(gpu, "is_alive", lambda: True)
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "IN_MEMORY", 2**20)
    monkeypatch.setattr(command, "rows_on", lambda device: (step, small))
    monkeypatch.setattr(command, "idle_load", lambda: timing.Load(0.4, 0.0, 0.0))
    monkeypatch.setattr(results, "check_values", lambda op, device: None)
    monkeypatch.setattr(gpu, "roof_calls", lambda *tensors: roof)
    roof = {"copy_": fake.work("copy_", 5, 160), "add": fake.work("add", 5, 240)}

    # One row fails, which the exit code says; the other is measured and saved.
    assert command.main(["--device", "cuda", "--save"]) == 1
    came = capsys.readouterr()
    assert "OutOfMemoryError: CUDA out of memory" in came.err
    printed = " ".join(came.out.split())
    assert "NVIDIA H100 80GB HBM3 (sm_90), 132 multiprocessors, 80.0 GiB (79.0 free)" in printed
    assert "too busy" not in printed
    assert f"failed: {step.name}" in printed
    assert "written: bench/results/nvidia-h100-80gb-hbm3.json" in printed

    saved = json.loads((tmp_path / "nvidia-h100-80gb-hbm3.json").read_text())
    assert saved["machine"]["gpu"] == "NVIDIA H100 80GB HBM3"
    assert saved["roof"][0]["call"] == "copy_"
    assert saved["roof"][0]["gb_per_s"] == pytest.approx(2 * 4 * 2**20 / 160e-6 / 1e9, rel=0.05)
    assert saved["rows"].keys() == {small.name}
    assert_can_be_printed(saved["rows"][small.name])


def assert_can_be_printed(saved: dict[str, Any]) -> None:
    """A row of the file has what a result has, and the table shows it."""
    ours = saved["contenders"][OURS]
    assert ours["host_s"] == pytest.approx(10e-6)
    assert ours["device_s"] == pytest.approx(3e-6)
    assert ours["median_s"] == pytest.approx(10e-6, rel=0.01)
    assert saved["contenders"]["copy_"]["time_over_ours"] == pytest.approx(0.5, rel=0.01)
    assert (saved["threads"], saved["instruction_set"]) == (None, "sm_90")
    contenders = {
        name: results.GpuContenderResult(**result) for name, result in saved["contenders"].items()
    }
    row = results.RowResult(
        **{**saved, "contenders": contenders, "load": timing.Load(**saved["load"])}
    )
    assert json.loads(json.dumps(asdict(row))) == saved
    written = io.StringIO()
    table.print_row(Console(file=written, width=120), row)
    heading, *_ = (line for line in written.getvalue().splitlines() if line)
    assert heading.startswith("power/small/float32/alpha=1.25  8 elements, in cache, ")
    (line,) = (line for line in written.getvalue().splitlines() if OURS in line)
    assert [cell.strip() for cell in line.split("│")[-3:-1]] == ["10 µs", "3 µs"]


def test_a_gpu_that_died_in_the_check_of_an_op(
    described: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It tells nothing any more: neither of its memory, nor a row's time."""
    pytest.importorskip("triton")
    described(H100)

    def fails(*args: object, **options: object) -> None:
        monkeypatch.setattr(gpu, "is_alive", lambda: False)
        for ask in ("mem_get_info", "get_device_properties"):
            monkeypatch.setattr(torch.cuda, ask, fails)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "missing", lambda: None)
    monkeypatch.setattr(machine, "RESULTS", Path("nowhere"))
    monkeypatch.setattr(results, "check_values", fails)
    assert command.main(["--device", "cuda", "--save", "step/"]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "sgd_step_ is not timed" in printed
    assert printed.endswith("The GPU answers no more; no further row is measured.")


def test_a_gpu_that_died_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = []

    def fails(row: Row, *args: object, **options: object) -> None:
        tried.append(row.name)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(results, "measure_row", fails)
    monkeypatch.setattr(gpu, "architecture", lambda: "sm_90")
    monkeypatch.setattr(gpu, "is_alive", lambda: False)
    options = command.parse(["--device", "cuda", "step/"])
    rows = rows_on("cuda")[:3]
    assert command.time_rows(Console(), rows, options, 0.0, timing.CPU_TIMER) == []
    assert tried == [rows[0].name]
    assert "answers no more" in capsys.readouterr().out


def test_peak_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name, value in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": 1024,
        "max_memory_allocated": 4096,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda n=name, v=value: done.append(n) or v)

    def build(inputs: int) -> Call:
        done.append("built")
        return lambda: done.append("step") or torch.empty(0)

    assert memory.count_on_gpu(build, lambda: 1) == memory.Peak(at_rest=1024, peak=4096)
    assert done == [
        "built",
        "synchronize",
        "reset_peak_memory_stats",
        "memory_allocated",
        *["step"] * memory.STEPS,
        "synchronize",
        "max_memory_allocated",
    ]


def test_memory_of_a_gpu_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def count(row: Row, contender: str, options: list[str]) -> memory.Peak:
        asked.append(options)
        return memory.Peak(1, 2)

    monkeypatch.setattr(memory, "_count_apart", count)
    row = BY_NAME["training_step/mlp-2048/batch=128/sgd/alpha=1.5/autocast"]
    result = memory.measure(row, None, device="cuda")
    assert (result.reached, result.threads) == (None, None)
    assert asked == [["--device=cuda"]] * len(row.contenders)
    written = io.StringIO()
    table.print_memory(Console(file=written, width=120), result)
    assert "not judged" in written.getvalue()
