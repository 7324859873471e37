"""The indices of sparse weights as PyTorch ops: functions, schemas, shapes, kernels.

The functions take indices as they are and trust them; `Topology` is the checked way in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppkernels import _backend
from ppkernels._checks import check_words
from ppkernels.ops._entries import index_dtype
from ppkernels.ops._library import define, run
from ppkernels.ops.topology import reference

# ---- public functions


def topology_of_mask(words: Tensor, rows: int, in_features: int) -> tuple[Tensor, Tensor]:
    """The compressed rows of a mask: offsets int32 [N + 1] and columns [E] of its set bits.

    Args:
        words: the mask's, contiguous uint8 [ceil(N·K / 8)].
        rows: N.
        in_features: K.

    Returns:
        ``offsets`` and ``columns``; columns are uint16 where K ≤ 65536, else int32.

    Raises:
        TypeError, ValueError: words of another kind or size.
        RuntimeError: 2^31 entries or more.
    """
    check_words("topology_of_mask", words, rows * in_features)
    found: tuple[Tensor, Tensor] = _run("topology_of_mask", words, rows, in_features)
    return found


def mask_of_topology(offsets: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """The words of the mask in which the entries are set: the opposite of `topology_of_mask`."""
    return _run("mask_of_topology", offsets, columns, in_features)


def transpose_topology(
    offsets: Tensor, columns: Tensor, in_features: int, taps: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries column by column: offsets of columns, rows, and the order of the entries.

    Args:
        offsets, columns: a topology's, [N + 1] and [E].
        in_features: K.
        taps: how many neighbouring columns belong to one input channel, a divisor of K.

    Returns:
        ``offsets`` int32 [K + 1]; ``rows`` [E], n·taps + k mod taps for the entry in row n and
        column k, uint16 where N·taps ≤ 65536, else int32; ``order`` int32 [E], the position of each
        among the topology's entries. Within a column rows ascend.
    """
    args = (offsets, columns, in_features, taps)
    found: tuple[Tensor, Tensor, Tensor] = _run("transpose_topology", *args)
    return found


def gather_kept(weight: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
    """The values of a weight at the entries of a topology: [E]. Not differentiable.

    Args:
        weight: [N, ...], taken as the matrix [N, K] of its rows; any dtype whose elements have 1,
            2, 4 or 8 bytes, and any strides: it is not copied.
        offsets, columns: the topology's, [N + 1] and [E].
    """
    return _run("gather_kept", weight, offsets, columns)


def scatter_kept(values: Tensor, offsets: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """The weight [N, K] with ``values`` at the entries and 0 elsewhere. Not differentiable.

    Args:
        values: [E], of any dtype whose elements have 1, 2, 4 or 8 bytes.
        offsets, columns: the topology's, [N + 1] and [E].
        in_features: K.
    """
    args = (values, offsets, columns, in_features)
    return _run("scatter_kept", *args)


def change_topology(
    offsets: Tensor, columns: Tensor, in_features: int, drop: Tensor, grow: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A topology without some entries and with others: a merge of ascending lists, never dense.

    Args:
        offsets, columns: a topology's, [N + 1] and [E].
        in_features: K.
        drop: positions of entries, int64 [D], each larger than the one before.
        grow: places in the flattened weight, int64 [G], each larger than the one before.

    Returns:
        The new ``offsets`` and ``columns`` [E'], E' = E − D + G; ``origin`` int64 [E'], where each
        entry was among the old ones, −1 for those of ``grow``; and ``refused``, 0-dim int64: the
        first place of ``grow`` that is kept already, by an entry that is not dropped, −1 if there
        is none. With such a place the others mean nothing.
    """
    args = (offsets, columns, in_features, drop, grow)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _run("change_topology", *args)
    return found


def topology_fault(offsets: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """Which rule the indices of a topology break: 0-dim int64, 0 if none.

    1: offsets begin with 0, never descend, and end with E. 2: columns lie in 0 ... K − 1.
    3: columns ascend within each row. The first of these that is broken; no memory is read where
    an index that may be wrong points.

    Args:
        offsets, columns: int32 [N + 1], N + 1 > 0, and [E], of the dtype that goes with K.
        in_features: K.
    """
    return _run("topology_fault", offsets, columns, in_features)


def _run(name: str, *args: Any) -> Any:
    return run(name, _backend.uses_reference(), *args)


# ---- schemas, shapes, and the kernels of every device but the CPU

_SCHEMAS = {
    "topology_of_mask": "(Tensor words, SymInt rows, SymInt in_features) -> (Tensor, Tensor)",
    "mask_of_topology": "(Tensor offsets, Tensor columns, SymInt in_features) -> Tensor",
    "transpose_topology": (
        "(Tensor offsets, Tensor columns, SymInt in_features, SymInt taps)"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "gather_kept": "(Tensor weight, Tensor offsets, Tensor columns) -> Tensor",
    "scatter_kept": (
        "(Tensor values, Tensor offsets, Tensor columns, SymInt in_features) -> Tensor"
    ),
    "change_topology": (
        "(Tensor offsets, Tensor columns, SymInt in_features, Tensor drop, Tensor grow)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "topology_fault": "(Tensor offsets, Tensor columns, SymInt in_features) -> Tensor",
}


def _topology_of_mask(words: Tensor, rows: int, in_features: int) -> tuple[Tensor, Tensor]:
    # How many bits are set is known only when the op has run.
    entries = torch.library.get_ctx().new_dynamic_size()
    columns = words.new_empty(entries, dtype=index_dtype(in_features))
    return words.new_empty(rows + 1, dtype=torch.int32), columns


def _transpose_topology(
    offsets: Tensor, columns: Tensor, in_features: int, taps: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows = index_dtype((offsets.numel() - 1) * taps)
    return (
        offsets.new_empty(in_features + 1),
        columns.new_empty(columns.numel(), dtype=rows),
        columns.new_empty(columns.numel(), dtype=torch.int32),
    )


def _change_topology(
    offsets: Tensor, columns: Tensor, in_features: int, drop: Tensor, grow: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    entries = columns.numel() - drop.numel() + grow.numel()
    return (
        torch.empty_like(offsets),
        columns.new_empty(entries),
        grow.new_empty(entries),
        grow.new_empty(()),
    )


_SHAPES: dict[str, Callable[..., Any]] = {
    "topology_of_mask": _topology_of_mask,
    "mask_of_topology": lambda offsets, columns, in_features: offsets.new_empty(
        ((offsets.numel() - 1) * in_features + 7) // 8, dtype=torch.uint8
    ),
    "transpose_topology": _transpose_topology,
    "gather_kept": lambda weight, offsets, columns: weight.new_empty(columns.numel()),
    "scatter_kept": lambda values, offsets, columns, in_features: values.new_empty(
        (offsets.numel() - 1, in_features)
    ),
    "change_topology": _change_topology,
    "topology_fault": lambda offsets, columns, in_features: offsets.new_empty(
        (), dtype=torch.int64
    ),
}

for _name, _schema in _SCHEMAS.items():
    define(_name, _schema, _SHAPES[_name], getattr(reference, _name))
