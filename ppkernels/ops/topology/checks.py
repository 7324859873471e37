"""What makes a topology, and what may be asked of one: checks with sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ppkernels._checks import check_has_values, check_tensor
from ppkernels.ops._entries import index_dtype
from ppkernels.ops.bitmask import checked_shape as checked_sizes
from ppkernels.ops.topology.op import topology_fault

# Indices have 32 bits, with a sign.
LIMIT = 1 << 31


def checked_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """``shape`` as a tuple of two sizes or more, whose products indices can count."""
    sizes = checked_sizes("Topology", shape)
    if len(sizes) < 2:
        raise ValueError(f"Topology: shape must have two dimensions or more, got {sizes}")
    for but, size in (
        ("first", math.prod(sizes[1:])),
        ("second", sizes[0] * math.prod(sizes[2:])),
    ):
        if size > LIMIT:
            raise ValueError(
                f"Topology: the product of all sizes but the {but} must be at most 2^31, got "
                f"{size} for {sizes}"
            )
    return sizes


def check_count(count: int) -> None:
    """There are no more entries than offsets can count."""
    if count >= LIMIT:
        raise ValueError(f"Topology: there can be 2^31 - 1 entries at most, got {count}")


def check_form(offsets: Tensor, columns: Tensor, shape: tuple[int, ...]) -> None:
    """Dtypes, sizes and devices are those of the indices of a topology of ``shape``."""
    rows, in_features = shape[0], math.prod(shape[1:])
    check_tensor("Topology", "offsets", offsets, torch.int32)
    check_tensor("Topology", "columns", columns, index_dtype(in_features))
    if offsets.shape != (rows + 1,) or columns.dim() != 1:
        raise ValueError(
            f"Topology: offsets must have shape ({rows + 1},) and columns one dimension, got "
            f"{tuple(offsets.shape)} and {tuple(columns.shape)}"
        )
    if offsets.device != columns.device:
        raise ValueError(
            f"Topology: offsets and columns must be on one device, got {offsets.device} and "
            f"{columns.device}"
        )
    check_count(columns.numel())


def check_values(offsets: Tensor, columns: Tensor, in_features: int) -> None:
    """The indices are those of a topology: kernels read memory by them."""
    if columns.is_meta:
        return
    rules = (
        "offsets must begin with 0, never descend, and end with the number of columns, "
        f"{columns.numel()}",
        f"columns must be >= 0 and < {in_features}",
        "columns must ascend within each row",
    )
    fault = int(topology_fault(offsets, columns, in_features))
    if fault:
        raise ValueError(f"Topology: {rules[fault - 1]}")


def checked_drop(drop: Tensor, columns: Tensor) -> Tensor:
    """The positions of the entries to drop in ascending order; they come so, or as bools."""
    if not (isinstance(drop, Tensor) and drop.dtype == torch.bool):
        return checked_list("drop", "positions of entries", drop, columns.numel(), columns.device)
    check_tensor("Topology.changed", "drop", drop, torch.bool)
    check_has_values("Topology.changed", "drop", drop)
    if drop.shape != columns.shape or drop.device != columns.device:
        raise ValueError(
            f"Topology.changed: drop as bools must have shape ({columns.numel()},), one for each "
            f"entry, on {columns.device}, got {tuple(drop.shape)} on {drop.device}"
        )
    return drop.nonzero().squeeze(1)


def checked_list(name: str, what: str, numbers: Tensor, limit: int, device: torch.device) -> Tensor:
    """``numbers`` in ascending order: each in 0 ... limit − 1, and none twice."""
    check_tensor("Topology.changed", name, numbers, torch.int64)
    if numbers.dim() != 1 or numbers.device != device:
        raise ValueError(
            f"Topology.changed: {name} must have one dimension and be on {device}, got "
            f"{tuple(numbers.shape)} on {numbers.device}"
        )
    if numbers.is_meta or numbers.numel() == 0:
        return numbers
    steps = numbers.diff()
    if not (steps > 0).all():
        numbers = numbers.sort().values
        steps = numbers.diff()
    first, last = int(numbers[0]), int(numbers[-1])
    if first < 0 or last >= limit:
        raise ValueError(
            f"Topology.changed: {name} must be {what} >= 0 and < {limit}, got "
            f"{first if first < 0 else last}"
        )
    twice = numbers[1:][steps == 0]
    if twice.numel() > 0:
        raise ValueError(f"Topology.changed: {name} has {int(twice[0])} twice")
    return numbers
