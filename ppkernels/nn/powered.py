"""What the powered layers share: the exponent, what the weight stores, checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from ppkernels import _powered
from ppkernels._checks import alpha_tensor, check_alpha
from ppkernels._powered import Keep, PoweredLayer, Stores, weight_parameter
from ppkernels.autograd import Power
from ppkernels.nn.checkpoint import refuse_to_convert, saved_alpha
from ppkernels.nn.masks import LayerT, Masked
from ppkernels.ops import inverse_power, power, rebase

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
        update_mask, mask: as in `Masked`, which entries are trained and which the network sees.

    Where φ is stored, whoever writes to ``weight`` writes φ: ``nn.init.kaiming_uniform_(weight)``
    draws φ, not θ. Draw θ aside and give it to `set_theta`, or use `pp.nn.init`.

    Checkpoints: the state_dict holds what that of `Masked` does, plus ``alpha``, and where φ is
    stored a 0-dim ``stores_phi``, 1, that says so. Loading converts: from φ to θ or back where
    checkpoint and layer store different things, and from a plain layer's checkpoint (neither key),
    whose values are θ and leave the layer's exponent as it is. Loading a checkpoint with an
    exponent sets the layer's, and both masks, to None where it has none.

    A program of torch.export has the exponent as a buffer, which may change, and the masks as
    constants. It is for inference: it has no gradient of φ, and none through masks.
    """

    # Until a layer has its exponent it is a plain one, whose weight is θ.
    stores: Stores = "theta"
    alpha: Tensor
    stores_phi: Tensor
    weight: Tensor

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
        self._place()
        _powered.enrol(self)

    @property
    def theta(self) -> Tensor:
        """The weight that the network sees, ``mask`` applied; differentiable in ``weight``."""
        if self.stores == "theta":
            return self._hide(self.weight)
        return Power.apply(self.weight, self.alpha, self._words(self.weight))

    def _stored(self, theta: Tensor) -> Tensor:
        return theta if self.stores == "theta" else inverse_power(theta, self.alpha)

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
        layers = {id(layer): layer for layer in (self, *_powered.powered_layers_of(weight))}
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
        for name in ("alpha", "stores_phi"):
            self._buffers.pop(name, None)
        self.__dict__.pop("stores", None)
        super().become_plain()

    def reset_parameters(self) -> None:
        """Draw θ as the plain layer draws its weight, whatever α: φ = sign(u)·|u|^(1/α)."""
        super().reset_parameters()  # type: ignore[misc]
        if self.stores == "phi":
            self.set_theta(self.weight)

    def _described(self) -> str:
        return f", alpha={self.alpha.item()}, stores={self.stores!r}{super()._described()}"

    # ---- where the exponent is exchanged for another tensor, the registry hears of it

    # `layer.alpha = tensor` comes here too.
    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        is_alpha = name == "alpha" and "_is_replica" not in self.__dict__
        if is_alpha:
            tensor = alpha_tensor(type(self).__name__, cast(Tensor, tensor))
        super().register_buffer(name, tensor, persistent)
        if is_alpha:
            _powered.weights_changed()

    # ---- devices and dtypes

    def _apply(self: LayerT, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LayerT:
        own = [self._buffers[name] for name in ("alpha", "stores_phi") if name in self._buffers]

        def on_all_but_own(tensor: Tensor) -> Tensor:
            return tensor if any(tensor is buffer for buffer in own) else fn(tensor)

        super()._apply(on_all_but_own, recurse)
        return self

    def _place(self) -> None:
        super()._place()
        device = self.weight.device
        if device.type in _NO_FLOAT64:
            device = torch.device("cpu")
        for name in ("alpha", "stores_phi"):
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.device != device:
                self._buffers[name] = buffer.to(device)

    def _share(self) -> None:
        super()._share()
        for name in ("alpha", "stores_phi"):
            if name in self._buffers:
                self._buffers[name].share_memory_()  # type: ignore[union-attr]

    # ---- checkpoints

    def _translate(
        self, state_dict: dict[str, Any], prefix: str, assign: bool, error_msgs: list[str]
    ) -> None:
        saved_phi = bool(state_dict.pop(prefix + "stores_phi", False))
        alpha = saved_alpha(state_dict.get(prefix + "alpha"), self.alpha, prefix, error_msgs)
        if saved_phi != (self.stores == "phi"):
            if weight_parameter(self) is None:
                refuse_to_convert(state_dict, prefix, saved_phi, error_msgs)
            elif isinstance(weight := state_dict.get(prefix + "weight"), Tensor):
                # In the wider of the two dtypes, so that the value is rounded once.
                if not assign:
                    weight = weight.to(torch.promote_types(weight.dtype, self.weight.dtype))
                convert = power if saved_phi else inverse_power
                state_dict[prefix + "weight"] = convert(weight.detach(), alpha)
        own = {prefix + "alpha", prefix + "weight"}
        if weight_parameter(self) is not None and own.isdisjoint(state_dict):
            return  # no plain layer's: the loader says that both are missing
        # The loader takes these as the layer's own: same kind, no key missing, none unexpected.
        state_dict[prefix + "alpha"] = torch.full_like(self.alpha, alpha)
        if self.stores == "phi":
            state_dict[prefix + "stores_phi"] = torch.ones_like(self.stores_phi)


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
