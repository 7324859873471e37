"""What the files of rows share: sizes, the numbers of inputs, and formulas as contenders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.row import Build, Call

IN_MEMORY = 64 * 2**20
"""Elements of the rows in memory: far more than any cache holds."""

IN_CACHE = 64 * 2**10
"""Elements of the rows in a processor's cache, and of those where a GPU's launch is all."""

QUICK = 2**20


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Random numbers from seed 0 inside the block, and new tensors on ``device``.

    The CPU's generator goes on after the block as if nothing had been drawn from it.
    """
    with torch.random.fork_rng(devices=[]), device:
        torch.manual_seed(0)
        yield


def bound(function: Callable[..., Tensor], *names: str) -> Build:
    """``function`` of the named inputs."""

    def build(inputs: Any) -> Call:
        tensors = [getattr(inputs, name) for name in names]
        return lambda: function(*tensors)

    return build


def compiled(formula: Callable[..., Tensor], *names: str) -> Build:
    """torch.compile of ``formula`` over the named inputs, with fixed shapes (its best case)."""
    return lambda inputs: bound(torch.compile(formula, dynamic=False), *names)(inputs)
