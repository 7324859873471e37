"""The tables that `python -m bench` prints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.memory import MemoryResult
from bench.results import BarResult, ContenderResult, GpuContenderResult, RowResult
from bench.row import OURS

_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    scale, unit = next((pair for pair in _UNITS if seconds >= pair[0]), _UNITS[-1])
    return f"{seconds / scale:.3g} {unit}" if seconds < 999 * scale else f"{seconds / scale:.0f} s"


def count(number: int) -> str:
    """64 Mi, 64 Ki, or the number."""
    for scale, letter in ((2**20, "Mi"), (2**10, "Ki")):
        if number >= scale and number % scale == 0:
            return f"{number // scale} {letter}"
    return str(number)


def print_machine(
    console: Console, facts: Mapping[str, object], roof: Sequence[Mapping[str, object]]
) -> None:
    """The facts in one paragraph, and the copy bandwidth at each size."""
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, "
        f"{facts['memory_gib']} GiB; kernels: {facts['instruction_set']}; torch {facts['torch']} "
        f"({facts['torch_instruction_set']}), Python {facts['python']}",
        highlight=False,
    )
    table = Table("float32 values", "threads", "copy_", "GB/s read + write", title="Roof")
    for entry in roof:
        table.add_row(
            count(int(str(entry["elements"]))),
            str(entry["threads"]),
            duration(float(str(entry["seconds"]))),
            f"{entry['gb_per_s']:.1f}{' (busy)' if entry['busy'] else ''}",
        )
    console.print(table)


def print_gpu(
    console: Console, facts: Mapping[str, object], roof: Sequence[Mapping[str, object]]
) -> None:
    """The same for a GPU, with what a call takes on the device alone."""
    console.print(
        f"{facts['gpu']} ({facts['architecture']}), {facts['multiprocessors']} multiprocessors, "
        f"{facts['memory_gib']} GiB ({facts['memory_free_gib']} free), L2 {facts['l2_mib']} MiB; "
        f"driver {facts['driver'] or 'unknown'}, {facts['runtime']}; torch {facts['torch']}, "
        f"Triton {facts['triton']}, Python {facts['python']}; float32 products in precision "
        f"{facts['float32_matmul_precision']!r}; on {facts['cpu']}, {facts['cores']} cores",
        highlight=False,
    )
    table = Table("float32 values", "call", "time", "device", "GB/s read + write", title="Roof")
    for entry in roof:
        table.add_row(
            count(int(str(entry["elements"]))),
            str(entry["call"]),
            duration(float(str(entry["seconds"]))),
            _known(entry["device_s"]),
            f"{entry['gb_per_s']:.1f}{' (busy)' if entry['busy'] else ''}",
        )
    console.print(table)


def print_row(console: Console, row: RowResult) -> None:
    """One row: its contenders, its bars, and a warning where other work disturbed it."""
    streams = ", ".join(row.streams)
    work = f", {row.bytes_moved / 2**20:g} MiB moved ({streams})" if row.bytes_moved else ""
    size = count(row.size) if row.unit == "elements" else row.size
    console.print(
        f"\n[bold]{escape(row.name)}[/bold]  {size} {row.unit}{_threads(row.threads)}"
        f"{', in cache' if row.in_cache else ''}{work}, {row.rounds} rounds",
        highlight=False,
    )
    columns: dict[str, Callable[[ContenderResult], str]] = {
        "median": lambda result: duration(result.median_s),
        "spread": lambda result: f"{result.spread:.0%}",
        "GB/s": lambda result: f"{result.gb_per_s:.1f}",
        "GFLOP/s": lambda result: f"{result.gflop_per_s:.1f}",
        "of roof": lambda result: f"{result.share_of_roof:.0%}",
        "time / ours": lambda result: f"{result.time_over_ours:.2f}",
        **(_GPU_COLUMNS if isinstance(row.contenders[OURS], GpuContenderResult) else {}),
    }
    absent = {"GB/s": not row.streams, "GFLOP/s": not row.flops, "of roof": not row.roof}
    columns = {title: text for title, text in columns.items() if not absent.get(title, False)}
    table = Table("contender")
    for title in columns:
        table.add_column(title, justify="right")
    for name, result in row.contenders.items():
        label = f"{name} (roof)" if name == row.roof else name
        cells = [text(result) for text in columns.values()]
        table.add_row(label, *cells, style="bold" if name == OURS else "")
    console.print(table)
    if row.busy:
        console.print(f"[yellow]too busy to trust:[/yellow] {row.load.sentence()}", highlight=False)
    for bar in row.bars:
        console.print(f"  {_verdict(bar, row.busy)}", highlight=False)


def print_memory(console: Console, row: MemoryResult) -> None:
    """One row's peaks, and its bar."""
    console.print(
        f"\n[bold]{escape(row.name)}[/bold]  {row.size} {row.unit}{_threads(row.threads)}, MiB",
        highlight=False,
    )
    table = Table("contender")
    for title in ("model and batch", "peak of a step", f"above {row.rival}"):
        table.add_column(title, justify="right")
    rival = row.contenders[row.rival].peak
    for name, result in row.contenders.items():
        shown = (result.at_rest, result.peak, result.peak - rival)
        cells = [f"{number / 2**20:.2f}" for number in shown]
        table.add_row(name, *cells, style="bold" if name == OURS else "")
    console.print(table)
    sentence = f"at most {row.extra_bytes} bytes above {row.rival}; measured {row.measured_bytes}"
    console.print(f"  {_word(row.reached)}: {sentence}", highlight=False)


def print_bars(console: Console, rows: Sequence[RowResult]) -> None:
    """All bars of the run in one table."""
    table = Table("row", "bar", "measured", "", title="Bars")
    table.columns[0].overflow = "fold"
    for row in rows:
        for bar in row.bars:
            table.add_row(row.name, bar.sentence, bar.measured_text, _word(bar.reached, row.busy))
    if table.row_count:
        console.print()
        console.print(table)


def _threads(count: int | None) -> str:
    return f", {count} thread{'s' if count > 1 else ''}" if count else ""


def _known(seconds: Any) -> str:
    return "-" if seconds is None else duration(seconds)


_GPU_COLUMNS: dict[str, Callable[[Any], str]] = {
    "host": lambda result: duration(result.host_s),
    "device": lambda result: _known(result.device_s),
}


def _verdict(bar: BarResult, is_busy: bool) -> str:
    return f"{_word(bar.reached, is_busy)}: {bar.sentence}; measured {bar.measured_text}"


def _word(reached: bool | None, is_busy: bool = False) -> str:
    if reached is None:
        return "[dim]not judged[/dim]"
    word = "[green]reached[/green]" if reached else "[red]missed[/red]"
    return f"{word} (busy)" if is_busy else word
