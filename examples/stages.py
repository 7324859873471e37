"""What sparse_training.py hands out: the tables on the screen, the numbers as JSON, the picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

import plots
import report
from rich import box
from rich.console import Console
from rich.table import Table

import ppkernels as pp

# The stages, as tables and pictures call them. The last two are fine-tuned.
DENSE = "dense"
PRUNED = "pruned"
MASKED = "masked"
SPARSE = "sparse"

MEGABYTE = 1e6


@dataclass(frozen=True)
class Memory:
    """The bytes that a network holds while it trains, but for gradients and activations."""

    weights: int
    indices: int  # of sparse layers, and the masks of the others
    state: int  # of the optimizer
    total: int


@dataclass(frozen=True)
class Stage:
    """A network at one point of its way."""

    name: str
    kept: float  # the share of its weights that pruning has left
    accuracy: float
    file: int  # bytes of its state_dict in a file
    memory: Memory | None = None  # None where it was not trained
    seconds: list[float] = field(default_factory=list)  # of each epoch of training

    @property
    def label(self) -> str:
        return self.name if self.kept == 1 else f"{self.name}, {100 * self.kept:g} %"

    def __str__(self) -> str:
        parts = [f"{self.label}: accuracy {self.accuracy:.2%}"]
        if self.seconds and self.memory is not None:
            parts += [f"{median(self.seconds):.3g} s per epoch"]
            parts += [f"{megabytes(self.memory.total)} MB in memory"]
        return ", ".join([*parts, f"{megabytes(self.file)} MB in a file"])


@dataclass(frozen=True)
class Comparison:
    """What the masked and the sparse network of one share and seed have in common, and what not."""

    kept: float
    first_step: float  # |difference of their losses| in the first step
    largest: float  # the largest of all steps
    read_back: float  # |difference of outputs| that the way through the files has made
    folded_files: dict[str, int]  # bytes, by stage
    images_per_second: dict[int, dict[str, float]]  # by images in a batch, and stage


@dataclass(frozen=True)
class Run:
    """One seed."""

    seed: int
    stages: list[Stage]
    comparisons: list[Comparison]  # one for each share


def megabytes(count: float) -> str:
    return f"{count / MEGABYTE:.3g}" if count < 1e3 * MEGABYTE else f"{count / MEGABYTE:.0f}"


def memory_of(footprint: pp.Footprint) -> Memory:
    """The sums over all layers."""
    found = footprint.total
    return Memory(found.weights, found.indices + found.masks, found.state, found.memory)


# ---- tables


def show(runs: Sequence[Run], console: Console) -> None:
    """A table of the stages, one of inference, and what was compared."""
    _show_stages(by_label(runs), console)
    _show_inference(runs, console)
    for place, first in enumerate(runs[0].comparisons):
        own = [run.comparisons[place] for run in runs]
        console.print(
            f"{100 * first.kept:g} % kept: the losses of the masked and the sparse network differ "
            f"by {max(one.first_step for one in own):.1g} in the first step, by at most "
            f"{max(one.largest for one in own):.1g} in any; saved and read back, outputs differ "
            f"by {max(one.read_back for one in own):.1g}."
        )


def by_label(runs: Sequence[Run]) -> dict[str, list[Stage]]:
    """The stages in their order, each with all seeds."""
    groups: dict[str, list[Stage]] = {}
    for run in runs:
        for stage in run.stages:
            groups.setdefault(stage.label, []).append(stage)
    return groups


def epoch_seconds(group: Sequence[Stage]) -> list[float]:
    """Those of all epochs and seeds."""
    return [seconds for stage in group for seconds in stage.seconds]


def _show_stages(groups: Mapping[str, Sequence[Stage]], console: Console) -> None:
    table = Table(title="Stages, sizes in MB", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("stage, kept", no_wrap=True)
    # Narrow enough for 80 columns with several seeds.
    for heading in ("s/epoch", "weights", "indices", "state", "all", "file", "accuracy, %"):
        table.add_column(heading, justify="right")
    for label, group in groups.items():
        seconds, memory = epoch_seconds(group), group[0].memory
        cells = ["", "", "", "", ""]
        if seconds and memory is not None:
            sizes = (memory.weights, memory.indices, memory.state, memory.total)
            cells = [f"{median(seconds):.3g}", *map(megabytes, sizes)]
        file = megabytes(fmean(stage.file for stage in group))
        table.add_row(label, *cells, file, report.percent(stage.accuracy for stage in group))
    console.print(table)


def _show_inference(runs: Sequence[Run], console: Console) -> None:
    table = Table(title="Inference, folded: images per second, and the file", box=box.SIMPLE_HEAD)
    for heading in ("kept", "batch", "dense", "sparse", "times", "MB dense", "MB sparse"):
        table.add_column(heading, justify="right")
    for place, first in enumerate(runs[0].comparisons):
        own = [run.comparisons[place] for run in runs]
        files = [
            megabytes(fmean(one.folded_files[name] for one in own)) for name in (MASKED, SPARSE)
        ]
        for batch in first.images_per_second:
            speeds = [
                fmean(one.images_per_second[batch][name] for one in own)
                for name in (MASKED, SPARSE)
            ]
            table.add_row(
                f"{100 * first.kept:g} %",
                str(batch),
                *(f"{speed:,.0f}" for speed in speeds),
                f"{speeds[1] / speeds[0]:.2f}",
                *files,
            )
    console.print(table)


# ---- files


def save(
    runs: Sequence[Run], settings: Mapping[str, Any], tested_on: str, folder: Path
) -> list[Path]:
    """The numbers as JSON and the picture; returns where they lie.

    Args:
        runs: at least one.
        settings: what the numbers depend on.
        tested_on: the name of the images that the accuracies are of, for the axis.
        folder: where the files go.
    """
    paths = [folder / name for name in ("results.json", "stages.png")]
    results = {"settings": settings, "runs": [asdict(run) for run in runs]}
    paths[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    groups = by_label(runs)
    held = [[stage.memory for stage in group if stage.memory] for group in groups.values()]
    bars = {
        "seconds per epoch": [epoch_seconds(group) for group in groups.values()],
        "MB of weights, indices and state": [[m.total / MEGABYTE for m in own] for own in held],
    }
    accuracies = [[100 * stage.accuracy for stage in group] for group in groups.values()]
    points = {f"accuracy on {tested_on}, %": accuracies}
    sparse = [label for label, group in groups.items() if group[0].name == SPARSE]
    plots.stages(list(groups), bars, points, paths[1], highlight=sparse)
    return paths
