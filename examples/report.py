"""What a run hands out: the tables on the screen, the numbers as JSON, the two pictures."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import plots
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

# The shares of weights that pruning keeps, for the curve; and those that the table shows.
KEPT = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
PRUNED = {"50%": 0.5, "80%": 0.2, "90%": 0.1, "95%": 0.05, "98%": 0.02}
SMALL = (1e-3, 1e-2)  # |θ| below these counts as small


@dataclass(frozen=True)
class Run:
    """What is known of one trained network."""

    alpha: float
    seed: int
    accuracy: float
    small: dict[str, list[float]]  # by layer, and "all": the shares of |θ| below each of SMALL
    pruned: list[float]  # the accuracy at each of KEPT


class Data(Protocol):
    """What is trained and tested on."""

    source: str
    train_labels: Tensor
    test_labels: Tensor


def introduce(data: Data, console: Console) -> None:
    """Where the images come from, and how many there are."""
    console.print(f"Data: {data.source}")
    console.print(f"{len(data.train_labels):,} images to train, {len(data.test_labels):,} to test")


def end(start: float, paths: Sequence[Path], console: Console) -> None:
    """How long it took since ``start``, and where the numbers and the pictures lie."""
    pictures = "picture" if len(paths) == 2 else "pictures"
    seconds = time.perf_counter() - start
    console.print(f"Done in {seconds:.0f} s. The numbers and the {pictures}:")
    for path in paths:
        console.print(f"  {path.resolve()}", soft_wrap=True)


def progress(console: Console) -> Progress:
    """A bar for one task, which needs a field ``state``: a few words beside the bar."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True)


def show(runs: Sequence[Run], console: Console) -> None:
    """The two tables: accuracy before and after pruning, and the shares of small weights."""
    by_alpha: dict[float, list[Run]] = {}
    for run in runs:
        by_alpha.setdefault(run.alpha, []).append(run)

    # Narrow enough for 80 columns with several seeds.
    table = Table(
        title="Test accuracy, %: trained, and after pruning so much",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    for heading in ("α", "trained", *PRUNED):
        table.add_column(heading, justify="right")
    for alpha, group in by_alpha.items():
        places = [KEPT.index(kept) for kept in PRUNED.values()]
        cells = [percent(run.accuracy for run in group)]
        cells += [percent(run.pruned[place] for run in group) for place in places]
        table.add_row(f"{alpha:g}", *cells)
    console.print(table)

    table = Table(title="Share of small weights, %", box=box.SIMPLE_HEAD)
    table.add_column("layer")
    for heading in ("α", *(f"|θ| < {limit:g}" for limit in SMALL)):
        table.add_column(heading, justify="right")
    for layer in runs[0].small:
        for alpha, group in by_alpha.items():
            cells = [percent(run.small[layer][i] for run in group) for i in range(len(SMALL))]
            name = layer if alpha == runs[0].alpha else ""
            table.add_row(name, f"{alpha:g}", *cells, end_section=alpha == list(by_alpha)[-1])
    console.print(table)


def percent(shares: Iterable[float], digits: int = 2) -> str:
    """Mean of ``shares`` in percent; with the standard deviation where they are several."""
    values = [100 * share for share in shares]
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    # A deviation of 10 and more has one decimal less, and the table keeps its width.
    deviation = f"{statistics.stdev(values):.{digits}f}"[: digits + 2].rstrip(".")
    return f"{mean}±{deviation}"


def save(
    runs: Sequence[Run],
    weights: Mapping[float, Mapping[str, np.ndarray]],
    settings: Mapping[str, Any],
    folder: Path,
) -> list[Path]:
    """The numbers as JSON and the two pictures; returns where they lie."""
    paths = [folder / name for name in ("results.json", "histograms.png", "pruning.png")]
    results = {
        "settings": settings,
        "kept": KEPT,
        "small": SMALL,
        "runs": [asdict(r) for r in runs],
    }
    paths[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    labels = {alpha: f"α = {alpha:g}" for alpha in weights}
    plots.theta_histograms({labels[alpha]: own for alpha, own in weights.items()}, paths[1])
    curves = {
        label: np.array([run.pruned for run in runs if run.alpha == alpha])
        for alpha, label in labels.items()
    }
    plots.accuracy_against_kept(KEPT, curves, "the test images", paths[2])
    return paths
