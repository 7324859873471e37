"""Which entries of a model's weights a pruner has pruned, and which it may prune."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from ppkernels import _powered
from ppkernels._powered import MaskedLayer, is_sparse
from ppkernels.nn import add_masks
from ppkernels.nn.checkpoint import MASKS
from ppkernels.nn.choice import ADD_MASKS, MASKED, called, selected_layers
from ppkernels.ops import BitMask, apply_mask
from ppkernels.sparsity.layers import Select, check_present, own_weight
from ppkernels.sparsity.watch import Watch
from ppkernels.sparsity.weights import Size, Weight

# How errors call what is done to layers here.
_PRUNE = replace(ADD_MASKS, op="Pruner", done="pruned")


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
    Until `convert` the layers have no masks, and nothing but `whole_sizes` can be asked.
    """

    def __init__(self, model: nn.Module, select: Select | None) -> None:
        self.model = model
        self.layers = _chosen(model, select)
        # The entries of each weight that are not pruned; nothing for a weight that is whole.
        self.masks: dict[str, BitMask] = {}
        # The update masks with its zeros that the layers of each pruned weight have been given.
        self._given: list[tuple[nn.Parameter, list[tuple[MaskedLayer, BitMask]]]] = []
        self._generation: object = None
        self._watch = Watch()

    def convert(self) -> None:
        """Make plain layers layers with masks."""
        add_masks(self.model, select=list(self.layers))

    def whole_sizes(self) -> dict[str, Size]:
        """The sizes of the weights if no entry of them is frozen or hidden."""
        shared = self._names()
        return {
            names[0]: Size(weight.shape, weight.numel(), tuple(names[1:]))
            for weight, names in shared.items()
        }

    def _names(self) -> dict[nn.Parameter, list[str]]:
        """Each weight with the names of the layers that have it."""
        names: dict[nn.Parameter, list[str]] = {}
        for name, layer in self.layers.items():
            names.setdefault(own_weight("Pruner", name, layer), []).append(name)
        return names

    def weights(self) -> dict[str, nn.Parameter]:
        """The weights by the name of their layer; one that several layers share comes once."""
        _check_not_sparse(self.layers, RuntimeError)
        made = "layer with masks that it was when the pruner was made"
        hint = " (and pp.fold a model when all is pruned)"
        check_present("Pruner", made, self.model, self.layers, _powered.is_masked, hint)
        return {names[0]: weight for weight, names in self._names().items()}

    def ranked(self) -> dict[str, Weight]:
        """The weights as scores see them."""
        found = {}
        for name, weight in self.weights().items():
            if weight.is_meta:
                raise RuntimeError(
                    f"Pruner: the weight of {name!r} is on the meta device, which holds no values "
                    "to rank; load the model's values first"
                )
            layer = self.layers[name]
            found[name] = Weight(weight, _powered.alpha_of_stored(layer))
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
        weights, sizes = self.weights(), self.whole_sizes()
        for name, within in self.within().items():
            if within is not None:
                entries = (within | ~self.mask(name, weights[name])).count()
                sizes[name] = sizes[name]._replace(entries=entries)
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
        self._join()
        self._given = []
        for name, weight in self.weights().items():
            mask = self.mask(name, weight)
            if name not in self.masks or mask.count() == mask.numel():
                continue
            with torch.no_grad():
                weight.copy_(apply_mask(weight.detach(), mask.words))
            self._given.append((weight, _give(weight, mask)))
        self._generation = _powered.generation()
        self._watch.start([weight for weight, _ in self._given])

    def _join(self) -> None:
        """Weights that were tied after a pruning are pruned where either was."""
        for first, *others in self._names().values():
            masks = [self.masks.pop(name) for name in (first, *others) if name in self.masks]
            if masks:
                device = masks[0].device
                self.masks[first] = functools.reduce(
                    operator.and_, [mask.to(device) for mask in masks]
                )

    def is_undone(self) -> bool:
        """Whether pruned entries may be trained, or may not be 0: a look of some microseconds."""
        if self._generation is not _powered.generation():
            for weight, given in self._given:
                layers = _powered.masked_layers_of(weight)
                if len(layers) != len(given) or any(
                    layer is not known or layer.update_mask is not mask
                    for layer, (known, mask) in zip(layers, given, strict=True)
                ):
                    return True
            self._generation = _powered.generation()
        return self._watch.is_written()

    def _take_back(self) -> None:
        """Set the bits that pruning has cleared in the masks that the layers were given.

        A mask that is another one by now has come from somebody else, and is left alone.
        """
        masks = {id(weight): self.mask(name, weight) for name, weight in self.weights().items()}
        for weight, given in self._given:
            for layer, mask in given:
                if id(weight) in masks and layer.update_mask == mask:
                    whole = mask.to(weight.device) | ~masks[id(weight)]
                    layer.update_mask = None if whole.count() == whole.numel() else whole
        self._given = []

    def load(self, state: Any) -> None:
        """Take over the words of masks by name; nothing is changed after an error."""
        if not isinstance(state, dict):
            raise ValueError(
                "Pruner.load_state_dict: kept must be a dict from names to words, got "
                f"{type(state).__name__}"
            )
        self.weights()  # the layers are those that they were
        shapes = {name: weight.shape for weight, names in self._names().items() for name in names}
        masks = {}
        for name, words in state.items():
            if name not in shapes:
                raise ValueError(
                    f"Pruner.load_state_dict: {name!r} is none of the layers to prune, which are "
                    f"{', '.join(map(repr, shapes))}"
                )
            try:
                masks[name] = BitMask(words, shapes[name])
            except (TypeError, ValueError) as error:
                raise ValueError(f"Pruner.load_state_dict: {name!r}: {error}") from None
        self._take_back()
        self.masks = masks
        self.enforce()


def _share(count: int, entries: int) -> float:
    return count / entries if entries else 1.0


def _give(weight: nn.Parameter, mask: BitMask) -> list[tuple[MaskedLayer, BitMask]]:
    """Clear in the layers' update masks the bits that ``mask`` lacks; the masks they have then.

    Layers that share a weight must agree, so one that had no mask gets what the others freeze.
    """
    layers = _powered.masked_layers_of(weight)
    own = [layer.update_mask for layer in layers if layer.update_mask is not None]
    joint = functools.reduce(operator.and_, own, mask)
    given = []
    for layer in layers:
        if layer.update_mask is None or layer.update_mask != joint:
            layer.update_mask = joint
        given.append((layer, layer.update_mask))
    return given


def _chosen(model: nn.Module, select: Select | None) -> dict[str, MaskedLayer]:
    """The layers to prune by name, in the model's order; plain ones may be among them still."""
    every = dict(model.named_modules(remove_duplicate=False))
    if select is None or callable(select):
        _check_left_out(every, select)
    if select is None:
        _check_trained(model)
    layers = selected_layers(_PRUNE, model, _is_trained if select is None else select)
    # A set has another order in each process.
    found = {name: cast(MaskedLayer, layers[name]) for name in every if name in layers}
    _check_not_sparse(found, TypeError)
    return found


def _check_not_sparse(layers: Mapping[str, MaskedLayer], error: type[Exception]) -> None:
    """No layer stores kept entries alone: what is pruned there would still be stored."""
    for name, layer in layers.items():
        if is_sparse(layer):
            raise error(
                f"Pruner: {called(name, cast(nn.Module, layer))} cannot be pruned: it is sparse. "
                "What it does not store stays 0 without a pruner; to prune further, pp.densify the "
                "model, prune it, and pp.sparsify it again, or leave the layer out with select"
            )


def _is_trained(name: str, layer: nn.Module) -> bool:
    weight = _powered.weight_parameter(layer)
    return weight is None or weight.requires_grad


def _check_trained(model: nn.Module) -> None:
    """There is a layer to prune by default, if any can be pruned."""
    layers = selected_layers(_PRUNE, model, None)
    if not any(_is_trained(name, layer) for name, layer in layers.items()):
        raise ValueError(
            f"Pruner: no weight of {type(model).__name__} that can be pruned requires a gradient; "
            f"name layers with select, {next(iter(layers))!r} for example"
        )


def _check_left_out(
    modules: dict[str, nn.Module], select: Callable[[str, nn.Module], bool] | None
) -> None:
    """No layer goes unpruned by a slip: it is still lazy, or its masks came before `add_masks`."""
    for name, module in modules.items():
        slip = None
        if getattr(module, "cls_to_become", None) in MASKED:
            slip = "it is lazy; run a batch through the model first"
        elif type(module) in MASKED:
            early = [mask for mask in MASKS if isinstance(module.__dict__.get(mask), BitMask)]
            if early:
                slip = (
                    f"its {early[0]} was assigned before it had masks; delete the attribute, call "
                    "pp.nn.add_masks(model), and assign it then"
                )
        if slip and (select is None or select(name, module)):
            raise TypeError(f"Pruner: {called(name, module)} cannot be pruned: {slip}")
