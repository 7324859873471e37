"""What an H100 can do, and the time that a kernel's bytes and instructions take there at the least.

The board is the H100 SXM: 3.35 TB/s, 132 multiprocessors. Each has four schedulers, and each of
these issues one instruction a cycle for a warp of 32 threads: 128 lanes a cycle. The clock is
1.755 GHz, the boost clock of the H100 PCIe. NVIDIA's peak figures of the SXM board mean more:
66.9 TFLOP/s of float32 are 1.98 GHz, 989.4 TFLOP/s of bfloat16 1.83 GHz. A board at its power limit
runs slower than that, so the lowest of the three is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from bench.gpu_static.listing import Instruction

BANDWIDTH = 3.35e12
MULTIPROCESSORS = 132
CLOCK = 1.755e9
# Lanes a cycle and multiprocessor. Schedulers issue to all units. Integers, logic, comparisons and
# selection have half of that (33.5 of 66.9 TOP/s), float64 as well, reciprocals and the like, and
# conversions that are not between float32 and a half type, an eighth.
LANES = {"issue": 128, "integer": 64, "fp64": 64, "special": 16}
# Dense, of the matrix units, FLOP/s.
MATRIX_PEAK = {"fp16": 989.4e12, "bf16": 989.4e12, "tf32": 494.7e12}

_INTEGER = frozenset(
    (
        *("IADD3", "VIADD", "IABS", "LEA", "LOP3", "PLOP3", "SHF", "PRMT", "MOV", "SEL", "FSEL"),
        *("ISETP", "FSETP", "FMNMX", "FMNMX3", "IMNMX", "VIMNMX", "VIMNMX3", "VIADDMNMX"),
        *("I2FP", "F2FP", "FCHK"),
    )
)
_DOUBLE = frozenset(("DADD", "DMUL", "DFMA", "DSETP"))
_CONVERSION = frozenset(("F2F", "F2I", "I2F", "FRND"))


def unit_of(instruction: Instruction) -> str | None:
    """The unit of sm_90 that computes it, where it is one that could be short; else None."""
    kind = instruction.opcode.split(".")[0]
    if instruction.is_special or kind in _CONVERSION:
        return "special"
    if kind in _DOUBLE:
        return "fp64"
    return "integer" if kind in _INTEGER else None


@dataclass(frozen=True)
class Estimate:
    """Seconds of a call, at the least, by what takes them."""

    memory_s: float
    unit_s: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return max(self.memory_s, *self.unit_s.values())

    @property
    def bound(self) -> str:
        """What takes the longest: "memory", or a unit."""
        slowest = max(self.unit_s, key=self.unit_s.__getitem__)
        return "memory" if self.memory_s >= self.unit_s[slowest] else slowest


def lanes_per_second(unit: str) -> float:
    """Instructions of single threads that all units of a kind finish in a second."""
    return LANES[unit] * MULTIPROCESSORS * CLOCK


def affordable(bytes_per_element: float) -> float:
    """Instructions an element that are issued while its bytes move."""
    return bytes_per_element / BANDWIDTH * lanes_per_second("issue")


def elementwise(
    path: Iterable[Instruction], elements_per_thread: float, bytes_per_element: float, size: int
) -> Estimate:
    """The time of ``size`` elements of a kernel whose threads run ``path``."""
    counts = dict.fromkeys(LANES, 0)
    for instruction in path:
        counts["issue"] += 1
        if unit := unit_of(instruction):
            counts[unit] += 1
    threads = size / elements_per_thread
    times = {unit: count * threads / lanes_per_second(unit) for unit, count in counts.items()}
    return Estimate(size * bytes_per_element / BANDWIDTH, times)


def matrix(flops: float, bytes_moved: float, dtype: str, issued: float) -> Estimate:
    """The time of a product of matrices beside which ``issued`` instructions of threads run."""
    units = {"matrix": flops / MATRIX_PEAK[dtype], "issue": issued / lanes_per_second("issue")}
    return Estimate(bytes_moved / BANDWIDTH, units)
