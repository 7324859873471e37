"""``python -m bench.sweep [--threads N] [--quick] [--save]``: from how many zeros on sparse pays.

A linear layer of several sizes, forward alone and with the backward, at batches of 1 to 512 and
with 50 to 99 % zeros: ours, the dense layer and torch's CSR tensors in one interleaved run for each
size and batch. With ``--save`` the times go to bench/results/spmm_crossover.json and the picture of
them beside it; ``--draw`` draws it again from the file.

Exit code: 0; 1 where values are wrong; 2 for wrong arguments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench import machine, results, rivals, sparse
from bench.contenders import seeded
from bench.results import WrongValues
from bench.rivals import CSR, CsrLinear
from bench.row import OURS, Call
from bench.sparse import BOTH, DENSE, FORWARD, OPS, Passes
from bench.timing import BUSY_SHARE, CPU_TIMER, measure, thread_count

PATH = machine.RESULTS / "spmm_crossover.json"

MIN_ROUNDS, BUDGET_SECONDS = 3, 0.5
"""Few, since there are many runs: it is curves that are wanted, and the rows have the figures."""

RTOL, ATOL = 1e-4, 1e-5
"""As in the rows; sums of 4096 products may be off by more than those of 2048."""


@dataclass(frozen=True)
class Grid:
    """What is measured: every combination.

    Attributes:
        sizes: [N, K] of θ: outputs and inputs.
        zeros: in percent of the weight, ascending.
        batches: ascending.
    """

    sizes: Sequence[tuple[int, int]]
    zeros: Sequence[int]
    batches: Sequence[int]


FULL = Grid(
    sizes=((300, 784), (512, 512), (1024, 1024), (2048, 2048), (4096, 4096)),
    zeros=(50, 60, 70, 80, 90, 95, 98, 99),
    batches=(1, 8, 16, 64, 128, 256, 512),
)
QUICK = Grid(sizes=((64, 64), (30, 78)), zeros=(50, 90), batches=(1, 8))


@dataclass(frozen=True)
class Point:
    """One combination; times are medians in seconds, ratios medians of the rounds' own.

    Attributes:
        passes: "forward" or "forward+backward".
        zeros: in percent.
        faster: the dense layer's time over ours.
        faster_than_csr: torch CSR's time over ours, None where it takes no part, as ``csr_s``.
        busy: other work disturbed the run.
    """

    passes: Passes
    out_features: int
    in_features: int
    batch: int
    zeros: int
    ours_s: float
    dense_s: float
    csr_s: float | None
    faster: float
    faster_than_csr: float | None
    busy: bool


@dataclass(frozen=True)
class Pruned:
    """One weight with its zeros, dense and in the contenders' forms."""

    zeros: int
    plain: nn.Module
    ours: nn.Module
    csr: CsrLinear | None


def sweep(grid: Grid, budget: float = BUDGET_SECONDS) -> Iterator[list[Point]]:
    """The points of one size, batch and pass after the other; the thread count must be set.

    Raises:
        WrongValues: ours or torch's CSR tensors give something else than the dense layer.
    """
    for size in grid.sizes:
        weights = [_pruned(size, zeros) for zeros in grid.zeros]
        for passes, batch in itertools.product((FORWARD, BOTH), grid.batches):
            yield _points(weights, size, passes, batch, budget)


def _pruned(size: tuple[int, int], zeros: int) -> Pruned:
    outputs, inputs = size
    make = sparse.inputs_of(
        lambda _: nn.Linear(inputs, outputs), 1 - zeros / 100, lambda _: (1, inputs)
    )
    plain = make(outputs, CPU_TIMER.device).plain
    csr = None if CSR in rivals.absent() else CsrLinear(plain)
    return Pruned(zeros, plain, sparse.sparse_linear(plain), csr)


def _points(
    weights: Sequence[Pruned], size: tuple[int, int], passes: Passes, batch: int, budget: float
) -> list[Point]:
    """One interleaved run: the dense layer once, since zeros change nothing for it."""
    with seeded(CPU_TIMER.device):
        input, grad_output = torch.randn(batch, size[1]), torch.randn(batch, size[0])
    calls: dict[str, Call] = {
        DENSE: sparse.layer_call(weights[0].plain, passes, input, grad_output)
    }
    for weight in weights:
        own = {OURS: sparse.layer_call(weight.ours, passes, input, grad_output)}
        if weight.csr is not None:
            own[CSR] = sparse.csr_call(weight.csr, passes, input, grad_output)
        _check(own, weight, passes, input, grad_output)
        calls |= {f"{name} {weight.zeros}": call for name, call in own.items()}
    measured = measure(calls, budget, min_rounds=MIN_ROUNDS, estimates=1)
    points = []
    for weight in weights:
        ours, csr = f"{OURS} {weight.zeros}", f"{CSR} {weight.zeros}"
        points.append(
            Point(
                passes,
                *size,
                batch,
                weight.zeros,
                ours_s=measured.median(ours),
                dense_s=measured.median(DENSE),
                csr_s=measured.median(csr) if csr in calls else None,
                faster=measured.ratio(DENSE, ours),
                faster_than_csr=measured.ratio(csr, ours) if csr in calls else None,
                busy=measured.load.exceeds(BUSY_SHARE),
            )
        )
    return points


def _check(
    calls: Mapping[str, Call], weight: Pruned, passes: Passes, input: Tensor, grad_output: Tensor
) -> None:
    """The contenders return what the dense weight gives."""
    with torch.no_grad():
        plain = weight.plain
        expected = plain(input) if passes == FORWARD else grad_output @ plain.weight
    for name, call in calls.items():
        if not torch.allclose(call(), expected, rtol=RTOL, atol=ATOL):
            error = (call() - expected).abs().max().item()
            raise WrongValues(
                f"{name}, {passes} of {tuple(plain.weight.shape)} with {weight.zeros} % zeros, "
                f"batch {len(input)}: off by {error:.3g}"
            )


# ---- results


def pays_from(points: Sequence[Point]) -> int | None:
    """The least share of zeros from which on ours is the faster one, in percent; None: at none."""
    found = None
    for point in sorted(points, key=lambda point: -point.zeros):
        if point.faster < 1:
            break
        found = point.zeros
    return found


def print_points(console: Console, points: Sequence[Point]) -> None:
    """The points of one size and pass: how many times faster than the dense layer."""
    first = points[0]
    title = f"{first.in_features} -> {first.out_features}, {first.passes}: times faster than dense"
    batches = sorted({point.batch for point in points})
    table = Table("zeros", *(f"batch {batch}" for batch in batches))
    for zeros in sorted({point.zeros for point in points}):
        cells = [
            f"{point.faster:.2f}{'*' if point.busy else ''}"
            for batch in batches
            for point in points
            if (point.batch, point.zeros) == (batch, zeros)
        ]
        table.add_row(f"{zeros} %", *cells)
    ends = [pays_from([point for point in points if point.batch == batch]) for batch in batches]
    table.add_section()
    table.add_row("pays from", *("never" if end is None else f"{end} %" for end in ends))
    console.print(f"\n[bold]{title}[/bold]", table, sep="\n", highlight=False)


def write(path: Path, facts: Mapping[str, object], points: Sequence[Point]) -> None:
    """The machine, and a line for each point."""
    lines = ",\n".join("  " + json.dumps(asdict(point)) for point in points)
    head = json.dumps({"machine": dict(facts), "date": date.today().isoformat()}, indent=1)
    path.write_text(f'{head[:-2]},\n "points": [\n{lines}\n ]\n}}\n')


def read(path: Path) -> tuple[dict[str, Any], list[Point]]:
    """What `write` wrote: facts of the machine and the date, and the points."""
    content = json.loads(path.read_text())
    points = [Point(**point) for point in content.pop("points")]
    return content, points


def draw(path: Path) -> Path:
    """The picture of a file of points, beside it."""
    from bench.crossover import crossover

    about, points = read(path)
    picture = path.with_suffix(".png")
    crossover(about, points, picture)
    return picture


# ---- the command


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--quick", action="store_true", help="two small sizes: does it run?")
    parser.add_argument("--save", action="store_true", help="write bench/results/spmm_crossover.*")
    parser.add_argument("--draw", action="store_true", help="draw what was saved, measure nothing")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.quick and options.save:
        parser.error("--save keeps measurements at full size; leave --quick away")
    if options.draw and (options.quick or options.save):
        parser.error("--draw measures nothing; leave --quick and --save away")
    if options.draw and not PATH.exists():
        parser.error(f"there is no bench/results/{PATH.name} to draw; --save writes it")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parse(arguments)
    console = Console() if sys.stdout.isatty() else Console(width=100)
    if options.draw:
        console.print(f"written: bench/results/{draw(PATH).name}", highlight=False)
        return 0
    if failures := results.failing_ops(OPS["spmm"]):
        for op, sentence in failures.items():
            console.print(f"[red]{op} is not timed: its values are wrong.[/red] {sentence}")
        return 1
    if CSR in rivals.absent():
        console.print(rivals.absent()[CSR], highlight=False)
    facts, begun = machine.facts(options.threads), time.perf_counter()
    try:
        points = _measure(console, options)
    except WrongValues as error:
        console.print(f"[red]not timed:[/red] {error}", highlight=False)
        return 1
    console.print(f"{len(points)} points in {time.perf_counter() - begun:.0f} s", highlight=False)
    if options.save:
        write(PATH, facts, points)
        console.print(f"written: bench/results/{PATH.name} and {draw(PATH).name}", highlight=False)
    return 0


def _measure(console: Console, options: argparse.Namespace) -> list[Point]:
    """All points; each table is printed as soon as it is full."""
    grid, budget = (QUICK, 0.0) if options.quick else (FULL, BUDGET_SECONDS)
    points: list[Point] = []
    with thread_count(options.threads):
        for found in sweep(grid, budget):
            points += found
            if found[0].batch == grid.batches[-1]:
                print_points(console, points[-len(grid.zeros) * len(grid.batches) :])
    if any(point.busy for point in points):
        console.print("[yellow]*: other work disturbed the run[/yellow]", highlight=False)
    return points


if __name__ == "__main__":
    sys.exit(main())
