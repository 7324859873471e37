"""What the sparse layers share: the kept values and where they stand."""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from ppkernels import _powered
from ppkernels._powered import is_masked, is_powered, weight_parameter
from ppkernels._shares import check_share, entries_of
from ppkernels.autograd import Power
from ppkernels.nn.checkpoint import INDICES, MASKS, taken_topology
from ppkernels.nn.masks import Masked
from ppkernels.nn.powered import Powered
from ppkernels.nn.sparse_change import bound_of, change_topology, drawn, exchange_values
from ppkernels.nn.sparse_folded import FoldedSparse
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

    def become_plain(self) -> None:
        """Turn into the layer for inference. The weight must hold what `theta` is.

        For those who take layers apart; `pp.fold` is the way for all others.
        """
        weight, bias = self._parameters.pop("weight"), self._parameters.pop("bias")
        topology = self.__dict__.pop("_topology")
        super().become_plain()
        cast(FoldedSparse, self).hold(topology, cast(Tensor, weight), bias)

    # ---- another topology

    def change_topology(
        self,
        drop: Tensor,
        grow: Tensor,
        values: Tensor | None = None,
        *,
        optimizer: Optimizer | None = None,
    ) -> Tensor:
        """Drop some entries and grow others, in place and without a dense weight.

        The weight stays the same Parameter, with another number of values; kept entries keep
        theirs, their bits in the masks and their state in ``optimizer``. Grown entries are trained
        and seen, and their state is 0 (a float32 master copy is their value). The step counts of
        the state stay as they are, and ``.grad`` becomes None. Layers that share the weight, which
        must have the same topology, change with it.

        Under torch.compile the next call compiles once more where the number of entries is another
        one. What else knows of the weight has to be made anew: DistributedDataParallel, and
        averages as torch.optim.swa_utils.AveragedModel.

        Args:
            drop: which entries: their positions in ``weight``, int64 [D], or a bool for each, [E].
            grow: places in the flattened weight of the dense layer, n·K + k for row n and column k,
                int64 [G]: such as are not kept, or are dropped in this call.
            values: θ of the grown entries in the order of ``grow``, [G]; drawn by default as
                `reset_parameters` draws, never 0.
            optimizer: the one that steps the weight. The state of an optimizer that is not told
                stays that of the entries before, which is an error in its next step or, where as
                many are grown as dropped, wrong.

        Returns:
            int64 [E']: where each of the entries now stood before, −1 for the grown ones.

        Raises:
            TypeError, ValueError: what `pp.Topology.changed` raises; values of another kind or
                shape; a value 0 for a powered layer with α > 1, where it would stay 0; an optimizer
                that does not have the weight; a layer with another topology that shares it.
            RuntimeError: a weight that torch.nn.utils has parametrized or pruned.

        Nothing is changed when an error is raised.

        Example::

            weakest = layer.theta.abs().topk(100, largest=False).indices
            grow = (~layer.topology.mask()).unpack().flatten().nonzero().flatten()[:100]
            layer.change_topology(weakest, grow, optimizer=optimizer)
        """
        return change_topology(self, drop, grow, values, optimizer)

    def _move(self, topology: Topology, weight: Tensor, masks: dict[str, BitMask]) -> None:
        """Stand on another topology, with these values and masks; the same Parameter."""
        parameter = self._own_weight(type(self).__name__)
        if parameter.data is not weight:
            exchange_values(parameter, weight)
        parameter.grad = None
        self._topology = topology
        for name in MASKS:
            setattr(self, f"_{name}", masks.get(name))
        _powered.weights_changed()

    def _check_fits(self, weight: Tensor) -> None:
        if weight.shape != self._topology.columns.shape:
            raise ValueError(
                f"{type(self).__name__}: the new weight must have a value for each of the "
                f"{self._topology.count()} entries of topology, got shape {tuple(weight.shape)}"
            )
        super()._check_fits(weight)

    # ---- checkpoints

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in INDICES:
            # A copy, for an average over state_dicts writes into their tensors.
            destination[prefix + name] = getattr(self._topology, name).clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        tells = any(prefix + name in state_dict for name in INDICES)
        try:
            topology = taken_topology(state_dict, prefix, self._topology)
            if topology is not None and topology is not self._topology:
                size = topology.count()
                self._move(topology, self.weight.new_empty(size, requires_grad=False), {})
        except (TypeError, ValueError, RuntimeError) as error:
            # Nothing of this layer is loaded.
            error_msgs.append(f'"{prefix}weight": {error}')
            return
        if topology is None:
            missing_keys.extend(prefix + name for name in INDICES)
        if tells:
            # It comes from a layer that could have masks: those that it lacks are None.
            self._update_mask = self._mask = None
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )

    def reset_parameters(self) -> None:
        """Draw θ and the bias as the dense layer draws them; no θ is 0."""
        with torch.no_grad():
            self.weight.copy_(drawn(self.weight, self._topology))
            if self.bias is not None:
                bound = bound_of(self._topology)
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
        raise TypeError(f"{op}: the {type(layer).__name__} given cannot be sparse: {reason}")


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
