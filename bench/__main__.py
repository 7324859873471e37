"""``python -m bench [names…] [--threads N] [--quick] [--save]``: measure and print the table.

With ``--memory`` it is the peak memory that is measured, and not the time; with ``--device cuda``
the GPU, or nothing where there is none, which is said in a sentence.

Exit code: 0; 1 where an op was refused because its values are wrong, or a row failed; 2 for wrong
arguments. A bar that is missed is printed, and does not change the exit code.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from bench import gpu, machine, memory, results, table
from bench.registry import rows_on
from bench.row import CPU, GPU, Row
from bench.timing import CPU_TIMER, Timer, idle_load

BUDGET_SECONDS, QUICK_SECONDS = {"cpu": 5.0, "cuda": 2.0}, 0.5


def selected(parts: Sequence[str], device: str = "cpu") -> list[Row]:
    """The rows with one of ``parts`` at the start of their name or after a slash; all without any.

    ``power/`` means the rows of that op and not those of inverse_power; ``alpha=2`` works as well.
    """
    rows = rows_on(device)
    if not parts:
        return list(rows)
    return [row for row in rows if any(f"/{part}" in f"/{row.name}" for part in parts)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of row names or of their parts")
    parser.add_argument("--device", choices=CPU + GPU, default="cpu", help="cuda: any GPU")
    parser.add_argument("--threads", type=int, metavar="N", help="on the CPU")
    parser.add_argument("--quick", action="store_true", help="small sizes; judges no bar")
    parser.add_argument("--save", action="store_true", help="write bench/results/<machine>.json")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and options.threads is not None:
        parser.error("--threads is the CPU's; leave it away")
    if options.device == "cpu" and options.threads is None:
        options.threads = torch.get_num_threads()
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.quick and options.save:
        parser.error("--save keeps measurements at full size; leave --quick away")
    rows = selected(options.names, options.device)
    if not rows:
        parser.error(f"no row is named {' or '.join(options.names)}; --list prints the names")
    if options.memory and not any(row.memory for row in rows):
        parser.error(f"of {' and '.join(options.names)}, memory is measured for no row")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(arguments)
    rows = selected(options.names, options.device)
    rows = [row for row in rows if row.memory or not options.memory]
    if options.list:
        print(*(row.name for row in rows), sep="\n")
        return 0
    on_gpu = options.device != "cpu"
    if on_gpu and (sentence := gpu.missing()):
        print(sentence)
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=100)
    # Asked before anything runs: a GPU may not live to tell.
    facts = gpu.facts() if on_gpu else machine.facts(options.threads)
    path = gpu.results_path() if on_gpu else machine.results_path()
    failures = results.failing_ops((op for row in rows for op in row.ops), options.device)
    for op, sentence in failures.items():
        console.print(f"[red]{op} is not timed: its values are wrong.[/red] {sentence}")
    if on_gpu and has_died(console):
        return 1
    sound = [row for row in rows if not failures.keys() & set(row.ops)]
    for sentence in dict.fromkeys(sentence for row in sound for sentence in row.absent):
        console.print(sentence, highlight=False)
    if options.memory:
        is_whole, found = weigh(console, sound, options)
    else:
        is_whole, found = time(console, sound, options, facts)
    if options.save:
        results.save(path, facts, {row.name for row in rows_on(options.device)}, **found)
        console.print(f"written: bench/results/{path.name}", highlight=False)
    return int(bool(failures) or not is_whole)


Found = tuple[bool, dict[str, Any]]
"""Whether every row was measured, and what `results.save` is to write."""


def time(
    console: Console,
    rows: Sequence[Row],
    options: argparse.Namespace,
    facts: Mapping[str, object],
) -> Found:
    """Measure and print the roof, the rows, and their bars."""
    timer = CPU_TIMER if options.device == "cpu" else gpu.gpu_timer()
    load = idle_load()
    if load.exceeds(timer.busy_share):
        console.print(
            f"[yellow]This machine is too busy to measure:[/yellow] before the start, "
            f"{load.sentence()}. The rows below say for each whether to trust it.",
            highlight=False,
        )
    budget = QUICK_SECONDS if options.quick else BUDGET_SECONDS[options.device]
    if options.device == "cpu":
        roof = machine.roof(options.threads, budget / 2, options.quick)
        table.print_machine(console, facts, roof)
    else:
        roof = gpu.roof(timer, budget / 2, options.quick)
        table.print_gpu(console, facts, roof)
    measured = time_rows(console, rows, options, budget, timer)
    table.print_bars(console, measured)
    return len(measured) == len(rows), {"roof": roof, "rows": measured}


def time_rows(
    console: Console,
    rows: Sequence[Row],
    options: argparse.Namespace,
    budget: float,
    timer: Timer,
) -> list[results.RowResult]:
    """Measure and print each row; one that fails is named, and costs the others nothing."""
    on_gpu = options.device != "cpu"
    kernels = gpu.architecture() if on_gpu else None
    measured = []
    for row in rows:
        try:
            result = results.measure_row(
                row, options.threads, budget, options.quick, timer=timer, instruction_set=kernels
            )
        except results.WrongValues as error:
            console.print(f"\n[red]not timed:[/red] {error}", highlight=False)
        except Exception:
            console.print(f"\n[red]failed:[/red] {escape(row.name)}", highlight=False)
            traceback.print_exc()
            if on_gpu and has_died(console):
                break
        else:
            measured.append(result)
            table.print_row(console, result)
        if on_gpu:
            gpu.release()
    return measured


def has_died(console: Console) -> bool:
    """Whether the GPU is lost to this process, which is said."""
    if gpu.is_alive():
        return False
    console.print("[red]The GPU answers no more; no further row is measured.[/red]")
    return True


def weigh(console: Console, rows: Sequence[Row], options: argparse.Namespace) -> Found:
    """Count and print the peak memory of the rows' contenders."""
    measured = []
    for row in rows:
        try:
            measured.append(memory.measure(row, options.threads, options.quick, options.device))
        except RuntimeError as error:
            console.print(f"\n[red]failed:[/red] {escape(str(error))}", highlight=False)
        else:
            table.print_memory(console, measured[-1])
    return len(measured) == len(rows), {"memory": measured}


if __name__ == "__main__":
    sys.exit(main())
