"""``python -m bench.gpu_static [--check] [--kernel NAME] [--target NAME]``: needs no GPU.

Compiles the Triton kernels for several GPUs, reads their machine code, prints what it is made of
and writes that into bench/results/gpu_static.json. With ``--check`` nothing is written, and the
numbers are held against that file.

Exit code: 0; 1 where ``--check`` found a fault; 2 for wrong arguments, or without a compiler.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console

from bench.gpu_static.targets import TARGETS, CannotCompile, require_compiler


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, but for the kernels' names, which Triton has to be imported for."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_static", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--check", action="store_true", help="judge, and write nothing")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="a part of its name")
    parser.add_argument("--target", action="append", choices=TARGETS)
    parser.add_argument(
        "--markdown",
        metavar="NAME",
        help="print the saved H100 table of NAME, model or products for a README, and end",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=170)
    try:
        require_compiler()
    except CannotCompile as error:
        console.print(f"bench.gpu_static: {error}", highlight=False)
        return 2
    from bench.gpu_static import judgement, results, table
    from bench.gpu_static.catalogue import ROWS
    from bench.gpu_static.measure import measure_all

    if options.markdown:
        print(table.markdown(results.load(), options.markdown), end="")
        return 0
    rows = [row for row in ROWS if any(part in row.name for part in options.kernel or [""])]
    if not rows:
        names = ", ".join(row.name for row in ROWS)
        console.print(f"no kernel is named {' or '.join(options.kernel)}; there are {names}")
        return 2
    targets = [target for target in TARGETS if target in (options.target or TARGETS)]
    start = time.perf_counter()
    with console.status("compiling") as status:
        measured = measure_all(
            [(row.name, target) for row in rows for target in targets],
            lambda row, target: status.update(f"compiled {row} for {target}"),
        )
    seconds = time.perf_counter() - start
    for target in targets:
        found = {row.name: measured[row.name, target] for row in rows}
        table.print_target(console, target, rows, found)
    console.print(
        f"{len(measured)} compilations from an empty cache in {seconds:.0f} s. What the columns "
        "mean: bench/README.md, GPU kernels without a GPU.",
        highlight=False,
    )
    if not options.check:
        results.save(ROWS, measured)
        console.print(f"written: bench/results/{results.PATH.name}", highlight=False)
    content = results.load()
    sentences = [
        sentence
        for row in rows
        for target in targets
        for sentence in judgement.faults(
            row,
            target,
            measured[row.name, target],
            results.recorded(content, row.name, target),
        )
    ]
    for sentence in sentences:
        console.print(f"[red]fault:[/red] {sentence}", highlight=False)
    if options.check and content.get("tools") != results.tools():
        console.print(f"recorded with {content.get('tools')}, compiled by {results.tools()}")
    return int(bool(sentences) and options.check)


if __name__ == "__main__":
    sys.exit(main())
