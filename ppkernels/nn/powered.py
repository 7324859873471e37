"""What the powered layers share: the exponent, what the weight stores, checkpoints."""
# Longer than 350 lines: all that a powered layer does otherwise than nn.Module stands together.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ppkernels import _powered
from ppkernels._checks import alpha_tensor, check_alpha, check_floating
from ppkernels._powered import Keep, PoweredLayer, Stores, weight_parameter
from ppkernels.autograd import Power
from ppkernels.nn.checkpoint import refuse_to_convert, saved_alpha
from ppkernels.nn.masks import Masked
from ppkernels.ops import inverse_power, power, rebase

ModuleT = TypeVar("ModuleT", bound=nn.Module)

# Devices that hold no float64, or no values at all; a layer there keeps its exponent on the CPU.
_NO_FLOAT64 = ("meta", "mps")


class Powered(Masked):
    """Makes a layer of torch.nn a powered one: ``class PowerLinear(Powered, nn.Linear)``.

    Attributes:
        weight: the trained parameter: θ itself where ``stores`` is ``"theta"``, φ where it is
            ``"phi"``.
        stores: ``"theta"`` or ``"phi"``; fixed when the layer is made.
        alpha: α, a 0-dim float64 buffer. It follows the layer from device to device but keeps its
            dtype and its value through every cast; on devices without float64 it stays on the CPU.
            Assigning another such tensor leaves the weight as it is; `set_alpha` asks what to keep.
        update_mask: a `pp.BitMask` of the weight's shape, or None. An entry whose bit is 0 is
            frozen: the optimizers of `pp.optim` keep its value and its state bit for bit, whatever
            momentum, decay and clipping do; the steps of all other optimizers are refused.
        mask: a `pp.BitMask` of the weight's shape, or None. An entry of θ whose bit is 0 is 0 to
            the network and gets no gradient; the stored value survives and is seen again when the
            bit is. Momentum and decay move it still, unless ``update_mask`` freezes it. Modules
            that read ``weight`` themselves (nn.MultiheadAttention, the fast path of
            nn.TransformerEncoderLayer) do not see the mask.

    Both masks may be assigned at any time; a mask comes to the weight's device and follows the
    layer. They go with the layer into copies, pickles and checkpoints, but are no buffers: the
    average of a torch.optim.swa_utils.AveragedModel has the masks of the moment when it was copied,
    and hears of no later one.

    Where φ is stored, whoever writes to ``weight`` writes φ: ``nn.init.kaiming_uniform_(weight)``
    draws φ, not θ. Draw θ aside and give it to `set_theta`, or use `pp.nn.init`.

    Checkpoints: the state_dict holds what the plain layer's would, plus ``alpha``, and where φ is
    stored a 0-dim ``stores_phi``, 1, that says so. Loading converts: from φ to θ or back where
    checkpoint and layer store different things, and from a plain layer's checkpoint (neither key),
    whose values are θ and leave the layer's exponent as it is. Loading a checkpoint with an
    exponent sets the layer's. The words of the masks stand under ``update_mask`` and ``mask`` where
    these are set; loading sets both masks, to None where a powered layer's checkpoint has none, and
    leaves them as they are where the checkpoint is a plain layer's. torch.distributed.checkpoint
    loads only keys that the model has when it begins: there a new model needs masks, of any bits,
    first.

    A program of torch.export has the exponent as a buffer, which may change, and the masks as
    constants. It is for inference: it has no gradient of φ, and none through masks.
    """

    # Until a layer has its exponent it is a plain one, whose weight is θ.
    stores: Stores = "theta"
    alpha: Tensor
    stores_phi: Tensor
    weight: Tensor

    # The class that fold() gives back; an instance has its own where powerize() met another one.
    plain_class: type[nn.Module] = nn.Module

    def __new__(cls, *args: Any, **kwargs: Any) -> Powered:
        # Constructor, deepcopy and unpickling all come through here.
        self = super().__new__(cls)
        _powered.enrol(self)
        return self

    def give_alpha(self, alpha: float | Tensor, stores: Stores) -> None:
        """Set what the layer stores and its exponent. The weight keeps its bits, whatever it holds.

        For those who build layers: it turns an instance of the plain class, once its ``__class__``
        is a powered one, into a working layer. Afterwards use `set_alpha`.

        Raises:
            TypeError, ValueError: an exponent that is none, or another word in ``stores``.
        """
        check_stores(type(self).__name__, stores)
        value = alpha_value(type(self).__name__, alpha)
        self.stores = stores
        # The device is named because a `with torch.device("meta")` would lose the value.
        self.register_buffer("alpha", torch.tensor(value, dtype=torch.float64, device="cpu"))
        if stores == "phi":
            # float64 as alpha is: averaging a model's buffers fails on bool and truncates integers.
            self.register_buffer("stores_phi", torch.ones_like(self.alpha))
        self._place_buffers()
        _powered.enrol(self)

    @property
    def theta(self) -> Tensor:
        """The weight that the network sees, ``mask`` applied; differentiable in ``weight``."""
        if self.stores == "theta":
            return self._hide(self.weight)
        return Power.apply(self.weight, self.alpha, self._words(self.weight))

    def set_theta(self, values: Tensor) -> None:
        """Overwrite ``weight`` in place so that `theta` equals ``values`` where ``mask`` shows it.

        All values are stored, those that are hidden or frozen too. Exact where θ is stored; within
        α+1 ULP where φ is (float32, compiled CPU kernels).

        Args:
            values: θ, of the weight's shape; any floating dtype and device.

        Raises:
            TypeError, ValueError: ``values`` of another kind or shape.
        """
        weight = self._own_weight("set_theta")
        check_floating("set_theta", "values", values)
        if values.shape != weight.shape:
            raise ValueError(
                f"set_theta: values must have the shape of weight, {tuple(weight.shape)}, "
                f"got {tuple(values.shape)}"
            )
        with torch.no_grad():
            weight.copy_(values if self.stores == "theta" else inverse_power(values, self.alpha))

    def set_alpha(self, alpha: float | Tensor, *, keep: Keep) -> None:
        """As `pp.set_alpha` on this layer; layers that share its weight change with it."""
        value = alpha_value("set_alpha", alpha)
        check_keep(keep)
        weight, layers = self._may_change_alpha()
        if keep != self.stores:
            # θ = sign(φ)|φ|^α both times, so φ kept is θ ↦ |θ|^(α'/α) and θ kept is φ ↦ |φ|^(α/α').
            before, after = self.alpha, torch.full_like(self.alpha, value)
            exponents = (after, before) if self.stores == "theta" else (before, after)
            with torch.no_grad():
                weight.copy_(rebase(weight, *exponents))
        for layer in layers:
            layer.alpha.fill_(value)

    def _may_change_alpha(self) -> tuple[nn.Parameter, list[PoweredLayer]]:
        """The weight, and all the layers whose exponent belongs to it; an error if they differ."""
        weight = self._own_weight("set_alpha")
        layers = {id(layer): layer for layer in (self, *_powered.layers_of(weight))}
        if any(layer.stores != self.stores for layer in layers.values()):
            raise ValueError(
                f"set_alpha: {self} shares its weight with a layer that stores "
                f"{'phi' if self.stores == 'theta' else 'theta'}; one weight cannot be both"
            )
        return weight, list(layers.values())

    def become_plain(self) -> None:
        """Turn into the plain layer again, without masks. The weight must hold what `theta` is.

        The opposite of `give_alpha`, for those who take layers apart; `pp.fold` is the way for all
        others.
        """
        plain_class = self.plain_class
        for name in ("alpha", "stores_phi"):
            self._buffers.pop(name, None)
        for name in ("stores", "plain_class"):
            self.__dict__.pop(name, None)
        self._drop_masks()
        self.__class__ = plain_class  # type: ignore[assignment]
        _powered.dismiss(self)

    def reset_parameters(self) -> None:
        """Draw θ as the plain layer draws its weight, whatever α: φ = sign(u)·|u|^(1/α)."""
        super().reset_parameters()  # type: ignore[misc]
        if self.stores == "phi":
            self.set_theta(self.weight)

    def extra_repr(self) -> str:
        plain = super().extra_repr()
        masks = self._described_masks()
        return f"{plain}, alpha={self.alpha.item()}, stores={self.stores!r}{masks}"

    # ---- where weight or exponent is exchanged for another tensor, the registry hears of it

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight" and param is not None:
            self._check_masks_fit(param)
        super().register_parameter(name, param)
        _powered.weights_changed()

    # `layer.alpha = tensor` comes here too.
    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        is_alpha = name == "alpha" and "_is_replica" not in self.__dict__
        if is_alpha:
            tensor = alpha_tensor(type(self).__name__, cast(Tensor, tensor))
        super().register_buffer(name, tensor, persistent)
        if is_alpha:
            _powered.weights_changed()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        _powered.weights_changed()

    def _replicate_for_data_parallel(self) -> Powered:
        # nn.Module's own would come through __new__, and each enrolment makes every optimizer look
        # through its weights again. A replica lives for one forward and trains nothing.
        replica: Powered = object.__new__(type(self))
        replica.__dict__ = {
            **self.__dict__,
            "_parameters": {},
            "_buffers": self._buffers.copy(),
            "_modules": self._modules.copy(),
            "_is_replica": True,
        }
        return replica

    def _own_weight(self, op: str) -> nn.Parameter:
        weight = weight_parameter(self)
        if weight is None:
            raise RuntimeError(
                f"{op}: the weight of {self} is no longer a Parameter of its own "
                "(torch.nn.utils.prune, parametrize or weight_norm has replaced it)"
            )
        return weight

    # ---- devices and dtypes

    def _apply(self: ModuleT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModuleT:
        own = [self._buffers[name] for name in ("alpha", "stores_phi") if name in self._buffers]

        def on_all_but_own(tensor: Tensor) -> Tensor:
            return tensor if any(tensor is buffer for buffer in own) else fn(tensor)

        super()._apply(on_all_but_own, recurse)  # type: ignore[no-untyped-call]
        cast(Powered, self)._place_buffers()
        cast(Powered, self)._share_buffers()
        _powered.weights_changed()
        return self

    def _place_buffers(self) -> None:
        """Bring the layer's own buffers and masks to its weight's device."""
        self._place_masks()
        device = self.weight.device
        if device.type in _NO_FLOAT64:
            device = torch.device("cpu")
        for name in ("alpha", "stores_phi"):
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.device != device:
                self._buffers[name] = buffer.to(device)

    def _share_buffers(self) -> None:
        """After share_memory() the weight is shared, and so is what belongs to it."""
        weight = self.weight
        if type(weight) is not nn.Parameter or weight.device.type != "cpu":
            return
        if weight.is_shared():  # type: ignore[no-untyped-call]
            for name in ("alpha", "stores_phi"):
                if name in self._buffers:
                    self._buffers[name].share_memory_()  # type: ignore[union-attr]
            self._share_masks()

    # ---- checkpoints

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
        saved_phi = bool(state_dict.pop(prefix + "stores_phi", False))
        is_powered = prefix + "alpha" in state_dict
        masks = self._take_masks(state_dict, prefix, is_powered, error_msgs)
        alpha = saved_alpha(state_dict.get(prefix + "alpha"), self.alpha, prefix, error_msgs)
        if saved_phi != (self.stores == "phi"):
            if weight_parameter(self) is None:
                refuse_to_convert(state_dict, prefix, saved_phi, error_msgs)
            elif isinstance(weight := state_dict.get(prefix + "weight"), Tensor):
                # In the wider of the two dtypes, so that the value is rounded once.
                if not local_metadata.get("assign_to_params_buffers", False):
                    weight = weight.to(torch.promote_types(weight.dtype, self.weight.dtype))
                convert = power if saved_phi else inverse_power
                state_dict[prefix + "weight"] = convert(weight.detach(), alpha)
        # The loader takes these as the layer's own: same kind, no key missing, none unexpected.
        state_dict[prefix + "alpha"] = torch.full_like(self.alpha, alpha)
        if self.stores == "phi":
            state_dict[prefix + "stores_phi"] = torch.ones_like(self.stores_phi)
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
        self._place_buffers()
        _powered.weights_changed()


def check_stores(op: str, stores: str) -> None:
    """``stores`` is one of the two words."""
    if stores not in ("theta", "phi"):
        raise ValueError(f"{op}: stores must be 'theta' or 'phi', got {stores!r}")


def check_keep(keep: str) -> None:
    """``keep`` is one of the two words."""
    if keep not in ("phi", "theta"):
        raise ValueError(f"set_alpha: keep must be 'phi' or 'theta', got {keep!r}")


def alpha_value(op: str, alpha: float | Tensor) -> float:
    """The exponent as a checked Python float; a tensor on a GPU is waited for."""
    if isinstance(alpha, Tensor):
        alpha = alpha_tensor(op, alpha, alpha.device).item()
    return check_alpha(op, alpha)


def set_alpha(module: nn.Module, alpha: float | Tensor, *, keep: Keep) -> None:
    """Change the exponent of a powered layer, or of every powered layer in ``module``.

    With ``keep="phi"`` the values of φ stay and θ jumps to sign(θ)·|θ|^(α'/α); small weights shrink
    when α rises. With ``keep="theta"`` the outputs stay and φ becomes sign(φ)·|φ|^(α/α'). There is
    no default: the two train differently. Where what is kept is what the layer stores, its weight
    keeps its bits.

    Weight and exponent change in place: the same Parameter objects, no new graph under
    torch.compile. Layers that share a weight change together, those outside ``module`` too.
    Gradients and optimizer state are left as they are.

    Args:
        module: a powered layer, or any module that holds some.
        alpha: α' ≥ 1, a float or a 0-dim float64 tensor.
        keep: ``"phi"`` or ``"theta"``.

    Raises:
        TypeError, ValueError: an exponent that is none, another word in ``keep``, no powered layer,
            tied layers that store different things.
        RuntimeError: a weight that torch.nn.utils has parametrized or pruned.

    Nothing is changed when an error is raised.
    """
    value = alpha_value("set_alpha", alpha)
    check_keep(keep)
    layers = [cast(Powered, layer) for layer in _powered.powered_layers(module).values()]
    if not layers:
        raise ValueError(
            f"set_alpha: {type(module).__name__} holds no powered layer; pp.powerize makes them"
        )
    for layer in layers:
        layer._may_change_alpha()
    for layer in {id(layer.weight): layer for layer in layers}.values():
        layer.set_alpha(value, keep=keep)
