"""The selection on a GPU: what is launched, and in which order; kernels.py has the kernels.

A call is a table of the tensors on the device, and passes over their memory; nothing waits for the
device, and no value of k or α causes a compilation. A tensor that is not contiguous is copied into
row-major order first, for ties are broken in that order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppkernels.ops._device import is_amd, warp_size
from ppkernels.ops._layout import arranged_words
from ppkernels.ops._table import SEARCHED
from ppkernels.ops.select.kernels import (
    COLUMNS,
    STATE,
    count_kernel,
    narrow_kernel,
    tie_kernel,
    write_kernel,
)

# Elements of a program, by the bytes of its keys: 16 KiB of float32 for 256 threads, which share
# what is done once for each value of a digit. Not tuned on hardware; results do not depend on it.
BLOCKS = {4: 4096, 8: 2048}
# Bits of a digit, at most. NVIDIA counts in shared memory, one atomic addition an element; Triton
# for AMD counts by votes, whose cost grows with the number of digits.
NVIDIA_DIGIT, AMD_DIGIT = 11, 8
_THREADS = 256
_TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
_HALVES = (torch.bfloat16, torch.float16)


def topk_bits_(
    words: Sequence[Tensor],
    tensors: Sequence[Tensor],
    counts: Sequence[int],
    alphas: Sequence[float],
    within: Sequence[Tensor],
) -> Tensor:
    """Writes the words of the masks; the index of the first tensor with a NaN, or −1, 0-dim int64.

    The arguments are the schema's (op.py), ``words`` the result.
    """
    call = Call(words, tensors, counts, alphas, within)
    device = tensors[0].device
    # A kernel goes to the current device, which need not be that of the tensors.
    with torch.cuda.device_of(tensors[0]):
        memory = call.on_device(device)
        columns = len(COLUMNS) * len(call.rows)
        first_nan = memory[-1]
        if call.rows:
            table, state = memory[:columns], memory[columns:-1]
            for key, launches in groupby(call.launches(), lambda launch: launch.key):
                _search(table, state, first_nan, key, list(launches), call)
            _write(table, state, list(call.launches()), call)
    return first_nan


# ---- what a call is


@dataclass
class Row:
    """A tensor's entries in `COLUMNS`, and what rows of one launch have in common."""

    kind: tuple[int, str, bool]
    dtype: torch.dtype
    words: dict[str, int]


@dataclass(frozen=True)
class Launch:
    """Rows ``begin`` to ``begin + rows − 1``, of one dtype, whose keys have ``key`` bits."""

    key: int
    dtype: torch.dtype
    is_aligned: bool
    has_masks: bool
    begin: int
    rows: int
    blocks: int


@dataclass
class Call:
    """The rows of a call in the order of their launches, and its selections.

    Where there is one count for all, that is one selection; else each row is one.
    """

    words: Sequence[Tensor]
    tensors: Sequence[Tensor]
    counts: Sequence[int]
    alphas: Sequence[float]
    within: Sequence[Tensor]
    rows: list[Row] = field(default_factory=list)
    # Copies that have to live until the kernels are launched.
    in_use: list[Tensor] = field(default_factory=list)
    blocks: int = 0

    def __post_init__(self) -> None:
        self._dtypes = {tensor.dtype for tensor in self.tensors}
        self._has_several_alphas = len(set(self.alphas)) > 1
        for i, tensor in enumerate(self.tensors):
            if tensor.numel() > 0:
                self.rows.append(self._row(i))
        self.rows.sort(key=lambda row: row.kind)
        for selection, row in enumerate(self.rows):
            row.words["selection"] = 0 if self.is_global else selection
        for launch in self.launches():
            blocks = 0
            for row in self.rows[launch.begin : launch.begin + launch.rows]:
                row.words["first_block"] = blocks
                blocks += blocks_of(row)

    @property
    def is_global(self) -> bool:
        return len(self.counts) == 1

    def launches(self) -> Iterator[Launch]:
        """The rows by kind."""
        begin = 0
        for (key, _, is_aligned), group in groupby(self.rows, lambda row: row.kind):
            rows = list(group)
            has_masks = any(row.words["within"] for row in rows)
            blocks = sum(map(blocks_of, rows))
            yield Launch(key, rows[0].dtype, is_aligned, has_masks, begin, len(rows), blocks)
            begin += len(rows)

    def on_device(self, device: torch.device) -> Tensor:
        """The table, the states of the selections, and −1: int64, one after the other."""
        words = [row.words[column] for column in COLUMNS for row in self.rows]
        for row in self.rows[:1] if self.is_global else self.rows:
            words += self._state(row)
        # From memory that is not pinned, the copy would wait for the device.
        is_gpu = device.type != "cpu"
        host = torch.tensor([*words, -1], dtype=torch.int64, device="cpu", pin_memory=is_gpu)
        return host.to(device, non_blocking=True)

    def _state(self, row: Row) -> list[int]:
        key = row.kind[0]
        (shift, _), *_ = digits_of(key)
        state = dict.fromkeys(STATE, 0)
        state["need"] = self.counts[0 if self.is_global else row.words["index"]]
        state["base"] = (-(2**63) if key == 64 else 0) >> shift
        state["least"] = 2**31 - 1 if key <= 31 else 2**63 - 1
        return list(state.values())

    def _row(self, i: int) -> Row:
        tensor = self.tensors[i].contiguous()
        out = arranged_words("topk_bits_", self.words[i], tensor)
        words = dict.fromkeys(COLUMNS, 0)
        words["values"], words["words"] = tensor.data_ptr(), out.data_ptr()
        if self.within and self.within[i].numel() > 0:
            within = arranged_words("topk_bits_", self.within[i], tensor)
            words["within"] = within.data_ptr()
        words["numel"], words["index"] = tensor.numel(), i
        words["alpha"] = int(struct.unpack("=q", struct.pack("=d", self.alphas[i]))[0])
        is_aligned = tensor.data_ptr() % 16 == 0
        row = Row((self._key(i), str(tensor.dtype), is_aligned), tensor.dtype, words)
        words["place"] = self.blocks
        words["selection_place"] = 0 if self.is_global else self.blocks
        self.blocks += blocks_of(row)
        self.in_use.append(tensor)
        return row

    def _key(self, i: int) -> int:
        """Bits of the keys that tensor i is ranked by."""
        # By itself a tensor is ranked by |x|, whatever the exponents of the others.
        dtypes = self._dtypes if self.is_global else {self.tensors[i].dtype}
        if self.is_global and self._has_several_alphas:
            return 64
        if torch.float64 in dtypes:
            return 63
        return 15 if len(dtypes) == 1 and dtypes <= set(_HALVES) else 31


def blocks_of(row: Row) -> int:
    """Blocks of elements of a row."""
    return -(-row.words["numel"] // block_of(row.kind[0]))


def block_of(key: int) -> int:
    """Elements of a block whose keys have so many bits."""
    return BLOCKS[4 if key <= 31 else 8]


def digits_of(key: int, for_amd: bool | None = None) -> list[tuple[int, int]]:
    """The digits of a key from the highest on: what it is shifted by, and bits of the digit."""
    most = AMD_DIGIT if (is_amd() if for_amd is None else for_amd) else NVIDIA_DIGIT
    count = triton.cdiv(key, most)
    ends = [key * i // count for i in range(count + 1)]
    return [(low, high - low) for low, high in zip(ends[-2::-1], ends[:0:-1], strict=True)]


# ---- launches


def launch_choices(key: int, warp: int) -> dict[str, Any]:
    """What every launch of a kernel that reads weights fixes, on a GPU with such warps.

    The compiled code depends on it. No product and sum may become one operation: the reference
    rounds each.
    """
    choices = {"KEY": key, "LANES": SEARCHED, "BLOCK": block_of(key)}
    return {**choices, "num_warps": _THREADS // warp, "enable_fp_fusion": False}


def bins_of(key: int, for_amd: bool | None = None) -> int:
    """Values of the widest digit of a key, a power of two."""
    return 1 << max(bits for _, bits in digits_of(key, for_amd))


def _arguments(launch: Launch, rows: int) -> tuple[list[int], dict[str, Any]]:
    """What all kernels that read weights take."""
    choices = {"TYPE": _TYPES[launch.dtype], "ALIGNED": launch.is_aligned}
    return [launch.begin, launch.rows, rows], {**choices, "MASKS": launch.has_masks}


def _search(
    table: Tensor, state: Tensor, first_nan: Tensor, key: int, launches: list[Launch], call: Call
) -> None:
    """Finds which keys are kept, in selections whose keys have ``key`` bits."""
    first = 0 if call.is_global else launches[0].begin
    selections = 1 if call.is_global else sum(launch.rows for launch in launches)
    width = bins_of(key)
    bins = table.new_zeros((first + selections, width))
    digits = digits_of(key)
    for i, (shift, bits) in enumerate(digits):
        for launch in launches:
            numbers, choices = _arguments(launch, len(call.rows))
            choices |= launch_choices(key, warp_size(table.device))
            count_kernel[(launch.blocks,)](
                *(table, state, bins, first_nan.view(torch.uint64), *numbers, shift, 1 << bits),
                FIRST=i == 0,
                BINS=width,
                **choices,
            )
        is_last = i + 1 == len(digits)
        next_shift = 0 if is_last else digits[i + 1][0]
        narrow_kernel[(selections,)](
            *(state, bins, first, shift, next_shift), KEY=key, LAST=is_last, BINS=width
        )


def _write(table: Tensor, state: Tensor, launches: list[Launch], call: Call) -> None:
    """Writes the masks by what the search has found."""
    ties = table.new_zeros(call.blocks + 1)
    for kernel in (tie_kernel, write_kernel):
        for launch in launches:
            numbers, choices = _arguments(launch, len(call.rows))
            choices |= launch_choices(launch.key, warp_size(table.device))
            kernel[(launch.blocks,)](table, state, ties, *numbers, **choices)
        if kernel is tie_kernel:
            ties = ties.cumsum(0)
