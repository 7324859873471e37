"""Peak memory of one row's contenders, each counted in a process of its own.

What is counted is every tensor that torch's CPU allocator gives out and takes back, as its profiler
records it: the same numbers at every run, where the resident size of a process would depend on what
the system does with freed pages. Memory that libraries allocate for themselves is not seen. A GPU's
allocator keeps such counts by itself, workspaces of matrix products among them.

``python -m bench.memory ROW CONTENDER [--device cuda] [--threads N] [--quick]`` prints one
contender's counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.registry import rows_on
from bench.row import CPU, GPU, OURS, Build, Row
from bench.timing import thread_count

STEPS = 3
"""The first makes the optimizer's state, so that the peak comes in a later one."""

STEPS_MARK = "bench: steps"

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Peak:
    """Bytes of live tensors: with the model and its batch ready, and at most during the steps."""

    at_rest: int
    peak: int


@dataclass(frozen=True)
class MemoryResult:
    """The peaks of a row's contenders, and what became of the promise.

    Attributes:
        extra_bytes: by how much our peak may lie above ``rival``'s.
        measured_bytes: by how much it does.
        reached: None where the run cannot judge it, which it can on a CPU alone.
    """

    name: str
    size: int
    unit: str
    threads: int | None
    contenders: dict[str, Peak]
    rival: str
    extra_bytes: int
    measured_bytes: int
    reached: bool | None
    date: str
    torch: str


def count(build: Build, make_inputs: Callable[[], Any]) -> Peak:
    """The bytes that a contender's model and batch hold, and its peak over the first steps.

    The inputs are made here, so that nothing but the call itself keeps a part of them alive.
    """
    gc.collect()  # What is freed later would count for this contender.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call = build(make_inputs())
        gc.collect()
        with record_function(STEPS_MARK):
            for _ in range(STEPS):
                call()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(json.loads(path.read_text())["traceEvents"])


def count_on_gpu(build: Build, make_inputs: Callable[[], Any]) -> Peak:
    """The same on the current GPU, in blocks as its allocator gives them out."""
    call = build(make_inputs())
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    at_rest = torch.cuda.memory_allocated()
    for _ in range(STEPS):
        call()
    torch.cuda.synchronize()
    return Peak(at_rest, torch.cuda.max_memory_allocated())


def read_trace(events: Iterable[Mapping[str, Any]]) -> Peak:
    """Sums up what was allocated (bytes > 0) and freed (< 0) in the order of time."""
    live = at_rest = peak = 0
    has_begun = False
    for event in sorted((event for event in events if "ts" in event), key=itemgetter("ts")):
        if event["name"] == STEPS_MARK and event["ph"] == "X":
            has_begun, at_rest, peak = True, live, live
        elif event["name"] == "[memory]":
            live += event["args"]["Bytes"]
            peak = max(peak, live) if has_begun else 0
    if not has_begun:
        raise RuntimeError(f"the profiler's trace has no event {STEPS_MARK!r}")
    return Peak(at_rest, peak)


def measure(
    row: Row, threads: int | None, is_quick: bool = False, device: str = "cpu"
) -> MemoryResult:
    """Count every contender of a row that has a bar for memory, one process after the other.

    Raises:
        RuntimeError: a process failed; with what it wrote.
    """
    assert row.memory is not None
    size = row.quick_size if is_quick else row.size
    options = [f"--device={device}"]
    options += [f"--threads={threads}"] if threads else []
    options += ["--quick"] if is_quick else []
    contenders = {name: _count_apart(row, name, options) for name in row.contenders}
    extra_bytes = row.memory.extra_bytes(size)
    above = contenders[OURS].peak - contenders[row.memory.rival].peak
    return MemoryResult(
        name=row.name,
        size=size,
        unit=row.unit,
        threads=threads,
        contenders=contenders,
        rival=row.memory.rival,
        extra_bytes=extra_bytes,
        measured_bytes=above,
        reached=None if is_quick or device != "cpu" else above <= extra_bytes,
        date=date.today().isoformat(),
        torch=torch.__version__,
    )


def _count_apart(row: Row, contender: str, options: list[str]) -> Peak:
    ran = subprocess.run(
        [sys.executable, "-m", "bench.memory", row.name, contender, *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if ran.returncode:
        raise RuntimeError(f"{row.name}: {contender} failed:\n{ran.stderr.strip()}")
    return Peak(**json.loads(ran.stdout.splitlines()[-1]))


def main() -> None:
    """Count one contender, and print its `Peak` as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.memory")
    parser.add_argument("row")
    parser.add_argument("contender")
    parser.add_argument("--device", choices=CPU + GPU, default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    row = {row.name: row for row in rows_on(options.device)}[options.row]
    size = row.quick_size if options.quick else row.size
    device = torch.device(options.device)
    counting = count if options.device == "cpu" else count_on_gpu
    with thread_count(options.threads):
        peak = counting(row.contenders[options.contender], lambda: row.inputs(size, device))
    print(json.dumps(asdict(peak)))


if __name__ == "__main__":
    main()
