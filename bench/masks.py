"""The rows of masks of one bit an entry, against masks of a byte an entry in plain torch.

The ops on masks alone are exact, and have no samples in `ppkernels.testing`: what says that they
are right is that at full size every value is that of plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import ppkernels as pp
from bench.contenders import IN_MEMORY, QUICK, bound, compiled, seeded
from bench.row import GPU, Build, Row, dtype_name
from bench.training import TRAINED_SHARE

BIT = 1 / 8
"""Bytes of a mask's entry as a bit."""


@dataclass(frozen=True)
class MaskInputs:
    """N weights, and a mask of them: a byte an entry, and a bit."""

    weight: Tensor  # [N]
    mask: Tensor  # [N], bool
    words: Tensor  # [N / 8], uint8


def mask_inputs(dtype: torch.dtype) -> Callable[[int, torch.device], MaskInputs]:
    """Nine entries in ten are 0, in no order."""

    def make(size: int, device: torch.device) -> MaskInputs:
        with seeded(device):
            weight, mask = torch.randn(size).to(dtype), torch.rand(size) < TRAINED_SHARE
        return MaskInputs(weight, mask, pp.reference.pack_bits(mask))

    return make


def mask_rows() -> list[Row]:
    """Each op on masks, `apply_mask` in bfloat16 as well; and `power` under a mask."""
    reference = pp.reference
    return [
        _apply_row(torch.float32),
        _apply_row(torch.bfloat16),
        _power_row(alpha=1.5),
        _row(
            "pack_bits",
            ours=bound(pp.pack_bits, "mask"),
            rivals={"eager": bound(reference.pack_bits, "mask")},
            streams=("read mask", "write words"),
            bytes_an_element=1 + BIT,
        ),
        _row(
            "unpack_bits",
            ours=lambda x: lambda: pp.unpack_bits(x.words, x.mask.shape),
            rivals={"eager": lambda x: lambda: reference.unpack_bits(x.words, x.mask.shape)},
            streams=("read words", "write mask"),
            bytes_an_element=1 + BIT,
        ),
        _row(
            "count_bits",
            ours=bound(pp.count_bits, "words"),
            rivals={
                "eager": bound(reference.count_bits, "words"),
                "sum of bytes": bound(torch.sum, "mask"),
            },
            streams=("read words",),
            bytes_an_element=BIT,
        ),
    ]


def _apply_row(dtype: torch.dtype) -> Row:
    def eager(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, 0.0)

    return _row(
        "apply_mask",
        ours=bound(pp.apply_mask, "weight", "words"),
        rivals={
            "torch.clone": bound(torch.clone, "weight"),
            "eager": bound(eager, "weight", "mask"),
            "compiled": compiled(eager, "weight", "mask"),
        },
        streams=("read weight", "read words", "write the result"),
        bytes_an_element=2 * dtype.itemsize + BIT,
        dtype=dtype,
        roof="torch.clone",
    )


def _power_row(alpha: float) -> Row:
    """θ under a mask, in new memory, as a layer that stores φ computes it."""

    def eager(weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight * weight.abs().pow(alpha - 1), 0.0)

    def masked(weight: Tensor, words: Tensor) -> Tensor:
        return pp.power(weight, alpha, words=words)

    def two_passes(weight: Tensor, words: Tensor) -> Tensor:
        return pp.apply_mask(pp.power(weight, alpha), words)

    return Row(
        name=f"power/memory/float32/alpha={alpha:g}/masked",
        suite="power",
        ops=("power",),
        inputs=mask_inputs(torch.float32),
        ours=bound(masked, "weight", "words"),
        rivals={
            "torch.clone": bound(torch.clone, "weight"),
            "power, apply_mask": bound(two_passes, "weight", "words"),
            "eager": bound(eager, "weight", "mask"),
            "compiled": compiled(eager, "weight", "mask"),
        },
        size=IN_MEMORY,
        quick_size=QUICK,
        streams=("read weight", "read words", "write theta"),
        bytes_an_element=2 * torch.float32.itemsize + BIT,
        roof="torch.clone",
    )


def _row(
    op: str,
    *,
    ours: Build,
    rivals: Mapping[str, Build],
    streams: tuple[str, ...],
    bytes_an_element: float,
    dtype: torch.dtype | None = None,
    roof: str | None = None,
) -> Row:
    kind = f"/{dtype_name(dtype)}" if dtype else ""
    return Row(
        name=f"{op}/memory{kind}",
        suite="power",
        ops=(),
        inputs=mask_inputs(dtype or torch.float32),
        ours=ours,
        rivals=rivals,
        size=IN_MEMORY,
        quick_size=QUICK,
        dtype=dtype or torch.bool,
        streams=streams,
        bytes_an_element=bytes_an_element,
        roof=roof,
        rtol=0.0,
        devices=GPU,
    )
