"""The two masks of a layer: which entries are trained, and which the network sees."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ppkernels import _powered
from ppkernels._checks import check_floating, normal_tensors
from ppkernels._powered import weight_parameter
from ppkernels.autograd import ApplyMask
from ppkernels.nn.checkpoint import MASKS, drop_no_power, refuse_sparse, taken_masks
from ppkernels.ops import BitMask

LayerT = TypeVar("LayerT", bound=nn.Module)


class Masked(nn.Module):
    """Gives a layer of torch.nn its masks: ``class MaskedLinear(Masked, nn.Linear)``.

    Attributes:
        weight: the trained parameter.
        update_mask: a `pp.BitMask` of the weight's shape, or None. An entry whose bit is 0 is
            frozen: every torch optimizer keeps its value bit for bit, whatever momentum, decay and
            clipping do. Those of `pp.optim` do so in their one pass and keep its state too.
        mask: a `pp.BitMask` of the weight's shape, or None. An entry of θ whose bit is 0 is 0 to
            the network and gets no gradient; the stored value survives and is seen again when the
            bit is. Momentum and decay move it still, unless ``update_mask`` freezes it. Modules
            that read ``weight`` themselves (nn.MultiheadAttention, the fast path of
            nn.TransformerEncoderLayer) do not see the mask.

    For all other optimizers global hooks of torch.optim do it: before a step (and after each call
    of its closure) the gradient is set to 0 at frozen entries, after it they get their values back.
    So the state of a frozen entry sees gradients of 0: its momentum decays, and has weight decay in
    it where that is coupled. An optimizer that mixes entries (Adafactor, Muon, LBFGS, one that
    takes norms) counts the frozen ones so. Until the step the gradient is dense, and what reads it
    before, as torch.nn.utils.clip_grad_norm_ does, counts frozen entries too: it clips more than a
    network without them would need. Each step costs a copy of the weights that have an
    ``update_mask``, a pass over their gradients and one over them (`ppkernels.nn.frozen` counts the
    bytes); the optimizers of `pp.optim` need none of it. The step post-hooks of an optimizer run
    before the values are back. Not seen are steps on tensors that are not the layer's own, such as
    master copies in another dtype and the flattened parameters of FSDP1, and writes outside a step;
    a weight in a tensor subclass (DTensor, of FSDP2) is refused.

    Both masks may be assigned at any time; a mask comes to the weight's device and follows the
    layer. They go with the layer into copies, pickles and checkpoints, but are no buffers, so that
    nobody averages their bits: the average of a torch.optim.swa_utils.AveragedModel has the masks
    of the moment when it was copied, and hears of no later one (assign them to the layers of its
    ``module``, or see `pp.sparsity.Pruner`).

    Checkpoints: the state_dict holds what the plain layer's would, and the words of the masks under
    ``update_mask`` and ``mask`` where these are set. Loading sets both masks, one that the
    checkpoint lacks to None; a checkpoint with neither, which may be a plain layer's, leaves them
    as they are. That of a powered layer is taken where its exponent is 1, else it is an error.
    torch.distributed.checkpoint loads only keys that the model has when it begins: there a new
    model needs masks, of any bits, first. A program of torch.export has the masks as constants, and
    no gradient through them.
    """

    # The masks live in the layer's __dict__, under these names, from the first assignment on.
    weight: Tensor
    _update_mask: BitMask | None = None
    _mask: BitMask | None = None

    # The class that fold() gives back; an instance has its own where it was made of another one.
    plain_class: type[nn.Module] = nn.Module

    def __new__(cls, *args: Any, **kwargs: Any) -> Masked:
        # Constructor, deepcopy and unpickling all come through here.
        self = super().__new__(cls)
        _powered.enrol(self)
        return self

    @property
    def update_mask(self) -> BitMask | None:
        """The entries of ``weight`` that are trained; None, all of them."""
        return self._update_mask

    @update_mask.setter
    def update_mask(self, mask: BitMask | None) -> None:
        self._update_mask = self._own("update_mask", mask)
        # Optimizers look up once what they are to do with a weight.
        _powered.weights_changed()

    @property
    def mask(self) -> BitMask | None:
        """The entries of θ that the network sees, the others being 0 to it; None, all of them."""
        return self._mask

    @mask.setter
    def mask(self, mask: BitMask | None) -> None:
        self._mask = self._own("mask", mask)

    @property
    def theta(self) -> Tensor:
        """The weight that the network sees, ``mask`` applied; differentiable in ``weight``."""
        return self._hide(self.weight)

    def set_theta(self, values: Tensor) -> None:
        """Overwrite ``weight`` in place so that `theta` equals ``values`` where ``mask`` shows it.

        All values are stored, those that are hidden or frozen too. Exact, but for a powered layer
        that stores φ: within α+1 ULP there (float32, compiled CPU kernels).

        Args:
            values: θ, of the weight's shape; any floating dtype and device.

        Raises:
            TypeError, ValueError: ``values`` of another kind or shape.
            RuntimeError: a weight that torch.nn.utils has parametrized or pruned.
        """
        weight = self._own_weight("set_theta")
        check_floating("set_theta", "values", values)
        if values.shape != weight.shape:
            raise ValueError(
                f"set_theta: values must have the shape of weight, {tuple(weight.shape)}, "
                f"got {tuple(values.shape)}"
            )
        with torch.no_grad():
            weight.copy_(self._stored(values))

    def _stored(self, theta: Tensor) -> Tensor:
        """What the weight holds where the network is to see ``theta``."""
        return theta

    def become_plain(self) -> None:
        """Turn into the plain layer again, without masks. The weight must hold what `theta` is.

        For those who take layers apart; `pp.fold` is the way for all others.
        """
        plain_class = self.plain_class
        for name in ("_update_mask", "_mask", "plain_class"):
            self.__dict__.pop(name, None)
        self.__class__ = plain_class  # type: ignore[assignment]
        _powered.dismiss(self)

    def extra_repr(self) -> str:
        return super().extra_repr() + self._described()

    def _own(self, name: str, mask: BitMask | None) -> BitMask | None:
        """``mask`` as this layer keeps it: checked, and on its weight's device."""
        if mask is None:
            return None
        wanted = f"{type(self).__name__}: {name} must be a pp.BitMask or None"
        if isinstance(mask, Tensor) and mask.dtype == torch.bool:
            raise TypeError(f"{wanted}, got a bool tensor; pp.BitMask.pack(tensor) makes one of it")
        if not isinstance(mask, BitMask):
            raise TypeError(f"{wanted}, got {type(mask).__name__}")
        if mask.shape != self.weight.shape:
            raise ValueError(
                f"{type(self).__name__}: {name} must have the shape of weight, "
                f"{tuple(self.weight.shape)}, got {tuple(mask.shape)}"
            )
        return self._placed(mask)

    def _check_fits(self, weight: Tensor) -> None:
        """A new ``weight`` has the shape of the masks that are set."""
        for name, mask in self._masks().items():
            if mask.shape != weight.shape:
                raise ValueError(
                    f"{type(self).__name__}: the new weight must have the shape of {name}, "
                    f"{tuple(mask.shape)}, got {tuple(weight.shape)}; set the masks to None first"
                )

    def _placed(self, mask: BitMask) -> BitMask:
        device = self.weight.device
        if mask.words.is_inference():  # autograd could not save them
            with normal_tensors():
                mask = BitMask(mask.words.clone(), mask.shape)
        # A meta tensor holds no values, and the mask's would be lost.
        return mask if device.type == "meta" else mask.to(device)

    def _hide(self, theta: Tensor) -> Tensor:
        """A stored θ as the network sees it."""
        words = self._words(theta)
        return theta if words is None else ApplyMask.apply(theta, words)

    def _words(self, weight: Tensor) -> Tensor | None:
        """The words of ``mask``, beside ``weight``; None where no mask is set."""
        mask = self._mask
        if mask is None:
            return None
        words = mask.words
        # A replica of nn.DataParallel has its weight on a GPU of its own.
        return words if words.device == weight.device else words.to(weight.device)

    def _masks(self) -> dict[str, BitMask]:
        """The masks that are set, by name."""
        found = {name: getattr(self, f"_{name}") for name in MASKS}
        return {name: mask for name, mask in found.items() if mask is not None}

    def _described(self) -> str:
        """What is added to the plain layer's repr."""
        parts = []
        for name, mask in self._masks().items():
            kept = "meta" if mask.words.is_meta else str(mask.count())
            parts.append(f", {name}={kept}/{mask.numel()}")
        return "".join(parts)

    def _own_weight(self, op: str) -> nn.Parameter:
        weight = weight_parameter(self)
        if weight is None:
            raise RuntimeError(
                f"{op}: the weight of {self} is no longer a Parameter of its own "
                "(torch.nn.utils.prune, parametrize or weight_norm has replaced it)"
            )
        return weight

    # ---- where the weight is exchanged for another tensor, the registry hears of it

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and param is not None:
            self._check_fits(param)
        super().register_parameter(name, param)
        _powered.weights_changed()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        _powered.weights_changed()

    def _replicate_for_data_parallel(self) -> Masked:
        # nn.Module's own would come through __new__, and each enrolment makes every optimizer look
        # through its weights again. A replica lives for one forward and trains nothing.
        replica: Masked = object.__new__(type(self))
        replica.__dict__ = {
            **self.__dict__,
            "_parameters": {},
            "_buffers": self._buffers.copy(),
            "_modules": self._modules.copy(),
            "_is_replica": True,
        }
        return replica

    # ---- devices

    def _apply(self: LayerT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerT:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        layer = cast(Masked, self)
        layer._place()
        weight = layer.weight
        may_be_shared = type(weight) is nn.Parameter and weight.device.type == "cpu"
        if may_be_shared and weight.is_shared():  # type: ignore[no-untyped-call]
            layer._share()
        _powered.weights_changed()
        return self

    def _place(self) -> None:
        """Bring what belongs to the weight to its device."""
        for name, mask in self._masks().items():
            setattr(self, f"_{name}", self._placed(mask))

    def _share(self) -> None:
        """After share_memory() the weight is shared, and so is what belongs to it."""
        for mask in self._masks().values():
            mask.words.share_memory_()  # type: ignore[no-untyped-call]

    # ---- checkpoints: the words under the mask's name, where a mask is set

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, mask in self._masks().items():
            # A copy, for an average over state_dicts writes into their tensors.
            destination[prefix + name] = mask.words.clone()

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
        refuse_sparse(state_dict, prefix, error_msgs)
        masks = taken_masks(state_dict, prefix, self.weight.shape, error_msgs)
        assign = local_metadata.get("assign_to_params_buffers", False)
        self._translate(state_dict, prefix, assign, error_msgs)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        for name, mask in masks.items():
            setattr(self, f"_{name}", mask)
        # With assign=True the weight may have come from another device.
        self._place()
        _powered.weights_changed()

    def _translate(
        self, state_dict: dict[str, Any], prefix: str, assign: bool, error_msgs: list[str]
    ) -> None:
        """Put the checkpoint of another kind of layer into this one's keys and values."""
        drop_no_power(state_dict, prefix, error_msgs)
