"""Prune 784-300-100-10 on MNIST, powered against plain: once after training, or step by step.

    python examples/prune_mnist.py --seeds 0 1 2                    # the paper's official recipe
    python examples/prune_mnist.py --recipe gradual --seeds 0 1 2   # pruned while it trains

`official` trains with plain SGD, then keeps the largest |θ| of each layer, once, with no training
afterwards. `gradual` prunes while the network trains, a little at a time, and goes on training what
is left. Both train on all but the last twelfth of the training images, which --validate tests on.

The file reads in the order of the work: options, training, measuring, tables, main. Beside it,
digits.py finds the data, networks.py makes the network, plots.py draws.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import digits
import numpy as np
import plots
import report
import torch
import torch.nn.functional as F
from networks import accuracy, mlp, powered_layers
from options import above_zero, add_common, at_least, check_once, share
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import ppkernels as pp

HELD_OUT = 12  # the last twelfth of the training images, 5,000 of MNIST's 60,000
QUICK = {"steps": 300, "train": 1_000, "test": 500}

# The shares that the official recipe keeps, and those of them that the table shows.
OFFICIAL_KEPT = (*np.geomspace(0.01, 1.0, 20).tolist()[:-1], 1.0)
TABLE_KEPT = tuple(OFFICIAL_KEPT[place] for place in (19, 14, 12, 10, 7, 4, 3, 0))


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, and at which exponents."""

    alphas: tuple[float, ...]
    steps: int
    batch_size: int
    lr: float
    momentum: float
    falls: bool  # the rate, to 0 as a cosine


RECIPES = {
    # That of the notebook published with the paper.
    "official": Recipe((1, 2, 3, 4, 5), 50_000, 60, lr=0.1, momentum=0.0, falls=False),
    # Chosen with --validate, never on the test set.
    "gradual": Recipe((1, 2, 3), 10_000, 128, lr=0.1, momentum=0.9, falls=True),
}

# ---- options


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default that depends on another option is filled in."""
    parser = argparse.ArgumentParser(
        description="Prune 784-300-100-10 on MNIST, powered against plain.",
        epilog="--kept, --begin, --end and --every are options of --recipe gradual.",
    )
    add = parser.add_argument
    add("--recipe", choices=RECIPES, default="official", help="default: official")
    add("--alpha", type=at_least(1.0), nargs="+", help="default: 1 to 5; of gradual 1, 2 and 3")
    add("--steps", type=at_least(1), help="default: 50,000; of gradual 10,000")
    add("--batch-size", type=at_least(1), help="default: 60; of gradual 128")
    add("--lr", type=above_zero, help="default: 0.1; of gradual at the start, falls to 0")
    add("--momentum", type=at_least(0.0), help="default: 0; of gradual 0.9")
    add("--rule", choices=("chain", "virtual"), default="chain", help="default: chain")
    add("--kept", type=share, nargs="+", help="the shares left in the end; default: 0.05 0.02")
    add("--begin", type=share, help="pruning begins after this share of the steps; default: 0.1")
    add("--end", type=share, help="and ends after this one; default: 0.7")
    add("--every", type=at_least(1), help="steps from one pruning to the next; default: 50")
    add_common(parser, "MNIST/raw", Path("out/prune_mnist"), "few images and steps")
    options = parser.parse_args(arguments)

    gradual = {"kept": [0.05, 0.02], "begin": 0.1, "end": 0.7, "every": 50}
    for name, default in gradual.items():
        if options.recipe != "gradual" and getattr(options, name) is not None:
            parser.error(f"--{name} is an option of --recipe gradual")
        if options.recipe == "gradual" and getattr(options, name) is None:
            setattr(options, name, default)
    recipe = RECIPES[options.recipe]
    if options.alpha is None:
        options.alpha = [float(alpha) for alpha in recipe.alphas]
    if options.steps is None:
        options.steps = QUICK["steps"] if options.quick else recipe.steps
    for name in ("batch_size", "lr", "momentum"):
        if getattr(options, name) is None:
            setattr(options, name, getattr(recipe, name))
    check_once(parser, alpha=options.alpha, seeds=options.seeds, kept=options.kept or [])
    if options.recipe == "gradual" and not begin_and_end(options)[0] < begin_and_end(options)[1]:
        parser.error(f"--begin must lie before --end, got {options.begin:g} and {options.end:g}")
    return options


def begin_and_end(options: argparse.Namespace) -> tuple[int, int]:
    """The steps at which gradual pruning begins and ends."""
    return round(options.begin * options.steps), round(options.end * options.steps)


# ---- training


def train(
    alpha: float,
    seed: int,
    kept: float,
    data: digits.Digits,
    options: argparse.Namespace,
    progress: Progress,
) -> nn.Module:
    """One network, gradually pruned on its way if ``kept`` is below 1."""
    (bar,) = progress.task_ids
    name = f"α = {alpha:g}, seed {seed}" + (f", {kept:.1%} kept" if kept < 1 else "")
    torch.manual_seed(seed)
    model = pp.powerize(mlp(784, 300, 100, 10), alpha)
    for layer in powered_layers(model).values():
        pp.nn.init.truncated_normal_(layer)
    optimizer = pp.optim.PowerSGD(
        model, lr=options.lr, momentum=options.momentum, rule=options.rule
    )
    falls = RECIPES[options.recipe].falls
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (1 + math.cos(math.pi * step / options.steps)) / 2 if falls else 1.0,
    )
    pruner = None
    if kept < 1:
        begin, end = begin_and_end(options)
        schedule = pp.sparsity.Cubic(kept, begin, end, options.every)
        pruner = pp.sparsity.Pruner(model, schedule, distribution=pp.sparsity.Global())

    rows = batches(len(data.train_labels), options.batch_size, seed)
    for step in range(1, options.steps + 1):
        batch = next(rows)
        loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if pruner is not None:
            pruner.step()
        if step % 100 == 0 or step == options.steps:
            if not math.isfinite(loss.item()):
                raise SystemExit(
                    f"prune_mnist.py: α = {alpha:g}, seed {seed} diverged before step {step:,}: "
                    f"the loss is {loss.item()}; try a lower --lr than {options.lr:g}"
                )
            state = f"step {step:,}, loss {loss.item():.4f}"
            progress.update(bar, advance=(step - 1) % 100 + 1, description=name, state=state)
    return model


def batches(images: int, size: int, seed: int) -> Iterator[Tensor]:
    """Numbers of images, ``size`` at a time, epoch after epoch without end; rests are left out."""
    size = min(size, images)
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(images, generator=generator)
        yield from order[: images - images % size].split(size)


# ---- measuring


@dataclass(frozen=True)
class Run:
    """What is known of one trained network."""

    alpha: float
    seed: int
    trained_to: float  # the share of the weights that pruning in training has left; 1 without
    layers: dict[str, int]  # by layer, how many weights that is
    kept: list[float]  # the shares that were kept of it afterwards, once; the first is 1
    accuracies: list[float]  # the accuracy with each


def measure(
    alpha: float,
    seed: int,
    trained_to: float,
    model: nn.Module,
    data: digits.Digits,
    options: argparse.Namespace,
) -> Run:
    """Test the network, and where it is dense also copies of it that are pruned once."""
    kept = [1.0]
    if trained_to == 1:
        kept += options.kept or OFFICIAL_KEPT
    distribution = DISTRIBUTIONS[options.recipe]
    test = (data.test_images, data.test_labels)
    return Run(
        alpha,
        seed,
        trained_to,
        {name: int(layer.weight.count_nonzero()) for name, layer in powered_layers(model).items()},
        kept,
        [accuracy(pruned_once(model, own, distribution), *test) for own in kept],
    )


def pruned_once(
    model: nn.Module, kept: float, distribution: pp.sparsity.Distribution
) -> nn.Module:
    """A copy of ``model`` that keeps its largest |θ|."""
    pruned = copy.deepcopy(model)
    pruner = pp.sparsity.Pruner(pruned, pp.sparsity.OneShot(kept), distribution=distribution)
    pruner.prune(kept)
    return pruned


# ---- tables and pictures


def show(runs: Sequence[Run], options: argparse.Namespace, console: Console) -> None:
    """Accuracy against the share kept, a row for each α."""
    test = "Validation" if options.validate else "Test"
    columns: dict[str, tuple[float, float]] = {"dense": (1.0, 1.0)}  # trained to, kept of it
    if options.recipe == "official":
        title = f"{test} accuracy, %: trained, and pruned once to so much of each layer"
        columns |= {f"{kept:.3g}%".replace("0.", "."): (1.0, kept) for kept in TABLE_KEPT}
    else:
        title = f"{test} accuracy, %: dense, and pruned once or gradually to so much"
        for kept in options.kept:
            columns |= {f"{kept:.3g}, once": (1.0, kept), f"{kept:.3g}, gradual": (kept, 1.0)}
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True)
    for heading in ("α", *columns):
        table.add_column(heading, justify="right")
    for alpha in options.alpha:
        cells = [report.percent(accuracies(runs, alpha, *place)) for place in columns.values()]
        table.add_row(f"{alpha:g}", *cells)
    console.print(table)


def accuracies(runs: Sequence[Run], alpha: float, trained_to: float, kept: float) -> list[float]:
    """Those of all seeds."""
    return [
        run.accuracies[run.kept.index(kept)]
        for run in runs
        if (run.alpha, run.trained_to) == (alpha, trained_to)
    ]


