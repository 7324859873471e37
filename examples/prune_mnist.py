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
import copy
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
from options import above_zero, add_common, at_least, begin, check_once, share
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import ppkernels as pp

HELD_OUT = 12  # the last twelfth of the training images, 5,000 of MNIST's 60,000
QUICK = {"steps": 300, "train": 1_000, "test": 500}

# The shares that the official recipe keeps, and those of them that the table shows.
OFFICIAL_KEPT = np.geomspace(0.01, 1.0, 20)[:-1].tolist()
TABLE_KEPT = [OFFICIAL_KEPT[place] for place in (14, 12, 10, 7, 4, 3, 0)]


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
    # Exponents chosen on validation images, the rest as it was tried first.
    "gradual": Recipe((1, 2), 10_000, 128, lr=0.1, momentum=0.9, falls=True),
}

# What is pruned alike: the output layer of the official recipe keeps twice the share of the others.
DISTRIBUTIONS: dict[str, pp.sparsity.Distribution] = {
    "official": pp.sparsity.Uniform({"output": 2}),
    "gradual": pp.sparsity.Global(),
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
    add("--alpha", type=at_least(1.0), nargs="+", help="default: 1 to 5; of gradual 1 and 2")
    add("--steps", type=at_least(1), help="default: 50,000; of gradual 10,000")
    add("--batch-size", type=at_least(1), help="default: 60; of gradual 128")
    add("--lr", type=above_zero, help="default: 0.1; of gradual at the start, falls to 0")
    add("--momentum", type=at_least(0.0), help="default: 0; of gradual 0.9")
    add(
        "--init",
        choices=("official", "torch"),
        default="official",
        help="truncated normal, of variance 1 / inputs, or what nn.Linear draws, a third of it",
    )
    add("--rule", choices=("chain", "virtual"), default="chain", help="default: chain")
    add(
        "--kept", type=share, nargs="+", help="the shares left in the end; default: 0.05 0.02 0.005"
    )
    add("--begin", type=share, help="pruning begins after this share of the steps; default: 0.1")
    add("--end", type=share, help="and ends after this one; default: 0.7")
    add("--every", type=at_least(1), help="steps from one pruning to the next; default: 50")
    add_common(parser, "MNIST/raw", Path("out/prune_mnist"), "few images and steps")
    options = parser.parse_args(arguments)

    gradual = {"kept": [0.05, 0.02, 0.005], "begin": 0.1, "end": 0.7, "every": 50}
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
    if options.kept and max(options.kept) == 1:
        parser.error("--kept must be below 1: networks that keep all their weights come anyway")
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
    if options.init == "official":
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
        pruner = pp.sparsity.Pruner(model, schedule, distribution=DISTRIBUTIONS[options.recipe])

    rows = batches(len(data.train_labels), options.batch_size, seed)
    for step in range(1, options.steps + 1):
        batch = next(rows)
        loss = F.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
        if not math.isfinite(loss.item()):
            raise SystemExit(
                f"prune_mnist.py: {name} diverged in step {step:,}: the loss is {loss.item()}; try "
                f"a lower --lr than {options.lr:g}"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        if pruner is not None:
            pruner.step()
        if step % 100 == 0 or step == options.steps:
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


def pruned_once(model: nn.Module, kept: float, distribution: pp.sparsity.Distribution) -> nn.Module:
    """A copy of ``model`` that keeps its largest |θ|."""
    pruned = copy.deepcopy(model)
    pruner = pp.sparsity.Pruner(pruned, pp.sparsity.OneShot(kept), distribution=distribution)
    pruner.prune(kept)
    return pruned


# ---- tables and pictures


def show(runs: Sequence[Run], options: argparse.Namespace, console: Console) -> None:
    """Accuracy with each share kept, a column for each α."""
    rows: dict[str, tuple[float, float]] = {"all": (1.0, 1.0)}  # trained to, kept of that
    if options.recipe == "official":
        rows |= {f"{100 * kept:.3g} % of each layer": (1.0, kept) for kept in TABLE_KEPT}
    else:
        for kept in options.kept:
            rows[f"{100 * kept:g} %, pruned once"] = (1.0, kept)
            rows[f"{100 * kept:g} %, gradually"] = (kept, 1.0)
    test = "Validation" if options.validate else "Test"
    table = Table(title=f"{test} accuracy, %", box=box.SIMPLE_HEAD)
    table.add_column("weights kept", no_wrap=True)
    for alpha in options.alpha:
        table.add_column(f"α = {alpha:g}", justify="right")
    for name, place in rows.items():
        cells = [report.percent(accuracies(runs, alpha, *place)) for alpha in options.alpha]
        table.add_row(name, *cells)
    console.print(table)


def accuracies(runs: Sequence[Run], alpha: float, trained_to: float, kept: float) -> list[float]:
    """Those of all seeds."""
    return [
        run.accuracies[run.kept.index(kept)]
        for run in runs
        if (run.alpha, run.trained_to) == (alpha, trained_to)
    ]


def draw(runs: Sequence[Run], options: argparse.Namespace, path: Path) -> None:
    """Accuracy against the share kept; of the gradual recipe, also that of the dense networks."""
    kept = sorted({*(options.kept or OFFICIAL_KEPT), 1.0})
    once = {
        f"α = {alpha:g}": np.array([accuracies(runs, alpha, 1.0, own) for own in kept]).T
        for alpha in options.alpha
    }
    tested_on = "the validation images" if options.validate else "the test images"
    if options.recipe == "official":
        plots.accuracy_against_kept(kept, once, tested_on, path, largest_of="each layer")
        return
    gradual = {
        f"α = {alpha:g}": np.array([accuracies(runs, alpha, own, 1.0) for own in kept]).T
        for alpha in options.alpha
    }
    plots.accuracy_against_kept(
        kept,
        gradual,
        tested_on,
        path,
        title="Pruned while it trains, and once afterwards",
        dashed=once,
        dashed_as="once",
    )


# ---- main


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    start = time.perf_counter()
    console = Console(highlight=False)
    data = begin(
        "prune_mnist.py",
        options,
        lambda: digits.load(options.data, Path("data"), use_web=not options.quick),
    )
    data = data.with_validation(HELD_OUT) if options.validate else data.without_last(HELD_OUT)
    if options.quick:
        data = data.first(QUICK["train"], QUICK["test"])
    report.introduce(data, console)

    runs = train_all(data, options, console)
    show(runs, options, console)
    paths = [options.out / name for name in ("results.json", "pruning.png")]
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "out")}
    results = {"settings": settings | {"data": data.source}, "runs": [asdict(run) for run in runs]}
    paths[0].write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    draw(runs, options, paths[1])
    report.end(start, paths, console)


def train_all(data: digits.Digits, options: argparse.Namespace, console: Console) -> list[Run]:
    """A run for every α, seed and, with the gradual recipe, share to prune to; 1 is dense."""
    targets = [1.0, *(options.kept or [])]
    runs: list[Run] = []
    total = len(options.alpha) * len(options.seeds) * len(targets) * options.steps
    with report.progress(console) as progress:
        progress.add_task("", total=total, state="")
        for alpha in options.alpha:
            for seed in options.seeds:
                for kept in targets:
                    model = train(alpha, seed, kept, data, options, progress)
                    runs.append(measure(alpha, seed, kept, model, data, options))
                    way = "dense" if kept == 1 else f"{kept:g} kept"
                    console.print(
                        f"α = {alpha:g}, seed {seed}, {way}: accuracy {runs[-1].accuracies[0]:.2%}"
                    )
    return runs


if __name__ == "__main__":
    main()
