"""``python -m bench [names…] [--threads N] [--quick] [--save]``: measure and print the table.

With ``--memory`` it is the peak memory that is measured, and not the time.

Exit code: 0; 1 where an op was refused because its values are wrong; 2 for wrong arguments. A bar
that is missed is printed, and does not change the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from bench import machine, memory, results, table
from bench.registry import ROWS
from bench.row import Row
from bench.timing import idle_load

BUDGET_SECONDS, QUICK_SECONDS = 5.0, 0.5


def selected(parts: Sequence[str]) -> list[Row]:
    """The rows with one of ``parts`` at the start of their name or after a slash; all without any.

    ``power/`` means the rows of that op and not those of inverse_power; ``alpha=2`` works as well.
    """
    if not parts:
        return list(ROWS)
    return [row for row in ROWS if any(f"/{part}" in f"/{row.name}" for part in parts)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="beginnings of row names or of their parts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--quick", action="store_true", help="small sizes; judges no bar")
    parser.add_argument("--save", action="store_true", help="write bench/results/<machine>.json")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--list", action="store_true", help="print the rows' names and end")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.quick and options.save:
        parser.error("--save keeps measurements at full size; leave --quick away")
    if not selected(options.names):
        parser.error(f"no row is named {' or '.join(options.names)}; --list prints the names")
    if options.memory and not any(row.memory for row in selected(options.names)):
        parser.error(f"of {' and '.join(options.names)}, memory is measured for no row")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(arguments)
    rows = [row for row in selected(options.names) if row.memory or not options.memory]
    if options.list:
        print(*(row.name for row in rows), sep="\n")
        return 0
    console = Console() if sys.stdout.isatty() else Console(width=100)
    failures = results.failing_ops(op for row in rows for op in row.ops)
    for op, sentence in failures.items():
        console.print(f"[red]{op} is not timed: its values are wrong.[/red] {sentence}")
    sound = [row for row in rows if not failures.keys() & set(row.ops)]
    run = weigh if options.memory else time
    is_whole, found = run(console, sound, options)
    if options.save:
        path = machine.results_path()
        results.save(path, machine.facts(options.threads), {row.name for row in ROWS}, **found)
        console.print(f"written: bench/results/{path.name}", highlight=False)
    return int(bool(failures) or not is_whole)


Found = tuple[bool, dict[str, Any]]
"""Whether every row was measured, and what `results.save` is to write."""


def time(console: Console, rows: Sequence[Row], options: argparse.Namespace) -> Found:
    """Measure and print the roof, the rows, and their bars."""
    load = idle_load()
    if load.is_busy:
        console.print(
            f"[yellow]This machine is too busy to measure:[/yellow] before the start, "
            f"{load.sentence()}. The rows below say for each whether to trust it.",
            highlight=False,
        )
    budget = QUICK_SECONDS if options.quick else BUDGET_SECONDS
    roof = machine.roof(options.threads, budget / 2, options.quick)
    table.print_machine(console, machine.facts(options.threads), roof)
    measured = []
    for row in rows:
        try:
            measured.append(results.measure_row(row, options.threads, budget, options.quick))
        except results.WrongValues as error:
            console.print(f"\n[red]not timed:[/red] {error}", highlight=False)
        else:
            table.print_row(console, measured[-1])
    table.print_bars(console, measured)
    return len(measured) == len(rows), {"roof": roof, "rows": measured}


def weigh(console: Console, rows: Sequence[Row], options: argparse.Namespace) -> Found:
    """Count and print the peak memory of the rows' contenders."""
    measured = []
    for row in rows:
        measured.append(memory.measure(row, options.threads, options.quick))
        table.print_memory(console, measured[-1])
    return True, {"memory": measured}


if __name__ == "__main__":
    sys.exit(main())
