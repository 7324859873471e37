"""Let a controller choose α while the network trains, and compare it with exponents that stay.

    python examples/adaptive_alpha.py --seeds 0 1 2
    python examples/adaptive_alpha.py --epochs 60 --alpha-max 3    # long enough to see it turn down

784-256-10 on MNIST, every network under the same optimizer: exponents that stay, and two that
`pp.AdaptiveAlpha` raises and lowers by the share of small weights, with φ kept at each change or
with θ kept. Then each is pruned once, to ever fewer weights, with no training afterwards.

The file reads in the order of the work: options, training, measuring, tables, main. Beside it,
digits.py finds the data, networks.py makes the network and prunes it, plots.py draws.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import digits
import numpy as np
import plots
import report
import torch
import torch.nn.functional as F
from networks import accuracy, mlp, powered_layers, prune, thetas
from options import above_zero, add_common, at_least, begin, check_once
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import nn

import ppkernels as pp

QUICK = {"epochs": 9, "train": 1_000, "test": 500}
KEPT = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 1.0)


@dataclass(frozen=True)
class Network:
    """One row of the tables: the exponent it begins with, and what a controller keeps, if any."""

    alpha: float
    keep: Literal["phi", "theta"] | None = None

    @property
    def name(self) -> str:
        if self.keep is None:
            return f"α = {self.alpha:g}"
        return "adaptive, φ kept" if self.keep == "phi" else "adaptive, θ kept"


# ---- options


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the list of networks filled in."""
    parser = argparse.ArgumentParser(
        description="Train on MNIST with an exponent that adapts, and with some that stay."
    )
    add = parser.add_argument
    add(
        "--alpha",
        type=at_least(1.0),
        nargs="*",
        default=[1.0, 1.25, 1.5, 2.0, 3.0],
        help="the exponents that stay; default: 1 1.25 1.5 2 3",
    )
    add("--keep", choices=("phi", "theta"), nargs="*", default=["phi", "theta"], help="adaptive")
    add("--start", type=at_least(1.0), default=1.25, help="α of the adaptive ones; default: 1.25")
    add("--alpha-max", type=at_least(1.0), help="the highest they go; default: pp.AdaptiveAlpha's")
    add("--period", type=at_least(1), default=3, help="epochs between changes; default: 3")
    add("--epsilon", type=above_zero, default=1e-3, help="|θ| below it is small; default: 0.001")
    add("--epochs", type=at_least(1), help="default: 18")
    add("--lr", type=above_zero, default=0.1, help="default: 0.1")
    add("--momentum", type=at_least(0.0), default=0.9, help="default: 0.9")
    add("--rule", choices=("chain", "virtual"), default="chain", help="default: chain")
    add("--batch-size", type=at_least(1), default=128)
    add_common(parser, "MNIST/raw", Path("out/adaptive_alpha"), "few images and epochs")
    options = parser.parse_args(arguments)
    check_once(parser, alpha=options.alpha, keep=options.keep, seeds=options.seeds)
    if options.epochs is None:
        options.epochs = QUICK["epochs"] if options.quick else 18
    if not options.alpha and not options.keep:
        parser.error("there is nothing to train: --alpha and --keep are both empty")
    if options.keep and options.start == 1:
        parser.error("--start must be above 1: from 1 a geometric rise leads nowhere, got 1")
    if options.alpha_max is not None and options.alpha_max < options.start:
        parser.error(
            f"--alpha-max must be at least --start, got {options.alpha_max:g} and {options.start:g}"
        )
    return options


def networks_of(options: argparse.Namespace) -> list[Network]:
    adaptive = [Network(options.start, keep) for keep in options.keep]
    return [Network(alpha) for alpha in options.alpha] + adaptive


# ---- training


@dataclass
class Epoch:
    """What an epoch ended with, before α changed."""

    alpha: float
    small: float  # the share of |θ| < ε
    accuracy: float


def train(
    network: Network,
    seed: int,
    data: digits.Digits,
    options: argparse.Namespace,
    progress: Progress,
) -> tuple[nn.Module, list[Epoch]]:
    """One network, and what its epochs ended with."""
    (bar,) = progress.task_ids
    torch.manual_seed(seed)
    model = pp.powerize(mlp(784, 256, 10), network.alpha)
    optimizer = pp.optim.PowerSGD(
        model, lr=options.lr, momentum=options.momentum, rule=options.rule
    )
    controller = None
    if network.keep is not None:
        bound = {} if options.alpha_max is None else {"alpha_max": options.alpha_max}
        controller = pp.AdaptiveAlpha(
            model,
            options.epsilon,
            period=options.period,
            keep=network.keep,
            optimizer=optimizer,
            **bound,
        )
    shuffle = torch.Generator().manual_seed(seed)

    epochs: list[Epoch] = []
    for epoch in range(1, options.epochs + 1):
        if controller is not None:
            controller.step()  # before the epoch, so that every change is trained with
        order = torch.randperm(len(data.train_labels), generator=shuffle)
        loss_sum = 0.0
        for rows in order.split(options.batch_size):
            loss = F.cross_entropy(model(data.train_images[rows]), data.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item() * len(rows)
            progress.update(bar, advance=1)
        alpha = next(iter(powered_layers(model).values())).alpha.item()
        mean_loss = loss_sum / len(order)
        if not math.isfinite(mean_loss):
            raise SystemExit(
                f"adaptive_alpha.py: {network.name}, seed {seed} diverged in epoch {epoch} with "
                f"α = {alpha:g}: the loss is {mean_loss}; try a lower --lr than {options.lr:g}"
                + ("" if network.keep is None else f", or a lower --alpha-max than {alpha:g}")
            )
        small = share_below(model, options.epsilon)
        epochs.append(Epoch(alpha, small, accuracy(model, data.test_images, data.test_labels)))
        state = f"α {alpha:.3g}, loss {mean_loss:.4f}, {small:.0%} small"
        name = f"{network.name}, seed {seed}, epoch {epoch}/{options.epochs}"
        progress.update(bar, description=name, state=state)
    return model, epochs


# ---- measuring


@dataclass(frozen=True)
class Run:
    """What is known of one trained network."""

    network: str
    seed: int
    epochs: list[Epoch]
    pruned: list[float]  # the accuracy at each of KEPT
    theta: dict[str, np.ndarray] = field(repr=False)  # by layer, one row of numbers


def share_below(model: nn.Module, epsilon: float) -> float:
    """The share of |θ| < ε among the weights of all powered layers."""
    layers = pp.statistics(thetas(model), [epsilon]).values()
    return pp.Statistics.combined(layers).share_below(epsilon)


def measure(
    network: Network, seed: int, model: nn.Module, epochs: list[Epoch], data: digits.Digits
) -> Run:
    test = (data.test_images, data.test_labels)
    pruned = [accuracy(prune(model, kept), *test) for kept in KEPT]
    theta = {name: own.flatten().numpy() for name, own in thetas(model).items()}
    return Run(network.name, seed, epochs, pruned, theta)


# ---- tables and pictures


def show(runs: Sequence[Run], options: argparse.Namespace, console: Console) -> None:
    """A table of what training ended with, and one of what pruning leaves."""
    test = "Validation" if options.validate else "Test"
    trained = Table(title=f"After {options.epochs} epochs", box=box.SIMPLE_HEAD)
    pruned = Table(
        title=f"{test} accuracy, %, pruned once to so many %",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    for table in (trained, pruned):
        table.add_column("", no_wrap=True)
    for heading in ("α", f"{test.lower()} accuracy, %", f"|θ| < {options.epsilon:g}, %"):
        trained.add_column(heading, justify="right")
    places = range(len(KEPT) - 2, -1, -1)
    for place in places:
        pruned.add_column(f"{100 * KEPT[place]:g}", justify="right")
    for name, group in by_network(runs).items():
        ends = [run.epochs[-1] for run in group]
        alphas = sorted({f"{end.alpha:.3g}" for end in ends})
        trained.add_row(
            name,
            " ".join(alphas),
            report.percent(end.accuracy for end in ends),
            report.percent(end.small for end in ends),
        )
        cells = [report.percent((run.pruned[p] for run in group), digits=1) for p in places]
        pruned.add_row(name, *cells)
    console.print(trained)
    console.print(pruned)


def by_network(runs: Sequence[Run]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.network, []).append(run)
    return groups


def save(runs: Sequence[Run], options: argparse.Namespace, source: str) -> list[Path]:
    """The numbers as JSON and three pictures; returns where they lie."""
    names = ("results.json", "epochs.png", "histograms.png", "pruning.png")
    paths = [options.out / name for name in names]
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "out")}
    numbers = [
        {"network": r.network, "seed": r.seed, "pruned": r.pruned}
        | {"epochs": [asdict(epoch) for epoch in r.epochs]}
        for r in runs
    ]
    results = {"settings": settings | {"data": source}, "kept": KEPT, "runs": numbers}
    paths[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    groups = by_network(runs)
    adaptive = [network.name for network in networks_of(options) if network.keep is not None]
    tested_on = "the validation images" if options.validate else "the test images"
    panels = {
        "alpha": "α",
        "small": f"share of |θ| < {options.epsilon:g}, %",
        "accuracy": f"accuracy on {tested_on}, %",
    }
    epochs = {name: [run.epochs for run in group] for name, group in groups.items()}
    plots.over_epochs(epochs, panels, paths[1], adaptive)
    plots.theta_histograms(
        {name: group[0].theta for name, group in groups.items()}, paths[2], adaptive
    )
    curves = {name: np.array([run.pruned for run in group]) for name, group in groups.items()}
    plots.accuracy_against_kept(KEPT, curves, tested_on, paths[3], highlight=adaptive)
    return paths


# ---- main


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    start = time.perf_counter()
    console = Console(highlight=False)
    data = begin(
        "adaptive_alpha.py",
        options,
        lambda: digits.load(options.data, Path("data"), use_web=not options.quick),
    )
    if options.validate:
        data = data.with_validation()
    if options.quick:
        data = data.first(QUICK["train"], QUICK["test"])
    report.introduce(data, console)

    runs = train_all(data, options, console)
    show(runs, options, console)
    paths = save(runs, options, data.source)
    report.end(start, paths, console)


def train_all(data: digits.Digits, options: argparse.Namespace, console: Console) -> list[Run]:
    """A run for every network and seed."""
    networks = networks_of(options)
    runs: list[Run] = []
    batches = -(-len(data.train_labels) // options.batch_size)
    total = len(networks) * len(options.seeds) * options.epochs * batches
    with report.progress(console) as progress:
        progress.add_task("", total=total, state="")
        for network in networks:
            for seed in options.seeds:
                model, epochs = train(network, seed, data, options, progress)
                runs.append(measure(network, seed, model, epochs, data))
                console.print(
                    f"{network.name}, seed {seed}: accuracy {epochs[-1].accuracy:.2%}, "
                    f"{epochs[-1].small:.1%} of |θ| < {options.epsilon:g}"
                )
    return runs


if __name__ == "__main__":
    main()
