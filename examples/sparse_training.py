"""Train a wide network, prune it, make its layers sparse, and see what got faster and smaller.

    python examples/sparse_training.py                            # 10 % and 5 % of the weights kept
    python examples/sparse_training.py --kept 0.02 --seeds 0 1 2
    python examples/sparse_training.py --optimizer adamw --alpha 1

784-2048-2048-2048-10 on MNIST is trained dense and pruned once, each layer to its largest |θ|. Then
it is fine-tuned twice, from the same weights and on the same batches: with dense layers and masks,
and with the sparse layers that `pp.sparsify` makes where they measure faster. The sparse network is
saved, read back into a fresh one, and folded for inference.

The file reads in the order of the work: options, training, the stages, inference, main. Beside it,
digits.py finds the data, networks.py makes the network, stages.py prints and draws.
"""

from __future__ import annotations

import argparse
import copy
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import digits
import report
import stages
import torch
import torch.nn.functional as F
from networks import accuracy, evened, mlp
from options import above_zero, add_common, at_least, begin, check_once, share
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

import ppkernels as pp

EPOCHS = {"epochs": 3, "tuning_epochs": 2}
QUICK = {"epochs": 4, "tuning_epochs": 1, "train": 1_000, "test": 500}

# Chosen with --validate at α = 1.5. Fine-tuning begins with a part of the rate; from 0.03 to 1 all
# served alike.
RATES = {"sgd": 0.1, "adamw": 1e-2}
TUNING_RATE = 0.3

INFERENCE_BATCHES = (1, 256)

# ---- options


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; every default that depends on another option is filled in."""
    parser = argparse.ArgumentParser(
        description="Train, prune and fine-tune a wide network on MNIST, masked and sparse.",
        epilog="sgd and adamw are pp.optim.PowerSGD, with momentum 0.9, and PowerAdamW; default "
        "rates: " + ", ".join(f"{name} {rate:g}" for name, rate in RATES.items()),
    )
    add = parser.add_argument
    add("--alpha", type=at_least(1.0), default=1.5, help="1 is the plain network; default: 1.5")
    add("--kept", type=share, nargs="+", default=[0.1, 0.05], help="default: 0.1 0.05")
    add("--width", type=at_least(1), default=2048, help="of the three hidden layers; default: 2048")
    add("--epochs", type=at_least(1), help="of the dense network; default: 3")
    add("--tuning-epochs", type=at_least(1), help="of each pruned one; default: 2")
    add("--optimizer", choices=RATES, default="sgd", help="default: sgd")
    add("--lr", type=above_zero, help="at the start, falls to 0; default: below")
    add("--batch-size", type=at_least(1), default=128, help="default: 128")
    add(
        "--at-least",
        type=at_least(0.0),
        default=1.0,
        help="layers become sparse that measure so many times as fast; 0, all; default: 1",
    )
    threads = torch.get_num_threads()
    out = Path("out/sparse_training")
    add_common(parser, "MNIST/raw", out, "few images, short training", threads=threads)
    options = parser.parse_args(arguments)
    check_once(parser, kept=options.kept, seeds=options.seeds)
    if max(options.kept) == 1:
        parser.error("--kept must be below 1: the network that keeps all its weights comes anyway")
    for name, default in EPOCHS.items():
        if getattr(options, name) is None:
            setattr(options, name, QUICK[name] if options.quick else default)
    if options.lr is None:
        options.lr = RATES[options.optimizer]
    return options


@dataclass(frozen=True)
class Session:
    """What every part of the work needs."""

    data: digits.Digits
    options: argparse.Namespace
    console: Console
    progress: Progress


# ---- training


def network(options: argparse.Namespace) -> nn.Module:
    hidden = [options.width] * 3
    return pp.powerize(mlp(784, *hidden, 10), options.alpha)


def make_optimizer(
    model: nn.Module, like: nn.Module, lr: float, name: str
) -> torch.optim.Optimizer:
    # The rules with which one rate serves several exponents.
    if name == "adamw":
        return pp.optim.PowerAdamW(model, lr=lr, rule="virtual")
    return pp.optim.PowerSGD(evened(model, lr, like), lr=lr, momentum=0.9, rule="chain")


class Trainee:
    """A network on its way through the epochs, with its optimizer, and what the epochs gave."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        self.model, self.optimizer = model, optimizer
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        self.losses: list[float] = []  # of each step
        self.seconds: list[float] = []  # of each epoch

    def train(self, batches: Sequence[Tensor], data: digits.Digits) -> None:
        """An epoch, timed; each batch is the numbers of its images."""
        begun = time.perf_counter()
        for rows in batches:
            loss = F.cross_entropy(self.model(data.train_images[rows]), data.train_labels[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begun)

    def stage(self, name: str, kept: float, data: digits.Digits) -> stages.Stage:
        """What it has become."""
        return stages.Stage(
            name,
            kept,
            accuracy(self.model, data.test_images, data.test_labels),
            saved_bytes(self.model),
            stages.memory_of(pp.footprint(self.model, self.optimizer)),
            self.seconds,
        )


def fit(
    models: Mapping[str, nn.Module],
    like: nn.Module,
    lr: float,
    epochs: int,
    seed: int,
    session: Session,
) -> dict[str, Trainee]:
    """Train the models on the same batches, an epoch of one after an epoch of the other.

    In turn, so that a machine that grows slower does so for all of them. Their rates are ``lr`` at
    the start, evened by θ of ``like``, so that they are the same whatever is pruned.
    """
    data, options = session.data, session.options
    images = len(data.train_labels)
    steps = epochs * -(-images // options.batch_size)
    trainees = {
        name: Trainee(model, make_optimizer(model, like, lr, options.optimizer), steps)
        for name, model in models.items()
    }
    shuffle = torch.Generator().manual_seed(seed)
    (bar,) = session.progress.task_ids
    for epoch in range(1, epochs + 1):
        batches = torch.randperm(images, generator=shuffle).split(options.batch_size)
        for name, trainee in trainees.items():
            about = f"{name}, seed {seed}, epoch {epoch}/{epochs}"
            session.progress.update(bar, description=about)
            trainee.train(batches, data)
            last = trainee.losses[-1]
            if not math.isfinite(last):
                raise SystemExit(
                    f"sparse_training.py: {about} diverged: the loss is {last}; try a lower --lr "
                    f"than {options.lr:g}"
                )
            state = f"loss {last:.4f}, {trainee.seconds[-1]:.1f} s"
            session.progress.update(bar, advance=1, state=state)
    return trainees


# ---- the stages


def run(seed: int, session: Session) -> stages.Run:
    """All stages of one seed."""
    data, options, console = session.data, session.options, session.console
    torch.manual_seed(seed)
    model = network(options)
    fitted = fit({stages.DENSE: model}, model, options.lr, options.epochs, seed, session)
    found = stages.Run(seed, [fitted[stages.DENSE].stage(stages.DENSE, 1.0, data)], [])
    console.print(f"seed {seed}, {found.stages[0]}")
    for kept in options.kept:
        masked = pruned(model, kept)
        test = accuracy(masked, data.test_images, data.test_labels)
        found.stages.append(stages.Stage(stages.PRUNED, kept, test, saved_bytes(masked)))
        console.print(f"seed {seed}, {found.stages[-1]}")
        sparse = copy.deepcopy(masked)
        sample = data.train_images[: options.batch_size]
        plan = pp.sparsify(sparse, sample, at_least=options.at_least)
        console.print(f"\n{plan}\n", markup=False, soft_wrap=True)

        # Their optimizers are new, and begin alike.
        both = {stages.MASKED: masked, stages.SPARSE: sparse}
        lr = TUNING_RATE * options.lr
        tuned = fit(both, model, lr, options.tuning_epochs, seed, session)
        for name, trainee in tuned.items():
            found.stages.append(trainee.stage(name, kept, data))
            console.print(f"seed {seed}, {found.stages[-1]}")
        if seed == options.seeds[0]:
            held = pp.footprint(sparse, tuned[stages.SPARSE].optimizer)
            console.print(f"\n{held}\n", markup=False, soft_wrap=True)
        found.comparisons.append(compare(kept, tuned, plan, seed, session))
    return found


def pruned(model: nn.Module, kept: float) -> nn.Module:
    """A copy that keeps the largest |θ| of each layer, of the output layer twice the share."""
    copied = copy.deepcopy(model)
    # Layers of other widths begin with weights of other sizes: one threshold for all would leave
    # next to nothing of the wide ones.
    alike = pp.sparsity.Uniform({"output": 2})
    pp.sparsity.Pruner(copied, pp.sparsity.OneShot(kept), distribution=alike).prune()
    return copied


def compare(
    kept: float,
    tuned: Mapping[str, Trainee],
    plan: pp.SparsifyPlan,
    seed: int,
    session: Session,
) -> stages.Comparison:
    """What the two fine-tuned networks have in common, and how fast they are folded.

    The sparse one goes by way of its files, which stay in the folder for results.
    """
    masked, sparse = (trainee.model for trainee in tuned.values())
    files = [session.options.out / f"{kept:g}-kept-seed-{seed}.{end}" for end in ("json", "pt")]
    plan.save(files[0])
    torch.save(sparse.state_dict(), files[1])
    fresh = read_back(*files, session.options)
    images = session.data.test_images[: max(INFERENCE_BATCHES)]
    with torch.inference_mode():
        change = (fresh(images) - sparse(images)).abs().max().item()
    losses = [torch.tensor(trainee.losses, dtype=torch.float64) for trainee in tuned.values()]
    apart = (losses[0] - losses[1]).abs()
    folded = {stages.MASKED: pp.fold(copy.deepcopy(masked)), stages.SPARSE: pp.fold(fresh)}
    return stages.Comparison(
        kept,
        apart[0].item(),
        apart.max().item(),
        change,
        {name: saved_bytes(model) for name, model in folded.items()},
        {
            batch: images_per_second(folded, images[:batch], session.options.quick)
            for batch in INFERENCE_BATCHES
        },
    )


def read_back(plan: Path, weights: Path, options: argparse.Namespace) -> nn.Module:
    """The sparse network from its two files, as another machine would make it."""
    model = network(options)
    pp.sparsify(model, plan=pp.SparsifyPlan.load(plan))
    model.load_state_dict(torch.load(weights))
    return model


def saved_bytes(model: nn.Module) -> int:
    """The size of the file that torch.save makes of the state_dict."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.getbuffer().nbytes


# ---- inference


@torch.inference_mode()
def images_per_second(
    models: Mapping[str, nn.Module], images: Tensor, is_quick: bool
) -> dict[str, float]:
    """How many images each model takes in a second: the median of calls that take turns."""
    calls = 3 if is_quick else 51
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for call in range(calls + 1):
        for name, model in models.items():
            begun = time.perf_counter()
            model(images)
            if call > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - begun)
    return {name: len(images) / median(own) for name, own in seconds.items()}


# ---- main


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    start = time.perf_counter()
    console = Console(highlight=False)
    data = begin(
        "sparse_training.py",
        options,
        lambda: digits.load(options.data, Path("data"), use_web=not options.quick),
    )
    if options.validate:
        data = data.with_validation()
    if options.quick:
        data = data.first(QUICK["train"], QUICK["test"])
    report.introduce(data, console)
    console.print(
        f"Network: 784-{options.width}-{options.width}-{options.width}-10, α = {options.alpha:g}, "
        f"stepped by {options.optimizer}; threads: {options.threads}"
    )

    epochs = options.epochs + 2 * len(options.kept) * options.tuning_epochs
    with report.progress(console) as progress:
        progress.add_task("", total=len(options.seeds) * epochs, state="")
        session = Session(data, options, console, progress)
        runs = [run(seed, session) for seed in options.seeds]
    stages.show(runs, console)
    settings = {k: v for k, v in vars(options).items() if k not in ("data", "out")}
    tested_on = "the validation images" if options.validate else "the test images"
    paths = stages.save(runs, settings | {"data": data.source}, tested_on, options.out)
    report.end(start, paths, console)


if __name__ == "__main__":
    main()
