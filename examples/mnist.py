"""Train on MNIST at several exponents α, prune by |θ|, and show what happened.

    python examples/mnist.py                              # one hidden layer, α = 1, 1.5 and 2
    python examples/mnist.py --model cnn --alpha 1 1.5 --seeds 0 1 2
    python examples/mnist.py --optimizer adam --epochs 5  # φ is stored, torch.optim.Adam steps it

The file reads in the order of the work: options, models, training, pruning, measuring, main. Beside
it, digits.py finds the data, report.py prints the tables and plots.py draws the pictures.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import digits
import numpy as np
import report
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import ppkernels as pp

QUICK = {"epochs": 10, "train": 1_000, "test": 500}

# ---- options


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default that depends on another option is filled in."""
    parser = argparse.ArgumentParser(
        description="Train on MNIST at several exponents, prune by magnitude, draw the result.",
        epilog="sgd, adamw: layers store theta and pp.optim.PowerSGD or PowerAdamW takes the "
        "powered step, by either rule. adam: layers store phi and torch.optim.Adam steps it, which "
        "is the chain rule. "
        "Default rates: "
        + ", ".join(f"{name} {recipe.lr:g}" for name, recipe in RECIPES.items())
        + f" with sgd; adamw {Recipe.adamw_lr:g}, adam {Recipe.adam_lr:g}.",
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="mlp1", help="784-256-10, 784-300-100-10, or a CNN")
    add("--alpha", type=_at_least(1.0), nargs="+", default=[1.0, 1.5, 2.0], help="exponents >= 1")
    add("--epochs", type=_at_least(1), help="default: 15, the CNN 10")
    add("--optimizer", choices=("sgd", "adamw", "adam"), default="sgd", help="see below")
    add("--rule", choices=("virtual", "chain"), help="default: chain; of adamw virtual")
    add("--lr", type=_above_zero, help="at the start, falls to 0 as a cosine; default: below")
    add("--momentum", type=_at_least(0.0), help="of sgd; default: 0.9")
    add("--batch-size", type=_at_least(1), default=128)
    add("--seeds", type=_at_least(0), nargs="+", default=[0], help="several give mean ± std")
    add("--data", type=Path, metavar="DIR", help="a folder that holds MNIST/raw; default: download")
    add("--out", type=Path, metavar="DIR", default=Path("out/mnist"), help="default: out/mnist")
    add("--validate", action="store_true", help="test on a part of the training images instead")
    add("--quick", action="store_true", help="seconds: few images and epochs, and no download")
    add(
        "--threads",
        type=_at_least(1),
        default=1,
        help="default: 1; another number rounds otherwise",
    )
    options = parser.parse_args(arguments)

    if options.optimizer == "adam" and options.rule == "virtual":
        parser.error(
            "--rule virtual needs --optimizer sgd or adamw: torch's Adam steps phi by the chain "
            "rule"
        )
    if options.optimizer != "sgd" and options.momentum is not None:
        parser.error("--momentum is an option of --optimizer sgd; adam has betas of its own")
    if len(set(options.alpha)) < len(options.alpha) or len(set(options.seeds)) < len(options.seeds):
        parser.error("--alpha and --seeds must not name a value twice")
    recipe = RECIPES[options.model]
    if options.rule is None:
        options.rule = "virtual" if options.optimizer == "adamw" else "chain"
    if options.momentum is None and options.optimizer == "sgd":
        options.momentum = 0.9
    if options.lr is None:
        rates = {"sgd": recipe.lr, "adamw": recipe.adamw_lr, "adam": recipe.adam_lr}
        options.lr = rates[options.optimizer]
    if options.epochs is None:
        options.epochs = QUICK["epochs"] if options.quick else recipe.epochs
    return options


def _at_least(least: float) -> Callable[[str], float]:
    kind = type(least)

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a number >= {least}, got {text}")
        return value

    number.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return number


def _above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text}")
    return value


# ---- models: plain PyTorch; pp.powerize turns their layers into powered ones


def mlp1() -> nn.Module:
    return nn.Sequential(
        OrderedDict(hidden=nn.Linear(784, 256), relu=nn.ReLU(), output=nn.Linear(256, 10))
    )


def mlp3() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            hidden1=nn.Linear(784, 300),
            relu1=nn.ReLU(),
            hidden2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            output=nn.Linear(100, 10),
        )
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            image=nn.Unflatten(1, (1, 28, 28)),
            conv1=nn.Conv2d(1, 16, 5),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, 5),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            row=nn.Flatten(),
            hidden=nn.Linear(512, 128),
            relu3=nn.ReLU(),
            output=nn.Linear(128, 10),
        )
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp1": mlp1, "mlp3": mlp3, "cnn": cnn}


@dataclass(frozen=True)
class Recipe:
    """Settings that serve α from 1 to 4, but for sgd with the CNN from 1 to 2: at 4 it needs less.

    Chosen with --validate, never on the test set.
    """

    epochs: int
    lr: float
    adamw_lr: float = 3e-3
    adam_lr: float = 1e-3


RECIPES = {
    "mlp1": Recipe(epochs=15, lr=0.2),
    "mlp3": Recipe(epochs=15, lr=0.1),
    "cnn": Recipe(epochs=10, lr=0.2),
}


# ---- training


def make_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    if options.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=options.lr)
    if options.optimizer == "adamw":
        return pp.optim.PowerAdamW(model, lr=options.lr, rule=options.rule)
    return pp.optim.PowerSGD(model, lr=options.lr, momentum=options.momentum, rule=options.rule)


def train(
    alpha: float, seed: int, data: digits.Digits, options: argparse.Namespace, progress: Progress
) -> nn.Module:
    """One network from its initialisation to its last epoch; the same seed gives the same bits."""
    (bar,) = progress.task_ids
    torch.manual_seed(seed)
    model = MODELS[options.model]()
    pp.powerize(model, alpha, stores="phi" if options.optimizer == "adam" else "theta")
    optimizer = make_optimizer(model, options)
    batches = -(-len(data.train_labels) // options.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * batches)
    # Of its own, so that the order of the images does not depend on how a model draws its weights.
    shuffle = torch.Generator().manual_seed(seed)

    for epoch in range(1, options.epochs + 1):
        name = f"α = {alpha:g}, seed {seed}, epoch {epoch}/{options.epochs}"
        order = torch.randperm(len(data.train_labels), generator=shuffle)
        loss_sum = right = seen = 0.0
        for rows in order.split(options.batch_size):
            logits, labels = model(data.train_images[rows]), data.train_labels[rows]
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item() * len(rows)
            right += (logits.argmax(1) == labels).sum().item()
            seen += len(rows)
            state = f"loss {loss_sum / seen:.4f}, {right / seen:.1%} right"
            progress.update(bar, advance=1, description=name, state=state)
        if not math.isfinite(loss_sum):
            raise SystemExit(
                f"mnist.py: α = {alpha:g}, seed {seed} diverged in epoch {epoch}: the loss is "
                f"{loss_sum}; try a lower --lr than {options.lr:g}"
                + (", or --rule chain" if options.rule == "virtual" else "")
            )
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: digits.Digits) -> float:
    """The share of the test images that ``model`` gets right."""
    pairs = zip(data.test_images.split(2_000), data.test_labels.split(2_000), strict=True)
    right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in pairs)
    return right / len(data.test_labels)


# ---- pruning


def thetas(model: nn.Module) -> dict[str, Tensor]:
    """θ of every powered layer by name, whatever the layer stores."""
    return {
        name: layer.theta.detach()
        for name, layer in model.named_modules()
        if isinstance(layer, pp.nn.Powered)
    }


def prune(model: nn.Module, kept: float) -> nn.Module:
    """A plain copy of ``model`` with only the largest |θ| of the whole network, the others 0.

    Exactly round(kept · number of weights) stay; of equals, the earlier. Biases stay.
    """
    names = list(thetas(model))
    pruned = pp.fold(copy.deepcopy(model))
    weights = [pruned.get_submodule(name).weight.detach() for name in names]
    magnitudes = torch.cat([weight.abs().flatten() for weight in weights])
    largest_first = magnitudes.argsort(descending=True, stable=True)
    is_kept = torch.zeros_like(magnitudes)
    is_kept[largest_first[: round(kept * len(magnitudes))]] = 1
    for weight, mask in zip(weights, is_kept.split([w.numel() for w in weights]), strict=True):
        weight.mul_(mask.view_as(weight))
    return pruned


# ---- what is measured of a trained network


def measure(alpha: float, seed: int, model: nn.Module, data: digits.Digits) -> report.Run:
    layers = {name: theta.abs().flatten() for name, theta in thetas(model).items()}
    layers["all"] = torch.cat(list(layers.values()))
    small = {
        name: [(magnitudes < limit).float().mean().item() for limit in report.SMALL]
        for name, magnitudes in layers.items()
    }
    pruned = [accuracy(prune(model, kept), data) for kept in report.KEPT]
    return report.Run(alpha, seed, accuracy(model, data), small, pruned)


# ---- main


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    start = time.perf_counter()
    console = Console(highlight=False)
    # One by default: batches this small gain little from a second thread, and lose a factor of 20
    # to waiting threads while another program keeps the processor busy.
    torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        data = digits.load(options.data, Path("data"), use_web=not options.quick)
    except (digits.DataError, OSError) as error:
        raise SystemExit(f"mnist.py: {error}") from error
    if options.validate:
        data = data.with_validation()
    if options.quick:
        data = data.first(QUICK["train"], QUICK["test"])
    stores = "φ, stepped by torch.optim.Adam (chain rule)"
    if options.optimizer != "adam":
        name = "PowerSGD" if options.optimizer == "sgd" else "PowerAdamW"
        stores = f"θ, stepped by pp.optim.{name} ({options.rule} rule)"
    console.print(f"Data: {data.source}")
    console.print(f"{len(data.train_labels):,} images to train, {len(data.test_labels):,} to test")
    console.print(f"Model: {options.model}; its layers store {stores}")

    runs, weights = train_all(data, options, console)
    report.show(runs, console)
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "out")}
    paths = report.save(runs, weights, settings | {"data": data.source}, options.out)
    console.print(f"Done in {time.perf_counter() - start:.0f} s. The numbers and the pictures:")
    for path in paths:
        console.print(f"  {path.resolve()}", soft_wrap=True)


def train_all(
    data: digits.Digits, options: argparse.Namespace, console: Console
) -> tuple[list[report.Run], dict[float, dict[str, np.ndarray]]]:
    """A run for every α and seed; with them, for the histograms, θ of each α's first seed."""
    runs: list[report.Run] = []
    weights: dict[float, dict[str, np.ndarray]] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[state]}"),
        TimeRemainingColumn(),
    )
    batches = -(-len(data.train_labels) // options.batch_size)
    total = len(options.alpha) * len(options.seeds) * options.epochs * batches
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task("", total=total, state="")
        for alpha in options.alpha:
            for seed in options.seeds:
                start = time.perf_counter()
                model = train(alpha, seed, data, options, progress)
                seconds = time.perf_counter() - start
                runs.append(measure(alpha, seed, model, data))
                if alpha not in weights:
                    weights[alpha] = {k: v.flatten().numpy() for k, v in thetas(model).items()}
                console.print(
                    f"α = {alpha:g}, seed {seed}: test accuracy {runs[-1].accuracy:.2%}, "
                    f"trained in {seconds:.1f} s"
                )
    return runs, weights


if __name__ == "__main__":
    main()
