"""The rows of selecting the largest weights of a list of tensors, all together or of each.

What is compared is the last mask: its bits hang on all of the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ppkernels as pp
from bench.contenders import QUICK, seeded
from bench.row import Bar, Build, Call, Row, dtype_name
from ppkernels.ops.select.reference import log2

TENSORS = 20
ENTRIES = 25 * 2**20
SHARE = 0.1

CLONE, EAGER, TOPK, KTHVALUE = "clone", "eager", "torch.topk", "torch.kthvalue"


@dataclass(frozen=True)
class SelectInputs:
    """Weights, and how many of them are to be kept."""

    tensors: list[Tensor]
    flat: Tensor  # the same as one tensor
    alphas: Sequence[float] | None
    k: int | list[int]


def select_inputs(
    dtype: torch.dtype, is_pruned: bool, is_mixed: bool, is_each: bool
) -> Callable[[int, torch.device], SelectInputs]:
    """N weights in twenty tensors; pruned ones are 0 but for a tenth."""

    def make(size: int, device: torch.device) -> SelectInputs:
        with seeded(device):
            flat = torch.randn(size) * 0.1
            if is_pruned:
                flat *= torch.rand(size) < SHARE
        flat = flat.to(dtype)
        tensors = list(flat.chunk(TENSORS))
        each = [round(SHARE * len(tensor)) for tensor in tensors]
        alphas = [1 + i / TENSORS for i in range(len(tensors))] if is_mixed else None
        return SelectInputs(tensors, flat, alphas, each if is_each else round(SHARE * size))

    return make


def ours(x: SelectInputs) -> Call:
    """The op itself."""
    return lambda: pp.topk_mask(x.tensors, x.k, x.alphas)[-1].words


def clone(x: SelectInputs) -> Call:
    """As much memory read, and as much written: what any copy of the weights takes."""
    return lambda: [tensor.clone() for tensor in x.tensors][-1]


def topk(x: SelectInputs) -> Call:
    """Values and indices of the largest, without masks."""
    k = round(SHARE * len(x.flat))
    return lambda: torch.topk(x.flat.abs(), k, sorted=False).values


def kthvalue(x: SelectInputs) -> Call:
    """The threshold alone, which says nothing of ties."""
    k = round((1 - SHARE) * len(x.flat))
    return lambda: torch.kthvalue(x.flat.abs(), k).values


def largest(magnitude: Tensor, k: int) -> Tensor:
    """The k largest, and of equal ones the first: a bool mask."""
    threshold = magnitude.kthvalue(len(magnitude) - k + 1).values
    above, equal = magnitude > threshold, magnitude == threshold
    return above | (equal & (equal.cumsum(0) <= k - above.sum()))


def eager(x: SelectInputs) -> Call:
    """The same masks by a formula: a threshold, and a count of what is equal to it."""

    def call() -> Tensor:
        if not isinstance(x.k, int):
            masks = [largest(t.abs(), k) for t, k in zip(x.tensors, x.k, strict=True)]
        else:
            keys = [t.abs() for t in x.tensors]
            if x.alphas is not None:
                keys = [a * log2(t.double()) for t, a in zip(keys, x.alphas, strict=True)]
            masks = list(largest(torch.cat(keys), x.k).split([len(t) for t in x.tensors]))
        return [pp.reference.pack_bits(mask) for mask in masks][-1]

    return call


def select_rows() -> list[Row]:
    """A tenth of 25 Mi weights; variants of it in dtype, values, exponents and counts."""
    bars = (Bar("times", 2.5, CLONE), Bar("faster", 10, TOPK))
    return [
        _row("together", bars=bars),
        _row("each", is_each=True),
        _row("together", is_mixed=True),
        _row("together", is_pruned=True),
        _row("together", torch.bfloat16),
        _row("together", torch.float64),
    ]


def _row(
    kind: str,
    dtype: torch.dtype = torch.float32,
    *,
    is_pruned: bool = False,
    is_mixed: bool = False,
    is_each: bool = False,
    bars: tuple[Bar, ...] = (),
) -> Row:
    variant = "/pruned" * is_pruned + "/mixed" * is_mixed
    rivals: dict[str, Build] = {CLONE: clone, EAGER: eager}
    if bars:
        rivals |= {TOPK: topk, KTHVALUE: kthvalue}
    return Row(
        name=f"topk_mask/{kind}/{dtype_name(dtype)}{variant}",
        suite="select",
        ops=("topk_mask",),
        inputs=select_inputs(dtype, is_pruned, is_mixed, is_each),
        ours=ours,
        rivals=rivals,
        other_work=(TOPK, KTHVALUE) if bars else (),
        size=ENTRIES,
        quick_size=QUICK,
        dtype=dtype,
        streams=("read weight", "write words"),
        bytes_an_element=dtype.itemsize + 1 / 8,
        roof=CLONE,
        rtol=0.0,
        bars=bars,
    )
