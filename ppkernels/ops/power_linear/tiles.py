"""The tiles of op `power_linear` on GPUs, and what else a launch of its kernels fixes.

With these tiles no kernel spills on the GPUs of `python -m bench.gpu_static`, and none takes more
than the 99 KiB of shared memory that every supported NVIDIA GPU has, or AMD's 64. They are not
tuned on hardware.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from ppkernels.ops._device import is_amd
from ppkernels.ops.power_linear.model import Machine


@dataclass(frozen=True)
class Tiles:
    """Elements of a program's tile.

    Attributes:
        rows: along the rows of the product or of the weight.
        across: along what is contracted or, for the gradient of the weight, along its columns.
        batch: along the batch, at most.
        warps: of 32 threads, on AMD of 64.
        pieces: in which a tile of the gradient is scaled and written.
    """

    rows: int
    across: int
    batch: int
    warps: int
    pieces: int = 1


# By the bytes of an element of the operands.
PRODUCT_TILES = {2: Tiles(64, 64, 128, 4), 4: Tiles(64, 32, 64, 4)}
GRADIENT_TILES = {2: Tiles(128, 128, 64, 8, pieces=2), 4: Tiles(128, 64, 32, 8)}
# For weights that have few of the above.
SMALL_GRADIENT_TILES = {2: Tiles(64, 64, 64, 4), 4: Tiles(64, 64, 32, 4)}
# Rows or columns of a tile, and one step further: within it, elements are counted in 32 bits.
LARGEST_TILE = 128 + 1
# Rows of tiles of the gradient that are worked on at the same time.
_GROUP = 8
# A product that is split along what is contracted has at least so many tiles in each part.
_LEAST_TILES = 4


def is_even(rows: int, across: int, tiles: Tiles) -> bool:
    """Whether no tile of a weight sticks out."""
    return rows % tiles.rows == 0 and across % tiles.across == 0


def product_tiles(itemsize: int, rows: int, contracted: int, is_masked: bool) -> Tiles:
    """Tiles of a product; masks and tiles that stick out take registers from the batch."""
    tiles = PRODUCT_TILES[itemsize]
    has_room = is_even(rows, contracted, tiles) and not is_masked
    return tiles if has_room else replace(tiles, batch=tiles.batch // 2)


def product_choices(
    dtype: torch.dtype, batch: int, rows: int, contracted: int, is_masked: bool, for_amd: bool
) -> dict[str, Any]:
    """What a launch of `product_kernel` fixes; the compiled code depends on it."""
    tiles = product_tiles(dtype.itemsize, rows, contracted, is_masked)
    return {
        "EVEN": is_even(rows, contracted, tiles),
        "ROWS": tiles.rows,
        "BATCH": _tile(batch, tiles),
        "CONTRACTED": tiles.across,
        **_choices(dtype, tiles, for_amd),
    }


def gradient_choices(
    dtype: torch.dtype, batch: int, rows: int, columns: int, processors: int, for_amd: bool
) -> dict[str, Any]:
    """What a launch of `grad_weight_kernel` fixes; the compiled code depends on it."""
    tiles = GRADIENT_TILES[dtype.itemsize]
    if triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.across) < processors:
        tiles = SMALL_GRADIENT_TILES[dtype.itemsize]
    return {
        "EVEN": is_even(rows, columns, tiles),
        "ROWS": tiles.rows,
        "COLUMNS": tiles.across,
        "BATCH": _tile(batch, tiles),
        "PIECES": tiles.pieces,
        "GROUP": _GROUP,
        **_choices(dtype, tiles, for_amd),
    }


def sum_choices(for_amd: bool) -> dict[str, Any]:
    """What a launch of `add_up_kernel` fixes: 128 threads, each a 128-bit access of half types."""
    return {"BLOCK": 1024, "num_warps": 2 if for_amd else 4}


def _tile(batch: int, tiles: Tiles) -> int:
    return min(tiles.batch, max(16, 1 << (batch - 1).bit_length()))


def _choices(dtype: torch.dtype, tiles: Tiles, for_amd: bool) -> dict[str, Any]:
    return {
        "COMPUTE": dot_type(dtype),
        "PRECISION": input_precision(dtype, for_amd),
        "num_warps": tiles.warps,
        # Depth of the pipeline of copies: AMD has 64 KiB of shared memory.
        "num_stages": 2 if for_amd else 3,
    }


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type that matrix instructions take. Triton's interpreter has no bfloat16: tests."""
    types = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return types[dtype]


def input_precision(dtype: torch.dtype, for_amd: bool) -> str:
    """How float32 products are computed: as PyTorch is told for its own, else in full.

    On NVIDIA that is three products of TF32 parts, on AMD the float32 matrix instructions.
    """
    if dtype != torch.float32 or for_amd:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@dataclass(frozen=True)
class Plan:
    """How a product is launched.

    Attributes:
        choices: what `product_choices` or `gradient_choices` says.
        tiles: of the rows and of the batch; of a gradient, of the rows and of the columns.
        splits, length: parts along what is contracted, and the length of each.
    """

    choices: dict[str, Any]
    tiles: tuple[int, int]
    splits: int
    length: int

    @property
    def programs(self) -> int:
        """Of the whole launch."""
        return self.tiles[0] * self.tiles[1] * self.splits


def plan_product(
    dtype: torch.dtype, batch: int, rows: int, contracted: int, is_masked: bool, machine: Machine
) -> Plan:
    """Tiles and parts of a product."""
    choices = product_choices(dtype, batch, rows, contracted, is_masked, is_amd())
    tiles = (triton.cdiv(rows, choices["ROWS"]), triton.cdiv(batch, choices["BATCH"]))
    programs, step = tiles[0] * tiles[1], choices["CONTRACTED"]
    return Plan(choices, tiles, *splits_of(programs, contracted, step, machine.processors))


def plan_gradient(
    dtype: torch.dtype, batch: int, rows: int, columns: int, machine: Machine
) -> Plan:
    """Tiles of a gradient of the weight, which is not split along the batch."""
    choices = gradient_choices(dtype, batch, rows, columns, machine.processors, is_amd())
    tiles = (triton.cdiv(rows, choices["ROWS"]), triton.cdiv(columns, choices["COLUMNS"]))
    return Plan(choices, tiles, 1, batch)


def splits_of(tiles: int, contracted: int, step: int, processors: int) -> tuple[int, int]:
    """Parts that a product of few tiles is cut into along what is contracted, and their length.

    One program for each processor, no more: each part is written and read again. A part has some
    tiles to pipeline.
    """
    steps = triton.cdiv(contracted, step)
    wanted = min(processors // tiles, steps // _LEAST_TILES)
    length = triton.cdiv(steps, max(1, wanted)) * step
    return triton.cdiv(contracted, length), length
