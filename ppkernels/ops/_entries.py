"""The entries of a sparse weight in pure PyTorch, for the references of the rooms.

A weight is N rows of K columns. What is kept of it stands in compressed rows: row n has the entries
offsets[n] ... offsets[n + 1] − 1, and entry e stands in column columns[e]. Entries are in row-major
order, and no two stand in the same place.
"""

from __future__ import annotations

import torch
from torch import Tensor


def index_dtype(limit: int) -> torch.dtype:
    """The dtype of indices below ``limit``: two bytes where they will do, else four."""
    return torch.uint16 if limit <= 1 << 16 else torch.int32


def rows_of(offsets: Tensor, count: int) -> Tensor:
    """The row of each of ``count`` entries: int64 [E]."""
    each = torch.arange(offsets.numel() - 1, device=offsets.device)  # [N]
    return torch.repeat_interleave(each, offsets.diff().long(), output_size=count)


def places_of(offsets: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """Where each entry stands in the flattened weight: int64 [E], ascending."""
    return rows_of(offsets, columns.numel()) * in_features + columns.long()


def dense_of(values: Tensor, offsets: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """The weight [N, K] that has ``values`` at its entries and 0 elsewhere."""
    rows = offsets.numel() - 1
    places = places_of(offsets, columns, in_features)
    flat = values.new_zeros(rows * in_features).index_put((places,), values)
    return flat.view(rows, in_features)


def order_of_columns(offsets: Tensor, columns: Tensor) -> Tensor:
    """The entries column by column, within a column by row: int64 [E], positions of entries."""
    return torch.sort(columns.long(), stable=True).indices


def wide_dtype(operand: Tensor, values: Tensor) -> torch.dtype:
    """The dtype in which their products are added up."""
    return torch.promote_types(torch.promote_types(operand.dtype, values.dtype), torch.float32)
