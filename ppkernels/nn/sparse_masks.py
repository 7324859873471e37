"""Masks of a dense weight, and the same over the values of a sparse one."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ppkernels._powered import is_masked
from ppkernels.ops import BitMask, Topology


@torch.no_grad()
def pruned_mask(dense: nn.Module) -> BitMask:
    """What is left of a dense layer's weight: θ is not 0, or an ``update_mask`` trains it."""
    theta = cast(Tensor, dense.theta if is_masked(dense) else dense.weight)
    left = BitMask.pack(theta.detach() != 0)
    update_mask = dense.update_mask if is_masked(dense) else None
    return left if update_mask is None else left | update_mask


def bits_at(topology: Topology, mask: BitMask | None) -> BitMask | None:
    """The bits of a dense layer's mask at the entries; None where all of them are set."""
    if mask is None:
        return None
    bits = mask.unpack().view(-1)[topology.places()]
    return None if bool(bits.all()) else BitMask.pack(bits)


def dense_bits(topology: Topology, mask: BitMask | None) -> BitMask:
    """The dense layer's mask that is set where ``mask`` over the values is; 0 elsewhere."""
    if mask is None:
        return topology.mask()
    bits = torch.zeros(topology.numel(), dtype=torch.bool, device=topology.device)
    bits[topology.places()] = mask.unpack()
    return BitMask.pack(bits.view(topology.shape))
