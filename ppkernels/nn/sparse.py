"""What the sparse layers share: the kept values and where they stand."""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ppkernels._powered import is_masked, is_powered, weight_parameter
from ppkernels._shares import check_share, entries_of
from ppkernels.autograd import Power
from ppkernels.nn.choice import called
from ppkernels.nn.masks import Masked
from ppkernels.nn.powered import Powered
from ppkernels.ops import BitMask, Topology

SparseT = TypeVar("SparseT", bound="Sparse")
# A share of the entries at random, or which.
Kept = float | Topology | BitMask


class Sparse(Masked):
    """Makes a layer with masks a sparse one: ``class SparseLinear(Sparse)``.

    Attributes:
        weight: the trained parameter: the kept values alone, [E], in row-major order of the places
            that ``topology`` says. Whoever reads a layer's weight as a matrix wants `dense`.
        topology: a `pp.Topology`: where the values stand in the weight of the dense layer. It is no
            buffer, and changes through `change_topology` and by loading a checkpoint alone.
        update_mask, mask: as in `Masked`, of the shape [E].
    """

    _topology: Topology
    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        theta = self.weight
        if self._mask is not None:
            theta = self._hide(theta)
        return self._product(input, theta)

    def _product(self, input: Tensor, theta: Tensor) -> Tensor:
        """The layer's output for kept values θ."""
        raise NotImplementedError

    @property
    def topology(self) -> Topology:
        """Where the values stand in the weight of the dense layer."""
        return self._topology

    def dense(self) -> Tensor:
        """θ as the dense layer's weight: 0 where nothing is kept. Not differentiable."""
        return self._topology.scatter(self.theta)

    def to_dense(self) -> Masked:
        """The dense layer with masks that this one stands for: a `MaskedLinear`, `PowerConv2d`, ...

        Its ``update_mask`` trains what is trained here, so that what is not kept stays 0; a
        ``mask`` hides what is hidden here. It has the same Parameter as its bias, and one of its
        own for its weight; optimizer state stays where it is.
        """
        options: dict[str, Any] = {"bias": self.bias is not None, "dtype": self.weight.dtype}
        if is_powered(self):
            options |= {"alpha": self.alpha, "stores": self.stores}
        # The values come afterwards; none are drawn on this device.
        dense = cast(Masked, self._dense_layer(device="meta", **options))
        stored = self._topology.scatter(self.weight)
        dense.weight = nn.Parameter(stored, self.weight.requires_grad)
        dense.register_parameter("bias", self._parameters["bias"])
        dense._place()
        dense.update_mask = dense_bits(self._topology, self._update_mask)
        if self._mask is not None:
            dense.mask = dense_bits(self._topology, self._mask)
        return dense.train(self.training)

    def _dense_layer(self, **options: Any) -> nn.Module:
        """A dense layer with masks of this one's sizes, powered if this one is."""
        raise NotImplementedError

    def _take(self, dense: nn.Module) -> None:
        """Become the sparse layer of ``dense``, whose sizes this one has already."""
        theta = (dense.theta if is_masked(dense) else dense.weight).detach()  # type: ignore[operator]
        kept = BitMask.pack(theta != 0)
        update_mask = dense.update_mask if is_masked(dense) else None
        topology = Topology.of_mask(kept if update_mask is None else kept | update_mask)
        self._topology = topology
        weight = cast(nn.Parameter, dense.weight)
        self.weight = nn.Parameter(topology.gather(weight), weight.requires_grad)
        self.register_parameter("bias", dense._parameters["bias"])
        if is_powered(dense):
            cast(Powered, self).give_alpha(dense.alpha, dense.stores)
        if is_masked(dense):
            self.update_mask = bits_at(topology, update_mask)
            self.mask = bits_at(topology, dense.mask)
        self.train(dense.training)

    def change_topology(self, drop: Tensor, grow: Tensor) -> None:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw θ and the bias as the dense layer draws them; no θ is 0."""
        bound = 1 / math.sqrt(max(self._topology.in_features, 1))
        with torch.no_grad():
            self.weight.copy_(drawn(self.weight, bound))
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def _begin(self, topology: Topology, bias: bool, **factory: Any) -> None:
        """Make the parameters, without values in them."""
        self._topology = topology
        self.weight = nn.Parameter(torch.empty(topology.count(), **factory))
        own = nn.Parameter(torch.empty(topology.rows, **factory)) if bias else None
        self.register_parameter("bias", own)
        self._place()

    def _described(self) -> str:
        kept = f", kept={self._topology.count()}/{self._topology.numel()}"
        return kept + super()._described()

    def _place(self) -> None:
        super()._place()
        if not self.weight.is_meta:  # its indices would be lost there
            self._topology = self._topology.to(self.weight.device)


class PowerSparse(Powered):
    """What the powered sparse layers share, before the sparse class: the forward."""

    def forward(self, input: Tensor) -> Tensor:
        theta = self.weight
        if self.stores == "phi":
            alpha: Any = self._buffers["alpha"]
            theta = Power.apply(theta, alpha, self._words(theta))
        elif self._mask is not None:
            theta = self._hide(theta)
        return self._product(input, theta)  # type: ignore[operator,no-any-return]


# ---- masks, of the dense weight and over the values


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
    weight = weight_parameter(layer)
    if weight is None:
        return "its weight is no Parameter of its own (torch.nn.utils has normalised or pruned it)"
    if weight.is_meta:
        return "its weight is on the meta device, where tensors have no values"
    if weight.dtype not in (torch.float32, torch.bfloat16):
        return f"its weight is {weight.dtype}, and the kernels have float32 and bfloat16"
    return None


def check_no_obstacle(op: str, layer: nn.Module, reason: str | None) -> None:
    """There is no ``reason`` why ``layer`` cannot be sparse."""
    if reason is not None:
        raise TypeError(f"{op}: {called('', layer)} cannot be sparse: {reason}")


def without_weight(sparse_class: type[SparseT]) -> SparseT:
    """A layer under construction, with no attributes of its own yet."""
    layer = sparse_class.__new__(sparse_class)
    nn.Module.__init__(layer)
    return cast(SparseT, layer)


def topology_of(op: str, kept: Kept, shape: tuple[int, ...]) -> Topology:
    """The topology of ``shape`` that a constructor's ``kept`` asks for, on the CPU if at random."""
    if isinstance(kept, (Topology, BitMask)):
        if kept.shape != shape:
            raise ValueError(
                f"{op}: kept must have the shape of the weight, {shape}, got {tuple(kept.shape)}"
            )
        return kept if isinstance(kept, Topology) else Topology.of_mask(kept)
    if isinstance(kept, Tensor):
        raise TypeError(
            f"{op}: kept must be a share, a pp.Topology or a pp.BitMask, got a tensor; "
            "pp.BitMask.pack(tensor) makes a mask of a bool one"
        )
    if check_share(op, "kept", kept) == 0:
        raise ValueError(f"{op}: kept must be a share above 0 and up to 1, got {kept}")
    numel = math.prod(shape)
    # The device is named because a `with torch.device("meta")` would lose the indices.
    places = torch.randperm(numel, device="cpu")[: entries_of(kept, numel, op, "kept")]
    bits = torch.zeros(numel, dtype=torch.bool, device="cpu")
    bits[places] = True
    return Topology.of_mask(BitMask.pack(bits.view(shape)))


def drawn(like: Tensor, bound: float) -> Tensor:
    """New values θ for ``like``, uniform between ±bound as torch.nn draws weights, but never 0."""
    values = torch.empty_like(like, requires_grad=False).uniform_(-bound, bound)
    return values.masked_fill_(values == 0, bound)
