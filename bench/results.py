"""From a row to its result, and to the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

import ppkernels as pp
from bench.memory import MemoryResult
from bench.row import OURS, Call, Row, dtype_name
from bench.timing import CPU_TIMER, Load, Measurement, Timer, measure, thread_count
from ppkernels.testing import check_values

BAR_THREADS = 2
"""The bars are stated for two threads (a row with a fixed count keeps its own)."""

COMPARED_AT_ONCE = 2**20
"""Values are compared in pieces: the temporaries of 64 Mi at once would be a gigabyte."""


class WrongValues(Exception):
    """Contenders of a row do not return the same values, so their times mean nothing."""


@dataclass(frozen=True)
class ContenderResult:
    """One line of the table. Rates count the row's bytes and operations, whoever does the work."""

    median_s: float
    quartile1_s: float
    quartile3_s: float
    time_over_ours: float
    gb_per_s: float | None
    gflop_per_s: float | None
    share_of_roof: float | None

    @property
    def spread(self) -> float:
        """The interquartile range as a share of the median."""
        return (self.quartile3_s - self.quartile1_s) / self.median_s


@dataclass(frozen=True)
class GpuContenderResult(ContenderResult):
    """With both sides of a call: what the host takes to issue it, and the GPU's own work.

    `ContenderResult`'s times are those of calls as they come, where the slower side decides.
    ``device_s`` is None for a call that waits for the GPU.
    """

    host_s: float
    device_s: float | None


@dataclass(frozen=True)
class BarResult:
    """A bar and what came; ``reached`` is None where the run cannot judge it."""

    sentence: str
    limit: float
    measured: float
    measured_text: str
    reached: bool | None


@dataclass(frozen=True)
class RowResult:
    """What one interleaved run of a row gave; on a GPU, ``threads`` is None.

    ``instruction_set`` is that of our kernels: a GPU's is its architecture.
    """

    name: str
    size: int
    unit: str
    dtype: str
    threads: int | None
    in_cache: bool
    streams: tuple[str, ...]
    bytes_moved: int | None
    flops: int | None
    rounds: int
    roof: str | None
    contenders: Mapping[str, ContenderResult]
    bars: tuple[BarResult, ...]
    load: Load
    busy: bool
    date: str
    torch: str
    instruction_set: str


def failing_ops(names: Iterable[str], device: str = "cpu") -> dict[str, str]:
    """The ops among ``names`` whose values are wrong, with the first line of what was found."""
    failures = {}
    for name in dict.fromkeys(names):
        try:
            check_values(name, device=device)
        except Exception as error:  # what a kernel raises is no right value either
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            sentence = str(error).strip().partition("\n")[0] or "its check failed"
            failures[name] = kind + sentence
    return failures


def build_calls(row: Row, size: int, device: torch.device | None = None) -> dict[str, Call]:
    """Every contender of ``row`` on one set of inputs; the thread count must be set already."""
    # Compiled rivals of many rows share code objects; past a limit of recompilations, or with a
    # second alpha, dynamo would quietly fall back to slower code.
    torch.compiler.reset()
    inputs = row.inputs(size, device or CPU_TIMER.device)
    return {name: build(inputs) for name, build in row.contenders.items()}


def check_agreement(row: Row, calls: Mapping[str, Call]) -> None:
    """Raise `WrongValues` unless the first call of each contender returns what ours returns.

    The roof, and rivals that do other work, are not compared. A call may write into the tensor that
    it returns: an optimizer's step does.
    """
    expected = calls[OURS]().detach().clone()
    for name, call in calls.items():
        if name not in (OURS, row.roof, *row.other_work):
            _check_close(row, name, call().detach(), expected)


def _check_close(row: Row, name: str, actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise WrongValues(
            f"{row.name}: {name} returns {tuple(actual.shape)} {actual.dtype}, "
            f"{OURS} {tuple(expected.shape)} {expected.dtype}"
        )
    pieces = (values.reshape(-1).split(COMPARED_AT_ONCE) for values in (actual, expected))
    for a, e in zip(*pieces, strict=True):
        if not torch.allclose(a, e, rtol=row.rtol, atol=row.atol):
            difference = (a.double() - e.double()).abs().max().item()
            raise WrongValues(
                f"{row.name}: {name} and {OURS} differ by up to {difference:.3g}, "
                f"more than rtol={row.rtol:g}, atol={row.atol:g} allow"
            )


def measure_row(
    row: Row,
    threads: int | None,
    budget: float,
    is_quick: bool = False,
    *,
    timer: Timer = CPU_TIMER,
    instruction_set: str | None = None,
) -> RowResult:
    """Build, compare, and time the contenders of ``row`` in turns, for about ``budget`` seconds.

    Args:
        row: on a GPU, one of `registry.rows_on`.
        threads: torch's, on a CPU; None leaves them as they are.
        budget: in seconds.
        is_quick: the row's quick size.
        timer: of the device to measure on.
        instruction_set: of our kernels there, if it is not the CPU.

    Raises:
        WrongValues: the contenders disagree; nothing was timed.
    """
    size = row.quick_size if is_quick else row.size
    count = row.threads or threads
    with thread_count(count or torch.get_num_threads()), torch.enable_grad():
        calls = build_calls(row, size, timer.device)
        check_agreement(row, calls)
        measured = measure(calls, budget, in_cache=row.in_cache, timer=timer)
    is_judged = not is_quick and (row.threads is not None or count == BAR_THREADS)
    return RowResult(
        name=row.name,
        size=size,
        unit=row.unit,
        dtype=dtype_name(row.dtype),
        threads=count,
        in_cache=row.in_cache,
        streams=row.streams,
        bytes_moved=row.bytes_moved(size),
        flops=row.flops(size) if row.flops else None,
        rounds=len(measured.seconds[OURS]),
        roof=row.roof,
        contenders={name: _contender(row, size, measured, name) for name in calls},
        bars=_bars(row, measured, is_judged),
        load=measured.load,
        busy=measured.load.exceeds(timer.busy_share),
        date=date.today().isoformat(),
        torch=torch.__version__,
        instruction_set=instruction_set or pp.cpu_capability(),
    )


def _contender(row: Row, size: int, measured: Measurement, name: str) -> ContenderResult:
    seconds = measured.median(name)
    moved = row.bytes_moved(size)
    first, third = measured.quartiles(name)
    result = ContenderResult(
        median_s=seconds,
        quartile1_s=first,
        quartile3_s=third,
        time_over_ours=measured.ratio(name, OURS),
        gb_per_s=moved / seconds / 1e9 if moved else None,
        gflop_per_s=row.flops(size) / seconds / 1e9 if row.flops else None,
        share_of_roof=measured.ratio(row.roof, name) if row.roof else None,
    )
    host = measured.host(name)
    if host is None:
        return result
    return GpuContenderResult(**vars(result), host_s=host, device_s=measured.on_device(name))


def _bars(row: Row, measured: Measurement, is_judged: bool) -> tuple[BarResult, ...]:
    results = []
    for bar in row.bars:
        value = bar.measured(measured.seconds[bar.promiser], measured.seconds[bar.rival])
        reached = bar.reached(value) if is_judged else None
        text = bar.format(value)
        results.append(BarResult(bar.sentence(), bar.limit, value, text, reached))
    return tuple(results)


def save(
    path: Path,
    facts: Mapping[str, object],
    names: Container[str],
    *,
    roof: Sequence[Mapping[str, object]] | None = None,
    rows: Sequence[RowResult] = (),
    memory: Sequence[MemoryResult] = (),
) -> None:
    """Write what was measured into the machine's file, and keep what the file holds besides.

    Of that, rows are dropped whose names are not in ``names``: the registry has them no longer.
    Every row carries its own date, torch version and thread count, and its load if it was timed,
    since rows of one file may stem from several runs; machine facts and roof are those of the last.
    """
    old = json.loads(path.read_text()) if path.exists() else {}
    content: dict[str, object] = {
        "machine": dict(facts),
        "roof": old.get("roof", []) if roof is None else roof,
    }
    for section, measured in (("rows", rows), ("memory", memory)):
        kept = {name: row for name, row in old.get(section, {}).items() if name in names}
        content[section] = {**kept, **{row.name: asdict(row) for row in measured}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
