"""What the command lines of the examples share: the options of them all, and what begins a run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from digits import DataError

Number = int | float
DataT = TypeVar("DataT")


def at_least(least: Number) -> Callable[[str], Number]:
    """The type of an option: a finite number >= ``least``, whole if ``least`` is an int."""
    kind = type(least)

    def number(text: str) -> Number:
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a number >= {least}, got {text}")
        return value

    number.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return number


def above_zero(text: str) -> float:
    """The type of an option: a finite number > 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text}")
    return value


def share(text: str) -> float:
    """The type of an option: a number from above 0 to 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"must be a share, above 0 and at most 1, got {text}")
    return value


def add_common(
    parser: argparse.ArgumentParser, holds: str, out: Path, quick: str, threads: int = 1
) -> None:
    """The options that every example has.

    Args:
        parser: gets the options.
        holds: what a data folder holds, for the help.
        out: the folder for results where none is named.
        quick: what --quick does without, for the help.
        threads: how many where none are named. One by default: batches of small networks gain
            little from a second thread, and lose a factor of 20 to waiting threads while another
            program keeps the processor busy.
    """
    add = parser.add_argument
    add("--seeds", type=at_least(0), nargs="+", default=[0], help="several give mean ± std")
    add("--data", type=Path, metavar="DIR", help=f"a folder that holds {holds}; default: download")
    add("--out", type=Path, metavar="DIR", default=out, help=f"default: {out}")
    add("--validate", action="store_true", help="test on a part of the training images instead")
    add("--quick", action="store_true", help=f"seconds: {quick}, and no download")
    add(
        "--threads",
        type=at_least(1),
        default=threads,
        help=f"default: {threads}; another number rounds otherwise",
    )


def check_once(parser: argparse.ArgumentParser, **lists: list[Number]) -> None:
    """An error if a value stands twice in one of ``lists``, named as their options are."""
    if any(len(set(values)) < len(values) for values in lists.values()):
        names = " and ".join(f"--{name}" for name in lists)
        parser.error(f"{names} must not name a value twice")


def begin(program: str, options: argparse.Namespace, load: Callable[[], DataT]) -> DataT:
    """Set the threads, make the folder for results, load the data; a sentence where that fails."""
    torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        return load()
    except (DataError, OSError) as error:
        raise SystemExit(f"{program}: {error}") from error
