"""Which entries of a model's weights a pruner has pruned, and which it may prune."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ppkernels import _powered
from ppkernels._powered import MaskedLayer
from ppkernels.nn import add_masks
from ppkernels.ops import BitMask, apply_mask
from ppkernels.sparsity.weights import Size, Weight

Select = Callable[[str, nn.Module], bool] | Iterable[str]


@dataclass(frozen=True)
class Kept:
    """How many weights of a model are left. Frozen and hidden entries are not counted.

    Attributes:
        counts: by layer, the entries that are not pruned.
        entries: by layer, the entries that are or may be pruned.
    """

    counts: dict[str, int]
    entries: dict[str, int]

    @property
    def count(self) -> int:
        """The entries of all layers that are not pruned."""
        return sum(self.counts.values())

    @property
    def share(self) -> float:
        """Their share; 1 of no entries."""
        return _share(self.count, sum(self.entries.values()))

    @property
    def shares(self) -> dict[str, float]:
        """The share of each layer."""
        return {name: _share(count, self.entries[name]) for name, count in self.counts.items()}

    def __str__(self) -> str:
        rows = [
            f"{name}: {self.counts[name]} of {self.entries[name]} ({share:.2%})"
            for name, share in self.shares.items()
        ]
        total = f"{self.count} of {sum(self.entries.values())} ({self.share:.2%}) kept"
        return "\n".join([*rows, total])


class Entries:
    """The entries of the weights that a pruner has been given; not pruned at first.

    Whether an entry is frozen or hidden is asked of the layers each time, and is theirs to say.
    """

    def __init__(self, model: nn.Module, select: Select | None) -> None:
        self.model = model
        self.layers = _chosen(model, select)
        # The entries of each weight that are not pruned; nothing for a weight that is whole.
        self.masks: dict[str, BitMask] = {}

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights by the name of their layer; one that several layers share comes once."""
        present = dict(self.model.named_modules(remove_duplicate=False))
        for name, layer in self.layers.items():
            if present.get(name) is not layer or not _powered.is_masked(layer):
                raise RuntimeError(
                    f"Pruner: {name!r} is no longer the layer with masks that it was when the "
                    "pruner was made; make a new one (and pp.fold a model when all is pruned)"
                )
        weights = {name: _parameter(name, layer) for name, layer in self.layers.items()}
        first = {id(weight): name for name, weight in reversed(weights.items())}
        return {name: weights[name] for name in weights if first[id(weights[name])] == name}

    def ranked(self) -> dict[str, Weight]:
        """The weights as scores see them."""
        found = {}
        for name, weight in self.weights().items():
            layer = self.layers[name]
            alpha = None
            if _powered.is_powered(layer) and layer.stores == "phi":
                alpha = layer.alpha
            found[name] = Weight(weight, alpha)
        return found

    def mask(self, name: str, weight: nn.Parameter) -> BitMask:
        """The entries that are not pruned."""
        mask = self.masks.get(name)
        return BitMask.ones(weight.shape, weight.device) if mask is None else mask.to(weight.device)

    def within(self) -> dict[str, BitMask | None]:
        """By weight, the entries that may be pruned: left, trained and seen; None for all."""
        return {name: self._within(name, weight) for name, weight in self.weights().items()}

    def _within(self, name: str, weight: nn.Parameter) -> BitMask | None:
        masks = [self.mask(name, weight)] if name in self.masks else []
        layers = _powered.masked_layers_of(weight)
        masks += [layer.update_mask for layer in layers if layer.update_mask is not None]
        seen = [layer.mask for layer in layers if layer.mask is not None]
        if len(seen) == len(layers):  # else there is one that sees all
            masks.append(functools.reduce(operator.or_, seen))
        return functools.reduce(operator.and_, masks) if masks else None

    def sizes(self) -> dict[str, Size]:
        """By weight, its shape and how many entries are or may be pruned."""
        weights, sizes = self.weights(), {}
        for name, within in self.within().items():
            weight = weights[name]
            entries = weight.numel()
            if within is not None:
                entries = (within | ~self.mask(name, weight)).count()
            sizes[name] = Size(weight.shape, entries)
        return sizes

    def left(self) -> dict[str, int]:
        """By weight, how many entries may be pruned."""
        weights = self.weights()
        return {
            name: weights[name].numel() if mask is None else mask.count()
            for name, mask in self.within().items()
        }

    def keep(self, masks: dict[str, BitMask]) -> None:
        """Prune all that may be pruned but the entries of ``masks``."""
        within, weights = self.within(), self.weights()
        for name, mask in masks.items():
            able = within[name]
            untouched = None if able is None else self.mask(name, weights[name]) - able
            self.masks[name] = mask if untouched is None else mask | untouched
        self.enforce()

    def enforce(self) -> None:
        """Set pruned entries to 0, and their bits in the update masks of the layers."""
        for name, weight in self.weights().items():
            mask = self.mask(name, weight)
            if name not in self.masks or mask.count() == mask.numel():
                continue
            with torch.no_grad():
                weight.copy_(apply_mask(weight.detach(), mask.words))
            for layer in _powered.masked_layers_of(weight):
                own = layer.update_mask
                layer.update_mask = mask if own is None else own & mask

    def load(self, state: dict[str, Any]) -> None:
        """Take over the words of masks by name; nothing is changed after an error."""
        weights, masks = self.weights(), {}
        for name, words in state.items():
            if name not in weights:
                raise ValueError(
                    f"Pruner.load_state_dict: {name!r} is none of the layers to prune, which are "
                    f"{', '.join(map(repr, weights))}"
                )
            try:
                masks[name] = BitMask(words, weights[name].shape)
            except (TypeError, ValueError) as error:
                raise ValueError(f"Pruner.load_state_dict: {name!r}: {error}") from None
        self.masks = masks
        self.enforce()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # its class comes with the compiler
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model


def _share(count: int, entries: int) -> float:
    return count / entries if entries else 1.0


def _parameter(name: str, layer: MaskedLayer) -> nn.Parameter:
    weight = _powered.weight_parameter(layer)
    if weight is None:
        raise RuntimeError(
            f"Pruner: the weight of {name!r} is no longer a Parameter of its own "
            "(torch.nn.utils.prune, parametrize or weight_norm has replaced it)"
        )
    if type(weight) is not nn.Parameter:
        raise TypeError(
            f"Pruner: the weight of {name!r} is a {type(weight).__name__}, whose entries may be "
            "elsewhere; prune before the model is sharded"
        )
    return weight


def _chosen(model: nn.Module, select: Select | None) -> dict[str, MaskedLayer]:
    """The layers to prune by name; plain ones become layers with masks."""
    names: list[str] = []

    def is_chosen(name: str, layer: nn.Module) -> bool:
        chosen = select is None or (callable(select) and select(name, layer))
        if chosen:
            names.append(name)
        return chosen

    if select is None or callable(select):
        add_masks(model, select=is_chosen)
    else:
        if isinstance(select, Iterable) and not isinstance(select, str):
            select = names = list(select)
        add_masks(model, select=select)
    layers = dict(model.named_modules(remove_duplicate=False))
    return {name: cast(MaskedLayer, layers[name]) for name in names}
