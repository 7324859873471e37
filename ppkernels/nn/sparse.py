"""What the sparse layers share: the kept values and where they stand."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ppkernels import _powered
from ppkernels._powered import is_masked, is_powered
from ppkernels.autograd import Power
from ppkernels.nn.checkpoint import INDICES, MASKS, taken_topology
from ppkernels.nn.masks import Masked
from ppkernels.nn.powered import Powered
from ppkernels.nn.sparse_change import (
    Optimizers,
    bound_of,
    change_topology,
    drawn,
    exchange_topology,
    whole_weight,
)
from ppkernels.nn.sparse_folded import FoldedSparse
from ppkernels.nn.sparse_kept import (
    NO_VALUES,
    bits_at,
    check_no_obstacle,
    dense_bits,
    pruned_mask,
)
from ppkernels.ops import BitMask, Topology

SparseT = TypeVar("SparseT", bound="Sparse")


class Sparse(Masked):
    """Makes a layer with masks a sparse one: ``class SparseLinear(Sparse)``.

    Attributes:
        weight: the trained parameter: the kept values alone, [E], in row-major order of their
            places. It has one dimension, so what is told apart by that, as biases and norms from
            weights when groups of an optimizer are made, has to ask for the layer. Optimizers that
            treat each weight by itself train it as they train the dense one; torch's Muon, which
            needs a matrix, refuses it, and Adafactor factors nothing. ``weight_norm`` divides each
            value by itself, and ``spectral_norm`` all of them by one norm, that of the row.
            Clipping (torch.nn.utils.clip_grad_norm_) counts what is kept alone: the total norm is
            smaller than that of the masked dense layer, whose gradient is dense, so that runs with
            clipping are not the same.
        topology: a `pp.Topology`: where the values stand in the weight of the dense layer. It
            changes by `change_topology` and by loading a checkpoint alone, and is no buffer:
            copies, pickles and checkpoints have it, but DistributedDataParallel sends only the
            values from process to process. Its layers must start with the same topology: from one
            seed, one checkpoint, or one plan of `pp.sparsify`. So must those that are averaged.
            Where FSDP2 has sharded the values they are trained, and the topology stays.
        update_mask, mask: as in `Masked`, of the shape [E].

    Checkpoints: the state_dict holds what that of `Masked` or `Powered` does, with ``weight`` [E],
    and the ``offsets`` and ``columns`` of the topology. Loading takes over the topology: the weight
    stays the same Parameter with another number of values, its ``.grad`` becomes None, and
    optimizer state is left as it is (load the optimizer's own afterwards). Indices that are none
    are an error, and the layer stays as it was. A checkpoint of the dense layer, its masks
    included, is taken where it is 0 wherever this layer has no entry; else it is an error, as that
    of a sparse layer is for a dense one: which entries to keep is asked when a layer becomes
    sparse. ``strict=False`` takes values without indices as those of the layer's own topology, and
    indices without values, as files have them that hold a shared weight once (safetensors'
    ``save_model``), as `change_topology` to them: values that the layer does not have are drawn.
    Layers that share the weight, of the same topology, take over the new one together.

    In a torch.compile'd model the first backward pass that asks for the input's gradient makes
    indices that the topology then keeps, so the second call compiles once more; a step before, or
    ``layer.topology.transposed()``, saves that. A program of torch.export has the topology as
    constants; `pp.fold` makes layers that have it as buffers.
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

        Raises:
            RuntimeError: a weight or bias that torch.nn.utils has parametrized or pruned; a weight
                that is sharded (DTensor).
        """
        self._check_own_parameters("to_dense")
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

    def _check_own_parameters(self, op: str) -> nn.Parameter:
        """The weight; it and the bias are Parameters of the layer's own."""
        weight = whole_weight(op, self)
        if "bias" not in self._parameters:
            raise RuntimeError(
                f"{op}: the bias of {self} is no longer a Parameter of its own "
                "(torch.nn.utils.prune or parametrize has replaced it)"
            )
        return weight

    def _dense_layer(self, **options: Any) -> nn.Module:
        """A dense layer with masks of this one's sizes, powered if this one is."""
        raise NotImplementedError

    def _take(self, dense: nn.Module, kept: Topology | None) -> None:
        """Become the sparse layer of ``dense``, whose sizes this one has already."""
        update_mask = dense.update_mask if is_masked(dense) else None
        weight = cast(nn.Parameter, dense.weight)
        if kept is None and weight.is_meta:
            check_no_obstacle(type(self).__name__, dense, NO_VALUES)
        topology = Topology.of_mask(pruned_mask(dense)) if kept is None else kept
        self._topology = topology
        # Indices have values there too.
        is_meta = weight.is_meta
        values = weight.new_empty(topology.count()) if is_meta else topology.gather(weight)
        self.weight = nn.Parameter(values, weight.requires_grad)
        self.register_parameter("bias", dense._parameters["bias"])
        if is_powered(dense):
            cast(Powered, self).give_alpha(dense.alpha, dense.stores)
        if is_masked(dense):
            self.update_mask = bits_at(topology, update_mask)
            self.mask = bits_at(topology, dense.mask)
        self.train(dense.training)

    def become_plain(self) -> None:
        """Turn into the layer for inference. The weight must hold what `theta` is.

        Entries that are 0 are not kept. For those who take layers apart; `pp.fold` is the way for
        all others.
        """
        weight = cast(Tensor, self._parameters.pop("weight")).detach()
        bias, topology = self._parameters.pop("bias"), self.__dict__.pop("_topology")
        if not weight.is_meta and bool((is_zero := weight == 0).any()):
            nowhere = torch.empty(0, dtype=torch.int64, device=weight.device)
            topology, origin = topology.changed(is_zero, nowhere)
            weight = weight[origin]
        super().become_plain()
        cast(FoldedSparse, self).hold(topology, weight, bias)

    # ---- another topology

    def change_topology(
        self,
        drop: Tensor,
        grow: Tensor,
        values: Tensor | None = None,
        *,
        optimizer: Optimizers = None,
    ) -> Tensor:
        """Drop some entries and grow others, in place and without a dense weight.

        The weight stays the same Parameter, with another number of values; kept entries keep
        theirs, their bits in the masks and their state in ``optimizer``. Grown entries are trained
        and seen, and their state is 0 (a float32 master copy is their value). The step counts of
        the state stay as they are, and ``.grad`` becomes None. Layers that share the weight, which
        must have the same topology, change with it.

        Under torch.compile each new number of entries compiles the next call once more, and after
        some of them (torch._dynamo.config.recompile_limit) torch gives up: it runs the layer
        uncompiled, and with ``fullgraph=True`` it raises. Grow as many as you drop, and nothing is
        compiled again after the first change. What else knows of the weight has to be made anew:
        DistributedDataParallel, and averages as torch.optim.swa_utils.AveragedModel.

        Args:
            drop: which entries: their positions in ``weight``, int64 [D], or a bool for each, [E].
            grow: places in the flattened weight of the dense layer, n·K + k for row n and column k,
                int64 [G]: such as are not kept, or are dropped in this call.
            values: θ of the grown entries in the order of ``grow``, [G]; drawn by default as
                `reset_parameters` draws, never 0.
            optimizer: the one that steps the weight, or several. The state of an optimizer that is
                not told stays that of the entries before, which is an error in its next step or,
                where as many are grown as dropped, silently wrong.

        Returns:
            int64 [E']: where each of the entries now stood before, −1 for the grown ones.

        Raises:
            TypeError, ValueError: what `pp.Topology.changed` raises; values of another kind or
                shape, or NaN or infinite; a value 0, also one that the weight's dtype rounds to 0,
                for a powered layer with α > 1, where it would stay 0; optimizers of which none has
                the weight; a layer with another topology that shares it.
            RuntimeError: a weight that torch.nn.utils has parametrized or pruned, or that is
                sharded (DTensor); a state that has not a number for each entry (LBFGS, Adafactor).

        Nothing is changed when an error is raised.

        Example::

            weakest = layer.theta.abs().topk(100, largest=False).indices
            grow = (~layer.topology.mask()).unpack().flatten().nonzero().flatten()[:100]
            layer.change_topology(weakest, grow, optimizer=optimizer)
        """
        return change_topology(self, drop, grow, values, optimizer)

    def _move(self, topology: Topology, masks: dict[str, BitMask]) -> None:
        """Stand on another topology, for which the weight has its values already."""
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
        has_indices = any(prefix + name in state_dict for name in INDICES)
        has_masks = any(prefix + name in state_dict for name in MASKS)
        try:
            topology = taken_topology(state_dict, prefix, self._topology)
            if topology is not None and topology is not self._topology:
                weight = whole_weight("load_state_dict", self)
                exchange_topology(self, weight, topology)
        except (TypeError, ValueError, RuntimeError) as error:
            # Nothing of this layer is loaded.
            error_msgs.append(f'"{prefix}weight": {error}')
            return
        if topology is None:
            missing_keys.extend(prefix + name for name in INDICES)
        if has_indices and not has_masks:
            # It comes from a layer that could have masks, and has none.
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


def without_weight(sparse_class: type[SparseT]) -> SparseT:
    """A layer under construction, with no attributes of its own yet."""
    layer = sparse_class.__new__(sparse_class)
    nn.Module.__init__(layer)
    return cast(SparseT, layer)
