"""The two masks of a powered layer: which entries are trained, and which the network sees."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppkernels import _powered
from ppkernels.autograd import ApplyMask
from ppkernels.ops import BitMask

MASKS = ("update_mask", "mask")


class Masked(nn.Module):
    """Gives a layer with a ``weight`` its masks: no buffers, so that nobody averages their bits.

    `ppkernels.nn.Powered` says what they do. They live in the layer's ``__dict__``, under the names
    below, from the first assignment on.
    """

    weight: Tensor
    _update_mask: BitMask | None = None
    _mask: BitMask | None = None

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

    def _check_masks_fit(self, weight: Tensor) -> None:
        """A new ``weight`` has the shape of the masks that are set."""
        for name, mask in self._masks().items():
            if mask.shape != weight.shape:
                raise ValueError(
                    f"{type(self).__name__}: the new weight must have the shape of {name}, "
                    f"{tuple(mask.shape)}, got {tuple(weight.shape)}; set the masks to None first"
                )

    def _placed(self, mask: BitMask) -> BitMask:
        device = self.weight.device
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

    def _place_masks(self) -> None:
        for name, mask in self._masks().items():
            setattr(self, f"_{name}", self._placed(mask))

    def _share_masks(self) -> None:
        for mask in self._masks().values():
            mask.words.share_memory_()  # type: ignore[no-untyped-call]

    def _drop_masks(self) -> None:
        for name in MASKS:
            self.__dict__.pop(f"_{name}", None)

    def _described_masks(self) -> str:
        """What the masks add to the layer's repr."""
        parts = []
        for name, mask in self._masks().items():
            kept = "meta" if mask.words.is_meta else str(mask.count())
            parts.append(f", {name}={kept}/{mask.numel()}")
        return "".join(parts)

    # ---- checkpoints: the words under the mask's name, where a mask is set

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, mask in self._masks().items():
            # A copy, for an average over state_dicts writes into their tensors.
            destination[prefix + name] = mask.words.clone()

    def _take_masks(
        self, state_dict: dict[str, Any], prefix: str, is_powered: bool, error_msgs: list[str]
    ) -> dict[str, BitMask | None]:
        """Takes the masks out of a checkpoint; returns what is to be set, nothing after an error.

        A powered layer's checkpoint that has no masks says that there are none. One of a plain
        layer (or not ``is_powered``) says nothing about them.
        """
        saved = {
            name: state_dict.pop(prefix + name) for name in MASKS if prefix + name in state_dict
        }
        taken: dict[str, BitMask | None] = dict.fromkeys(MASKS) if is_powered else {}
        errors = []
        for name, words in saved.items():
            try:
                taken[name] = BitMask(words, self.weight.shape)
            except (TypeError, ValueError) as error:
                errors.append(f'"{prefix}{name}": {error}')
        error_msgs.extend(errors)
        return {} if errors else taken
