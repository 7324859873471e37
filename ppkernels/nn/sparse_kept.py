"""Which entries a sparse layer keeps, and which dense layers can become one."""

from __future__ import annotations

import math
from numbers import Real
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ppkernels._powered import is_masked, weight_parameter
from ppkernels._shares import check_share, entries_of
from ppkernels.nn.masks import Masked
from ppkernels.ops import BitMask, Topology

# What the compiled products take; all else runs by the reference, which is there to be right.
KERNEL_DTYPES = (torch.float32, torch.bfloat16)
# Why nobody can tell what is pruned.
NO_VALUES = "its weight is on the meta device, where tensors have no values"
# A share of the entries at random, or which.
Kept = float | Topology | BitMask


def topology_of(op: str, kept: Kept, shape: tuple[int, ...]) -> Topology:
    """The topology of ``shape`` that a constructor's ``kept`` asks for, on the CPU if at random."""
    if isinstance(kept, (Topology, BitMask)):
        if kept.shape != shape:
            raise ValueError(
                f"{op}: kept must have the shape of the weight, {shape}, got {tuple(kept.shape)}"
            )
        return kept if isinstance(kept, Topology) else Topology.of_mask(kept)
    if not isinstance(kept, Real) or isinstance(kept, bool):
        is_tensor = isinstance(kept, Tensor)
        raise TypeError(
            f"{op}: kept must be a share from 0 to 1, a pp.Topology or a pp.BitMask, got "
            + ("a tensor; pp.BitMask.pack makes a mask of a bool one" if is_tensor else repr(kept))
        )
    if check_share(op, "kept", kept) == 0:
        raise ValueError(f"{op}: kept must be a share above 0 and up to 1, got {kept}")
    return random_topology(shape, entries_of(kept, math.prod(shape), op, "kept"))


def random_topology(shape: tuple[int, ...], count: int) -> Topology:
    """``count`` entries, by torch's generator of the CPU, on the CPU."""
    numel = math.prod(shape)
    # The device is named because a `with torch.device("meta")` would lose the indices.
    places = torch.randperm(numel, device="cpu")[:count]
    bits = torch.zeros(numel, dtype=torch.bool, device="cpu")
    bits[places] = True
    return Topology.of_mask(BitMask.pack(bits.view(shape)))


# ---- masks, of the dense weight and over the values


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


# ---- which dense layers can be sparse


def obstacle(layer: nn.Module, classes: tuple[type[nn.Module], ...]) -> str | None:
    """Why ``layer``, wanted to be of one of these classes, cannot be sparse; None if it can.

    The first of ``classes`` is the plain one.
    """
    if not isinstance(layer, nn.Module):
        return "it is no module"
    if is_parametrized(layer):
        return "torch.nn.utils has parametrized it"
    plain_class = layer.plain_class if isinstance(layer, Masked) else type(layer)
    if type(layer) not in classes or plain_class is not classes[0]:
        names = ", ".join(each.__name__ for each in classes)
        return f"only layers of the classes {names} can be, and no subclasses"
    if has_own_forward(layer):
        return "something has put a forward of its own in place of its class's"
    weight = weight_parameter(layer)
    if weight is None:
        return "its weight is no Parameter of its own (torch.nn.utils has normalised or pruned it)"
    if "bias" not in layer._parameters:
        return "its bias is no Parameter of its own (torch.nn.utils has pruned it)"
    if weight.dtype not in KERNEL_DTYPES:
        return f"its weight is {weight.dtype}, and the kernels have float32 and bfloat16"
    return None


def has_own_forward(layer: nn.Module) -> bool:
    """Whether the layer itself has a forward, as wrappers set it, which calls one of its class.

    It would go on to do so when the layer is of another class.
    """
    return "forward" in layer.__dict__


def check_no_obstacle(op: str, layer: nn.Module, reason: str | None) -> None:
    """There is no ``reason`` why ``layer`` cannot be sparse."""
    if reason is not None:
        raise TypeError(f"{op}: the {type(layer).__name__} given cannot be sparse: {reason}")
