"""When a fused product beats a buffer: a model of bytes, instructions and matrix operations.

# Note [Fused, or by a buffer]
Fused, each tile of the batch powers the whole weight again, in registers. By a buffer, `power`
writes θ once and a library's product reads it back. So a batch of one tile should be fused, which
reads φ and nothing else of the weight's size, and a large one not, for the arithmetic of the power
is not on the matrix units. The gradient of the weight is powered once in either way, and fused it
saves the gradient of θ being written and read back; but a library multiplies faster than our
kernel, which decides for large batches.

A time below is the larger of what memory and what arithmetic takes; instructions and matrix
operations of a fused kernel are issued by the same warps and are added up. A kernel of fewer
programs than the GPU has processors gets that share of it, where a library is taken to find work
for all. What the model leaves out: launches, that a small θ may stay in the cache, and masks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from ppkernels.ops._device import is_amd


@dataclass(frozen=True)
class Machine:
    """Peak rates of a GPU by its data sheet.

    Attributes:
        processors: multiprocessors or compute units.
        bandwidth: of the memory, bytes a second.
        lanes: instructions a second on single float32 values: half the flop/s of vectors.
        half: flop/s of matrices of bfloat16 and float16, dense.
        single: flop/s of matrices of float32, as TF32 on NVIDIA.
        has_tf32: whether ``single`` rounds to TF32, so that a full product takes three.
    """

    processors: int
    bandwidth: float
    lanes: float
    half: float
    single: float
    has_tf32: bool = True

    def share(self, programs: int) -> float:
        """What so many programs have of the GPU."""
        return min(1.0, programs / self.processors)


A100 = Machine(108, 2.039e12, 9.75e12, 312e12, 156e12)
H100 = Machine(132, 3.35e12, 33.5e12, 989e12, 494e12)
B200 = Machine(148, 8.0e12, 37.5e12, 2250e12, 1125e12)
MI300X = Machine(304, 5.3e12, 40.9e12, 1307e12, 163e12, has_tf32=False)

# Instructions for the power of an element within the products, by the dtype of the product;
# `python -m bench.gpu_static` counts them.
HALF_INSTRUCTIONS, SINGLE_INSTRUCTIONS = 27, 65
# What a fused kernel reaches of the matrix units' peak where a library is taken to reach all of it.
# An assumption: no GPU was at hand. Above it, only the choice between two right ways changes.
FUSED_SHARE = 0.6


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """The rates of a GPU; for one that is not known, and for the interpreter, those of an H100.

    A GPU that is not known has its own number of processors.
    """
    if device.type != "cuda":
        return H100
    properties = torch.cuda.get_device_properties(device)
    if is_amd():
        known = MI300X
    else:
        known = {(8, 0): A100, (10, 0): B200}.get((properties.major, properties.minor), H100)
    return replace(known, processors=properties.multi_processor_count)


@dataclass(frozen=True)
class Product:
    """A product with a powered weight of ``rows`` × ``contracted`` elements, ``batch`` at a time.

    Attributes:
        weight_bytes, input_bytes: of an element of φ, and of x or g.
        allows_tf32: whether PyTorch may round float32 products to TF32.
    """

    batch: int
    rows: int
    contracted: int
    weight_bytes: int
    input_bytes: int
    allows_tf32: bool = False

    @property
    def _elements(self) -> int:
        return self.rows * self.contracted

    def _instructions(self, machine: Machine) -> float:
        """Seconds for the power of each element once."""
        each = HALF_INSTRUCTIONS if self.input_bytes == 2 else SINGLE_INSTRUCTIONS
        return self._elements * each / machine.lanes

    def _bytes(self, machine: Machine, per_element: float) -> float:
        """Seconds for so many bytes for each element of the weight."""
        return self._elements * per_element / machine.bandwidth

    def _library(self, machine: Machine) -> float:
        """Seconds of the matrix operations in cuBLAS or hipBLAS."""
        flops = 2 * self.batch * self._elements
        if self.input_bytes == 2:
            return flops / machine.half
        # Without TF32, NVIDIA's float32 products run on vectors.
        on_matrices = self.allows_tf32 or not machine.has_tf32
        return flops / (machine.single if on_matrices else 2 * machine.lanes)

    def _fused(self, machine: Machine) -> float:
        """Seconds of the matrix operations in our kernels."""
        flops = 2 * self.batch * self._elements
        if self.input_bytes == 2:
            return flops / (FUSED_SHARE * machine.half)
        times = 3 if machine.has_tf32 and not self.allows_tf32 else 1
        return times * flops / (FUSED_SHARE * machine.single)

    def fused_seconds(self, tile: int, programs: int, parts: int, machine: Machine) -> float:
        """Of x·θᵀ or g·θ with θ in registers.

        Args:
            tile: rows of the batch that a program works on.
            programs: of the kernel.
            parts: that it is split into; more than one are written in float32 and added up.
            machine: where.
        """
        tiles = -(-self.batch // tile)
        arithmetic = tiles * self._instructions(machine) + self._fused(machine)
        moved = self._bytes(machine, self.weight_bytes)
        seconds = max(moved, arithmetic) / machine.share(programs)
        if parts > 1:
            seconds += 8 * parts * self.batch * self.rows / machine.bandwidth
        return seconds

    def buffered_seconds(self, machine: Machine) -> float:
        """Of the same with θ written to memory first."""
        moved = self._bytes(machine, self.weight_bytes + self.input_bytes)
        power = max(moved, self._instructions(machine))
        return power + max(self._bytes(machine, self.input_bytes), self._library(machine))

    def fused_gradient_seconds(self, programs: int, machine: Machine) -> float:
        """Of ∂L/∂φ, the gradient of θ scaled in registers: φ is read, the gradient written."""
        moved = self._bytes(machine, 2 * self.weight_bytes)
        arithmetic = self._fused(machine) + self._instructions(machine)
        return max(moved, arithmetic) / machine.share(programs)

    def buffered_gradient_seconds(self, machine: Machine) -> float:
        """Of the same with the gradient of θ written to memory, and read again by the scaling."""
        product = max(self._bytes(machine, self.input_bytes), self._library(machine))
        moved = self._bytes(machine, self.input_bytes + 2 * self.weight_bytes)
        return product + max(moved, self._instructions(machine))
