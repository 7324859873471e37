"""Topologies in pure PyTorch: the specification of every other implementation.

A topology says which entries of a weight [N, K] are kept: ``offsets`` int32 [N + 1] and ``columns``
[E], uint16 where K ≤ 65536 and else int32; `ppkernels.ops._entries` has the rules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ppkernels.ops._bits import each_bit, unpacked
from ppkernels.ops._entries import dense_of, index_dtype, order_of_columns, places_of, rows_of


def topology_of_mask(words: Tensor, rows: int, in_features: int) -> tuple[Tensor, Tensor]:
    """Offsets and columns of the entries whose bit is set."""
    mask = unpacked(words, (rows, in_features))
    ends = mask.sum(1).cumsum(0)
    offsets = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)  # [N + 1]
    columns = mask.nonzero()[:, 1].to(index_dtype(in_features))  # [E]
    return offsets, columns


def mask_of_topology(offsets: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """The words of the mask in which the entries are set."""
    places = places_of(offsets, columns, in_features)
    words = offsets.new_zeros(((offsets.numel() - 1) * in_features + 7) // 8, dtype=torch.uint8)
    bits = each_bit(offsets.device)[places % 8]
    # No two bits of a byte are the same: their sum is their union.
    return words.index_add(0, places // 8, bits)


def transpose_topology(
    offsets: Tensor, columns: Tensor, in_features: int, taps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The entries column by column: offsets of columns [K + 1], rows [E] and order [E].

    Entry e' of column k, counted from 0 over all columns, is entry order[e'] of the topology, in
    row n. Column k is tap t = k mod ``taps`` of a convolution (taps is 1 for a linear layer), and
    rows[e'] = n·taps + t. Within a column rows ascend.
    """
    order = order_of_columns(offsets, columns)
    counts = torch.bincount(columns.long(), minlength=in_features)  # [K]
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    rows = rows_of(offsets, columns.numel())[order] * taps + columns.long()[order] % taps
    return ends, rows.to(index_dtype((offsets.numel() - 1) * taps)), order.to(torch.int32)


def gather_kept(weight: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
    """The values of ``weight`` [N, ...], the matrix [N, K] of its rows, at the entries: [E]."""
    in_features = math.prod(weight.shape[1:])
    return weight.reshape(-1)[places_of(offsets, columns, in_features)]


def scatter_kept(values: Tensor, offsets: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """The weight [N, K] that has ``values`` at the entries and 0 elsewhere."""
    return dense_of(values, offsets, columns, in_features)


def change_topology(
    offsets: Tensor, columns: Tensor, in_features: int, drop: Tensor, grow: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Offsets and columns without the entries ``drop`` and with entries at the places ``grow``.

    ``drop`` are positions of entries, ``grow`` places in the flattened weight; both are int64 and
    ascend. Then where each entry was, int64 [E'], or −1 for those of ``grow``; and the first place
    at which two entries would stand, 0-dim, or −1.
    """
    is_left = torch.ones(columns.numel(), dtype=torch.bool, device=columns.device)
    left = is_left.index_fill(0, drop, False).nonzero().squeeze(1)  # [E − D]
    places = torch.cat([places_of(offsets, columns, in_features)[left], grow])
    places, order = torch.sort(places, stable=True)
    origin = torch.cat([left, torch.full_like(grow, -1)])[order]
    counts = torch.bincount(places // max(in_features, 1), minlength=offsets.numel() - 1)
    ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    twice = places[1:][places.diff() == 0]
    refused = torch.cat([twice, twice.new_full((1,), -1)])[0]
    return ends, (places % max(in_features, 1)).to(columns.dtype), origin, refused


def topology_fault(offsets: Tensor, columns: Tensor, in_features: int) -> Tensor:
    """Which rule the indices break, the first of these, 0-dim int64; 0 if none.

    1: offsets begin with 0, never descend, and end with E. 2: columns lie in 0 ... K − 1.
    3: columns ascend within each row.
    """
    ends, wide = offsets.long(), columns.long()
    fault = ends.new_zeros(())
    if ends[0] != 0 or ends[-1] != columns.numel() or (ends.diff() < 0).any():
        return fault + 1
    if ((wide < 0) | (wide >= in_features)).any():
        return fault + 2
    if (places_of(offsets, columns, in_features).diff() <= 0).any():
        return fault + 3
    return fault
