"""What a run on CIFAR-10 hands out: the tables on the screen, the numbers as JSON, the pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plots
import report
from networks import powered_layers, thetas
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import ppkernels as pp

ONE_SHOT = "one-shot"
REESTIMATED = "BatchNorm re-estimated"
GRADUAL = "gradual"

TITLES = {
    ONE_SHOT: "Accuracy, %: one-shot pruning, so much kept",
    REESTIMATED: "The same, BatchNorm re-estimated",
    GRADUAL: "Accuracy, %: gradual pruning, so much kept",
}


@dataclass(frozen=True)
class Layer:
    """What is known of the weights of one layer."""

    mean: float  # of θ
    mean_abs: float  # of |θ|
    small: list[float]  # the shares of |θ| below each of report.SMALL


@dataclass(frozen=True)
class Epoch:
    """What one epoch left behind."""

    alpha: float  # while it trained
    loss: float  # mean over the training images
    small: float  # the share of |θ| below ε, all layers together
    kept: float  # the share of weights that pruning has left


@dataclass(frozen=True)
class Run:
    """What is known of one trained network."""

    alpha: str  # as a label: "α = 1.25", "α adaptive"
    seed: int
    target: float | None  # the share that gradual pruning has left; None: all weights
    accuracy: float
    layers: dict[str, Layer]
    epochs: list[Epoch]
    pruned: dict[str, list[float]]  # by method, the accuracy at each share of the settings


def kind_of(alpha: str, target: float | None) -> str:
    """What a network is called: its α, and what gradual pruning has left of it."""
    return alpha if target is None else f"{alpha}, {100 * target:g}% kept"


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """The weights of every powered layer of ``model``."""
    found = pp.statistics(thetas(model), report.SMALL)
    return {
        name: Layer(one.mean, one.mean_abs, [one.share_below(limit) for limit in report.SMALL])
        for name, one in found.items()
    }


def epoch_of(model: nn.Module, loss: float, epsilon: float) -> Epoch:
    """What the epoch that ``model`` has just been through left behind."""
    weights = thetas(model)
    whole = pp.Statistics.combined(pp.statistics(weights, [epsilon]).values())
    left = sum(theta.count_nonzero().item() for theta in weights.values())
    alpha = float(next(iter(powered_layers(model).values())).alpha)
    return Epoch(alpha, loss, whole.share_below(epsilon), left / whole.count)


def curves(runs: Sequence[Run], method: str, kept: Sequence[float]) -> dict[str, np.ndarray]:
    """By α the accuracies [seeds, shares]: at ``kept``, before it, but not of gradual, at 100 %."""
    found: dict[str, list[list[float]]] = {}
    if method == GRADUAL:
        by_seed: dict[tuple[str, int], dict[float, float]] = {}
        for run in runs:
            if run.target is not None:
                by_seed.setdefault((run.alpha, run.seed), {})[run.target] = run.accuracy
        for (alpha, _), by_share in by_seed.items():
            found.setdefault(alpha, []).append([by_share[share] for share in kept])
    else:
        for run in runs:
            if method in run.pruned:
                found.setdefault(run.alpha, []).append([run.accuracy, *run.pruned[method]])
    return {alpha: np.array(rows) for alpha, rows in found.items()}


def show(runs: Sequence[Run], kept: Sequence[float], console: Console) -> None:
    """A table for each way of pruning, and one of the layers."""
    for method, title in TITLES.items():
        found = curves(runs, method, kept)
        if not found:
            continue
        # Narrow enough for 80 columns with several seeds.
        table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
        trained = [] if method == GRADUAL else ["trained"]
        for heading in ("", *trained, *(f"{100 * share:g}%" for share in kept)):
            table.add_column(heading, justify="right")
        for alpha, accuracies in found.items():
            table.add_row(alpha, *(report.percent(column) for column in accuracies.T.tolist()))
        console.print(table)
    _show_layers(runs, console)


def _show_layers(runs: Sequence[Run], console: Console) -> None:
    table = Table(title="Weights of each layer", box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column("layer")
    small = (f"|θ| < {limit:g}, %" for limit in report.SMALL)
    for heading in ("", "mean θ", "mean |θ|", *small):
        table.add_column(heading, justify="right")
    by_alpha = _by_kind(runs)
    for layer in runs[0].layers:
        for place, (alpha, group) in enumerate(by_alpha.items(), 1):
            of_seeds = [run.layers[layer] for run in group]
            table.add_row(
                layer if place == 1 else "",
                alpha,
                f"{np.mean([one.mean for one in of_seeds]):.5f}",
                f"{np.mean([one.mean_abs for one in of_seeds]):.5f}",
                *(report.percent(row) for row in zip(*(o.small for o in of_seeds), strict=True)),
                end_section=place == len(by_alpha),
            )
    console.print(table)


def save(
    runs: Sequence[Run],
    weights: plots.Weights,
    settings: Mapping[str, Any],
    tested_on: str,
    folder: Path,
) -> list[Path]:
    """The numbers as JSON and the pictures.

    Args:
        runs: at least one.
        weights: for the histograms, θ of the first network of each kind.
        settings: what the numbers depend on; ``kept`` and ``epsilon`` among them.
        tested_on: the name of the images that the accuracies are of, for the axis.
        folder: where the files go.

    Returns:
        Where they lie.
    """
    names = ("results.json", "histograms.png", "depth.png", "epochs.png")
    paths = [folder / name for name in names]
    results = {"settings": settings, "small": report.SMALL, "runs": [asdict(run) for run in runs]}
    paths[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    plots.theta_histograms(weights, paths[1])
    kinds = _by_kind(runs)
    plots.against_depth(
        {kind: [list(run.layers.values()) for run in group] for kind, group in kinds.items()},
        list(runs[0].layers),
        paths[2],
    )
    plots.over_epochs(
        {kind: [run.epochs for run in group] for kind, group in kinds.items()},
        _panels(runs, settings["epsilon"]),
        paths[3],
    )
    if settings["kept"]:
        paths.append(folder / "pruning.png")
        _draw_pruning(runs, settings["kept"], tested_on, paths[-1])
    return paths


def _by_kind(runs: Sequence[Run]) -> dict[str, list[Run]]:
    kinds: dict[str, list[Run]] = {}
    for run in runs:
        kinds.setdefault(kind_of(run.alpha, run.target), []).append(run)
    return kinds


def _panels(runs: Sequence[Run], epsilon: float) -> dict[str, str]:
    """What is drawn over the epochs: small weights, and what may change them, if it changed."""
    panels = {"small": f"share of |θ| < {epsilon:g}, %"}
    for name, heading in (("alpha", "α"), ("kept", "share of weights kept, %")):
        if any(getattr(run.epochs[0], name) != getattr(run.epochs[-1], name) for run in runs):
            panels[name] = heading
    return panels


def _draw_pruning(runs: Sequence[Run], kept: Sequence[float], tested_on: str, path: Path) -> None:
    gradual = curves(runs, GRADUAL, kept)
    if gradual:
        title = "Pruned by magnitude while they trained"
        plots.accuracy_against_kept(kept, gradual, tested_on, path, title=title)
        return
    plots.accuracy_against_kept(
        [1.0, *kept],
        curves(runs, ONE_SHOT, kept),
        tested_on,
        path,
        dashed=curves(runs, REESTIMATED, kept),
        dashed_as=REESTIMATED,
    )
