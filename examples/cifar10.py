"""Train on CIFAR-10 at several exponents α, fixed or adaptive, prune, and show what happened.
Longer than 350 lines: it is read from top to bottom, in the order of the work.

    python examples/cifar10.py                                    # five layers, α = 1 and 1.25
    python examples/cifar10.py --alpha 1 1.25 1.5 --seeds 0 1 2
    python examples/cifar10.py --alpha adaptive --period 1        # α changes before each epoch
    python examples/cifar10.py --prune gradual --kept 0.1 0.05    # one network for each share
    python examples/cifar10.py --model resnet18 --epochs 30       # for a GPU

The file reads in the order of the work: options, networks, training, pruning, measuring, main.
Beside it, images.py finds the data and makes batches, networks.py prunes and evens out the rates,
findings.py prints the tables and plots.py draws.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import findings
import images
import numpy as np
import report
import torch
import torch.nn.functional as F
import torchvision
from networks import accuracy, evened, prune, thetas
from options import above_zero, add_common, at_least, begin, check_once, share
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import ppkernels as pp

QUICK = {"epochs": 2, "train": 1_000, "test": 500}
ADAPTIVE = "adaptive"

# That of sgd served best with --validate, at α = 1 and 1.5; the others are those of mnist.py.
RATES = {"sgd": 0.05, "adamw": 3e-3, "adam": 1e-3}

# The rate rises over this share of the steps, and falls to 0 as a cosine over all of them.
WARM_UP = 0.1

# As many batches tell a pruned network its BatchNorm statistics.
REESTIMATION_BATCHES = 30

# ---- options


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default that depends on another option is filled in."""
    parser = argparse.ArgumentParser(
        description="Train on CIFAR-10 at several exponents, prune by magnitude, draw the result.",
        epilog="sgd, adamw: layers store theta and pp.optim.PowerSGD or PowerAdamW takes the "
        "powered step, by either rule. adam: layers store phi and torch.optim.Adam steps it, which "
        "is the chain rule. Default rates: "
        + ", ".join(f"{name} {rate:g}" for name, rate in RATES.items())
        + "; with sgd, that of a powered weight is divided by the mean of its (dθ/dφ)² at the "
        "start.",
    )
    add = parser.add_argument
    add("--model", choices=MODELS, default="five-layer", help="three convolutions and two linear")
    add("--no-norm", action="store_true", help="five-layer without BatchNorm")
    add("--alpha", type=_alpha, nargs="+", default=[1.0, 1.25], help="exponents >= 1, or adaptive")
    add("--epochs", type=at_least(1), default=8, help="default: 8")
    add("--optimizer", choices=("sgd", "adamw", "adam"), default="sgd", help="see below")
    add("--rule", choices=("virtual", "chain"), help="default: chain; of adamw virtual")
    add("--lr", type=above_zero, help="the highest; default: below")
    add("--momentum", type=at_least(0.0), help="of sgd; default: 0.9")
    add("--batch-size", type=at_least(2), default=128)
    add(
        "--device", type=torch.device, default=_best_device(), help="default: a GPU if there is one"
    )
    add("--bfloat16", action="store_true", help="forward and backward with torch.autocast")
    add("--cache", type=Path, metavar="FILE", default=Path("out/cifar10-images.pt"))
    add_common(
        parser,
        "cifar-10-batches-py, or train/<class>/*.jpg and test/<class>/*.jpg",
        Path("out/cifar10"),
        "few images and epochs",
    )
    _add_pruning(parser.add_argument_group("pruning, by magnitude in the whole network"))
    _add_adaptive(parser.add_argument_group("adaptive alpha, with sgd or adamw"))
    options = parser.parse_args(arguments)
    _check(parser, options)
    _fill_in(options)
    return options


def _add_pruning(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--prune",
        choices=("one-shot", "gradual", "none"),
        default="one-shot",
        help="after training; or during it, which trains a network for each share",
    )
    add("--kept", type=share, nargs="+", help="shares of the weights")
    add("--schedule", choices=SCHEDULES, default="cubic", help="of gradual pruning")
    add("--begin", type=share, default=0.25, help="of gradual pruning, as a share of the steps")
    add("--end", type=share, default=0.75, help="its end")
    add("--every", type=at_least(1), default=50, help="steps from one pruning to the next")
    add(
        "--no-reestimate",
        action="store_true",
        help="do not show one-shot pruning with BatchNorm statistics estimated anew as well",
    )


def _add_adaptive(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--start", type=at_least(1.0), default=1.25, help="alpha at the start")
    add("--period", type=at_least(1), default=3, help="epochs from one change to the next")
    add("--epsilon", type=above_zero, default=1e-3, help="sparsity is the share of |θ| below it")
    add("--keep", choices=("phi", "theta"), default="phi", help="what a change leaves as it is")
    add("--alpha-max", type=at_least(1.0), default=3.0)


def _alpha(text: str) -> float | str:
    return ADAPTIVE if text == ADAPTIVE else at_least(1.0)(text)


_alpha.__name__ = "float"  # argparse names it where the text is neither


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.optimizer == "adam" and options.rule == "virtual":
        parser.error(
            "--rule virtual needs --optimizer sgd or adamw: torch's Adam steps phi by the chain "
            "rule"
        )
    if options.optimizer != "sgd" and options.momentum is not None:
        parser.error("--momentum is an option of --optimizer sgd; adam has betas of its own")
    if options.no_norm and options.model != "five-layer":
        parser.error("--no-norm is an option of --model five-layer")
    if options.begin >= options.end:
        parser.error(f"--begin must be below --end, got {options.begin} and {options.end}")
    if ADAPTIVE in options.alpha and not 1 < options.start <= options.alpha_max:
        parser.error(f"--start must be above 1 and at most --alpha-max, got {options.start}")
    check_once(parser, alpha=options.alpha, seeds=options.seeds)


def _fill_in(options: argparse.Namespace) -> None:
    if options.rule is None:
        options.rule = "virtual" if options.optimizer == "adamw" else "chain"
    if options.momentum is None and options.optimizer == "sgd":
        options.momentum = 0.9
    if options.kept is None:
        options.kept = [0.1, 0.05] if options.prune == "gradual" else [0.5, 0.2, 0.1, 0.05, 0.02]
    if options.quick:
        options.epochs = min(options.epochs, QUICK["epochs"])
    if options.lr is None:
        options.lr = RATES[options.optimizer]
    options.kept = sorted(set(options.kept), reverse=True) if options.prune != "none" else []


# ---- networks: plain PyTorch; pp.powerize turns their layers into powered ones


def five_layer(classes: int, norm: bool) -> nn.Module:
    """Convolutions of 32, 64 and 64 channels, then linear layers of 256 and ``classes``."""
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    channels = (3, 32, 64, 64)
    for place in (1, 2, 3):
        before, after = channels[place - 1 : place + 1]
        steps[f"conv{place}"] = nn.Conv2d(before, after, 3, padding=1, bias=not norm)
        # The smaller image first: what comes after the pooling costs a quarter.
        steps[f"pool{place}"] = nn.MaxPool2d(2)
        if norm:
            steps[f"norm{place}"] = nn.BatchNorm2d(after)
        steps[f"relu{place}"] = nn.ReLU()
    steps["row"] = nn.Flatten()
    steps["hidden"] = nn.Linear(channels[-1] * (images.SIDE // 8) ** 2, 256)
    steps["relu4"] = nn.ReLU()
    steps["output"] = nn.Linear(256, classes)
    return nn.Sequential(steps)


def resnet18(classes: int, norm: bool) -> nn.Module:
    """torchvision's, which is for images seven times as wide, with a first layer for small ones."""
    model = torchvision.models.resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


MODELS: dict[str, Callable[[int, bool], nn.Module]] = {
    "five-layer": five_layer,
    "resnet18": resnet18,
}

# ---- training

SCHEDULES = {"cubic": pp.sparsity.Cubic, "cosine": pp.sparsity.Cosine}


@dataclass(frozen=True)
class Job:
    """One network to train: its exponent, its seed, and what gradual pruning is to leave of it."""

    alpha: float | str
    seed: int
    target: float | None

    @property
    def label(self) -> str:
        """α as tables and pictures call it."""
        return "α adaptive" if self.alpha == ADAPTIVE else f"α = {self.alpha:g}"

    @property
    def kind(self) -> str:
        """What all seeds have in common."""
        return findings.kind_of(self.label, self.target)

    def __str__(self) -> str:
        return f"{self.kind}, seed {self.seed}"


def jobs(options: argparse.Namespace) -> list[Job]:
    """The networks that ``options`` ask for."""
    targets = options.kept if options.prune == "gradual" else [None]
    return [Job(a, s, t) for a in options.alpha for t in targets for s in options.seeds]


def make_optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    if options.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=options.lr)
    if options.optimizer == "adamw":
        return pp.optim.PowerAdamW(model, lr=options.lr, rule=options.rule)
    return pp.optim.PowerSGD(
        evened(model, options.lr), options.lr, momentum=options.momentum, rule=options.rule
    )


def make_controller(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, options: argparse.Namespace
) -> pp.AdaptiveAlpha | None:
    """What changes α, for an adaptive one."""
    if job.alpha != ADAPTIVE:
        return None
    return pp.AdaptiveAlpha(
        model,
        options.epsilon,
        period=options.period,
        keep=options.keep,
        alpha_max=options.alpha_max,
        optimizer=optimizer,
    )


def make_pruner(
    job: Job, model: nn.Module, steps: int, options: argparse.Namespace
) -> pp.sparsity.Pruner | None:
    """What prunes during the training, for gradual pruning."""
    if job.target is None:
        return None
    begin, end = (round(part * steps) for part in (options.begin, options.end))
    schedule = SCHEDULES[options.schedule](job.target, begin, max(end, begin + 1), options.every)
    return pp.sparsity.Pruner(model, schedule)


def train(
    job: Job, data: images.Images, options: argparse.Namespace, progress: Progress
) -> tuple[nn.Module, list[findings.Epoch]]:
    """One network from its initialisation to its last epoch; on a CPU the same seed, same bits."""
    torch.manual_seed(job.seed)
    model = MODELS[options.model](len(data.classes), not options.no_norm)
    alpha = options.start if job.alpha == ADAPTIVE else job.alpha
    pp.powerize(model, alpha, stores="phi" if options.optimizer == "adam" else "theta")
    model.to(options.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model, options)
    controller = make_controller(job, model, optimizer, options)
    steps = options.epochs * batches_of(data, options)
    pruner = make_pruner(job, model, steps, options)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: height(step / steps))
    # Of its own, so that the images do not depend on how a model draws its weights.
    generator = torch.Generator().manual_seed(job.seed)

    epochs = []
    for epoch in range(1, options.epochs + 1):
        if controller is not None:
            controller.step()
        model.train()
        loss_sum = right = seen = 0.0
        for inputs, labels in batches(data, options, generator):
            with autocast(options):
                logits = model(inputs)
                loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            if pruner is not None:
                pruner.step()
            loss_sum += loss.item() * len(labels)
            right += (logits.argmax(1) == labels).sum().item()
            seen += len(labels)
            progress.update(
                progress.task_ids[0],
                advance=1,
                description=f"{job}, epoch {epoch}/{options.epochs}",
                state=f"loss {loss_sum / seen:.3f}, {right / seen:.1%} right",
            )
        largest = max(theta.abs().max().item() for theta in thetas(model).values())
        # ReLUs that are 0 for every image hide weights beyond all bounds from the loss.
        if not (math.isfinite(loss_sum) and math.isfinite(largest)):
            raise SystemExit(
                f"cifar10.py: {job} diverged in epoch {epoch}: the loss is {loss_sum / seen} and "
                f"the largest |θ| {largest}; try a lower --lr than {options.lr:g}"
            )
        epochs.append(findings.epoch_of(model, loss_sum / seen, options.epsilon))
    return model, epochs


def height(way: float) -> float:
    """The rate as a share of the highest, after a part of the ``way`` from 0 to 1."""
    return min(1.0, way / WARM_UP) * (1 + math.cos(math.pi * way)) / 2


def batches_of(data: images.Images, options: argparse.Namespace) -> int:
    """How many batches an epoch has. One of a single image would have no BatchNorm statistics."""
    return max(1, len(data.train_labels) // options.batch_size)


def batches(
    data: images.Images, options: argparse.Namespace, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch of inputs and labels, augmented, in a new order; an incomplete batch is left out."""
    order = torch.randperm(len(data.train_labels), generator=generator)
    size = min(options.batch_size, len(order))
    for rows in order[: size * batches_of(data, options)].to(options.device).split(size):
        yield (
            images.normalised(images.augmented(data.train_images[rows], generator)),
            data.train_labels[rows],
        )


def autocast(options: argparse.Namespace) -> torch.autocast:
    return torch.autocast(options.device.type, torch.bfloat16, enabled=options.bfloat16)


# ---- what is measured of a trained network


def measure(
    job: Job,
    model: nn.Module,
    epochs: list[findings.Epoch],
    data: images.Images,
    options: argparse.Namespace,
) -> findings.Run:
    inputs = images.normalised(data.test_images)

    def score(network: nn.Module) -> float:
        return accuracy(network.eval(), inputs, data.test_labels)

    pruned: dict[str, list[float]] = {}
    for kept in options.kept if job.target is None else []:
        network = prune(model, kept)
        pruned.setdefault(findings.ONE_SHOT, []).append(score(network))
        if shows_reestimated(options):
            pp.sparsity.reestimate_batch_norm(network, some_inputs(data, options))
            pruned.setdefault(findings.REESTIMATED, []).append(score(network))
    return findings.Run(
        job.label, job.seed, job.target, score(model), findings.layers_of(model), epochs, pruned
    )


def shows_reestimated(options: argparse.Namespace) -> bool:
    return not options.no_reestimate and not options.no_norm


def some_inputs(data: images.Images, options: argparse.Namespace) -> Iterator[Tensor]:
    """The same augmented training images for every network."""
    generator = torch.Generator().manual_seed(0)
    for inputs, _ in itertools.islice(batches(data, options, generator), REESTIMATION_BATCHES):
        yield inputs


# ---- main


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    start = time.perf_counter()
    console = Console(highlight=False)
    data = begin(
        "cifar10.py",
        options,
        lambda: images.load(options.data, Path("data"), options.cache, use_web=not options.quick),
    )
    tested_on = "the test images"
    if options.validate:
        data = data.with_validation()
        tested_on = "held-out training images"
    if options.quick:
        data = data.first(QUICK["train"], QUICK["test"])
    report.introduce(data, console)

    runs, weights = train_all(data.to(options.device), options, console)
    findings.show(runs, options.kept, console)
    left_out = ("data", "out", "cache", "device")
    settings = {k: v for k, v in vars(options).items() if k not in left_out}
    paths = findings.save(runs, weights, settings | {"data": data.source}, tested_on, options.out)
    report.end(start, paths, console)


def train_all(
    data: images.Images, options: argparse.Namespace, console: Console
) -> tuple[list[findings.Run], dict[str, dict[str, np.ndarray]]]:
    """A run for every job; with them, for the histograms, θ of the first seed of each kind."""
    runs: list[findings.Run] = []
    weights: dict[str, dict[str, np.ndarray]] = {}
    with report.progress(console) as progress:
        total = len(jobs(options)) * options.epochs * batches_of(data, options)
        progress.add_task("", total=total, state="")
        for job in jobs(options):
            start = time.perf_counter()
            model, epochs = train(job, data, options, progress)
            seconds = time.perf_counter() - start
            runs.append(measure(job, model, epochs, data, options))
            if job.kind not in weights:
                theta = thetas(model)
                weights[job.kind] = {k: v.flatten().cpu().numpy() for k, v in theta.items()}
            console.print(f"{job}: accuracy {runs[-1].accuracy:.2%}, trained in {seconds:.0f} s")
    return runs, weights


if __name__ == "__main__":
    main()
