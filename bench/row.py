"""What a row of the registry holds: an op at a size, its rivals, its bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

import torch

OURS = "ppkernels"

CPU, GPU = ("cpu",), ("cuda",)
"""Kinds of devices, as torch names them: ROCm's GPUs are "cuda" too."""

Call = Callable[[], torch.Tensor]
"""One timed call. Its result is compared with the other contenders', never timed."""
Build = Callable[[Any], Call]
"""Takes the row's inputs and gives the call; what it does itself (models, buffers) is not timed."""


def dtype_name(dtype: torch.dtype) -> str:
    """float32, as rows and results have it."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Bar:
    """A promise about the time t of ``promiser``, one of ours, next to the time r of one rival.

    ``kind`` says which number must keep to ``limit``: ``"times"`` t/r at most, ``"faster"`` r/t at
    least, ``"us_above"`` t − r in µs at most. It is the median over the rounds of one run.
    """

    kind: Literal["times", "faster", "us_above"]
    limit: float
    rival: str
    promiser: str = OURS

    def measured(self, ours: list[float], rival: list[float]) -> float:
        """The number that the bar limits; ``ours`` and ``rival`` are seconds per round."""
        rounds = zip(ours, rival, strict=True)
        if self.kind == "times":
            return median(t / r for t, r in rounds)
        if self.kind == "faster":
            return median(r / t for t, r in rounds)
        return median((t - r) * 1e6 for t, r in rounds)

    def reached(self, value: float) -> bool:
        """Whether ``value``, as `measured` gives it, keeps the promise."""
        return value >= self.limit if self.kind == "faster" else value <= self.limit

    def sentence(self) -> str:
        """The promise in words."""
        who = "" if self.promiser == OURS else f"{self.promiser}: "
        if self.kind == "times":
            return f"{who}at most {self.limit:g}x the time of {self.rival}"
        if self.kind == "faster":
            return f"{who}at least {self.limit:g}x faster than {self.rival}"
        return f"{who}at most {self.limit:g} µs above {self.rival}"

    def format(self, value: float) -> str:
        """``value``, as `measured` gives it, with its unit."""
        return f"{value:.1f} µs" if self.kind == "us_above" else f"{value:.2f}x"


@dataclass(frozen=True)
class MemoryBar:
    """A promise about memory: our peak is at most ``rival``'s and ``extra_bytes(N)`` more."""

    rival: str
    extra_bytes: Callable[[int], int]


@dataclass(frozen=True)
class Row:
    """One measurement: our call and its rivals on the same inputs, in one interleaved run.

    Attributes:
        name: unique; ``python -m bench`` selects rows by parts of it.
        suite: the pytest-benchmark file that times it: test_<suite>.py.
        ops: the ops it runs on; nothing is timed where one of them fails its value check.
        inputs: makes the inputs from a size on a device, the same at every call.
        ours: builds our call from the inputs.
        rivals: the other contenders by name, built from the same inputs. All must return the
            values that ours returns, within ``rtol`` and ``atol``, but for the roof and for those
            that ``other_work`` names.
        other_work: rivals that compute something else, as a plain optimizer next to a powered one:
            timed, not compared.
        size, quick_size: N, what ``inputs`` is called with; quick sizes judge no bar.
        unit: what N counts.
        dtype: of the inputs.
        streams: what one call must at least read and write, N elements each; the bytes follow.
        bytes_an_element: of all streams together, where not each of them is of ``dtype``.
        flops: floating-point operations of one call from N, where they set the speed.
        roof: the rival that only moves the same bytes: what the memory allows.
        threads: a fixed count for this row; None takes the run's.
        in_cache: the inputs stay in the processor's cache: each sample starts with an untimed call.
        bars: what the row promises on a CPU.
        memory: what it promises of peak memory; without, ``--memory`` passes over the row.
        rtol, atol: how close the contenders' values must be, element by element.
        devices: the kinds of devices it is measured on.
        gpu_size: N on a GPU, where it is another.
        gpu_rivals: rivals that take part on a GPU alone.
        absent: sentences on rivals that cannot take part on this machine.
    """

    name: str
    suite: str
    ops: tuple[str, ...]
    inputs: Callable[[int, torch.device], Any]
    ours: Build
    rivals: Mapping[str, Build]
    size: int
    quick_size: int
    unit: str = "elements"
    other_work: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32
    streams: tuple[str, ...] = ()
    bytes_an_element: float | None = None
    flops: Callable[[int], int] | None = None
    roof: str | None = None
    threads: int | None = None
    in_cache: bool = False
    bars: tuple[Bar, ...] = field(default=())
    memory: MemoryBar | None = None
    rtol: float = 2e-5
    atol: float = 0.0
    devices: tuple[str, ...] = CPU + GPU
    gpu_size: int | None = None
    gpu_rivals: Mapping[str, Build] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    @property
    def contenders(self) -> dict[str, Build]:
        """Ours first, then the rivals, in the registry's order."""
        return {OURS: self.ours, **self.rivals}

    def bytes_moved(self, size: int) -> int | None:
        """N x bytes of an element over all streams; None where no streams are given."""
        if not self.streams:
            return None
        each = self.bytes_an_element or len(self.streams) * self.dtype.itemsize
        return round(size * each)

    def on_gpu(self) -> Row:
        """The row as it is measured on a GPU, where threads mean nothing and no bar is stated."""
        rivals = {**self.rivals, **self.gpu_rivals}
        return replace(self, size=self.gpu_size or self.size, rivals=rivals, threads=None, bars=())
