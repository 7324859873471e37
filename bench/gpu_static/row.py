"""What a row of the catalogue holds: a kernel as one of its launches has it compiled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu_static.paths import Arm, Way
from bench.gpu_static.targets import Target


@dataclass(frozen=True)
class Stream:
    """Memory that is read or written once an element.

    Attributes:
        name: what it is, in words.
        bytes: of an element, at the least.
        where: the function of the kernel's source in which the access stands.
        is_wide: full blocks have to take it 128 bits at a time; False for masks.
    """

    name: str
    bytes: float
    where: Arm
    is_wide: bool = True


@dataclass(frozen=True)
class Elementwise:
    """A kernel whose time is that of its memory.

    Attributes:
        elements: of a program.
        streams: all that has the size of the weight; scalars are not listed.
        operations: of an element, on paper, in words.
        ways: what a full block may run, by name; "usual" is first.
        is_memory_bound: an H100 is to have time left on the usual path. False for float64, which is
            there for checks, and where the catalogue gives another reason.
    """

    elements: int
    streams: tuple[Stream, ...]
    operations: str
    ways: Mapping[str, Way]
    is_memory_bound: bool = True

    @property
    def floor_bytes(self) -> float:
        """Bytes an element that any such kernel moves."""
        return sum(stream.bytes for stream in self.streams)


@dataclass(frozen=True)
class Matrix:
    """A product of matrices, one of which is powered on its way, or a powered product.

    Attributes:
        flops: of one call of a stated size, on the matrix units.
        dtype: of the product, a key of roofline.MATRIX_PEAK.
        bytes_moved: what such a call must read and write at the least.
        powered: the function of the source that powers an element.
        tile: elements that a program powers in a turn of its loop, or at its end.
        powers: elements that all programs of the call power.
    """

    flops: int
    dtype: str
    bytes_moved: int
    powered: Arm
    tile: int
    powers: int


@dataclass(frozen=True)
class Row:
    """A kernel to compile.

    Attributes:
        name: unique; ``--kernel`` selects rows by parts of it.
        kernel: the function under ``triton.jit``.
        types: Triton's type of each argument that is a value ("*fp32" for a tensor; "i32:16" for a
            number that is known to be a multiple of 16).
        choices: what else the launcher passes on a target: constexpr arguments and options.
        work: what it does, None for a kernel whose time does not matter.
        files: sources that its functions stand in.
        rounds_to: "bf16" or "f16" where results are rounded to that.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    choices: Callable[[Target], Mapping[str, Any]]
    work: Elementwise | Matrix | None
    files: tuple[Path, ...] = field(default=())
    rounds_to: str | None = None
