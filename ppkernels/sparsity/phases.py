"""Where the adaptive algorithm stands, for the model or for each of its layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ppkernels._checks import check_floating, check_number, check_whole, check_word
from ppkernels._powered import (
    Keep,
    PoweredLayer,
    alpha_of_stored,
    entries_of,
    is_powered,
    powered_layers,
    powered_layers_of,
)
from ppkernels.ops import BitMask, power, rebase, statistics
from ppkernels.sparsity.layers import Select, check_present, own_weight, shown

Entries = Literal["all", "trained"]
Decision = Literal["rise", "fall", "hold"]

# What all powered layers together are called.
MODEL = "model"


@dataclass(frozen=True)
class Options:
    """What the algorithm is told, under the names of `pp.AdaptiveAlpha`."""

    epsilon: float
    period: int
    cr: float
    cd: float
    keep: Keep
    alpha_max: float
    per_layer: bool
    entries: Entries

    def __post_init__(self) -> None:
        for name, above in (("epsilon", 0), ("cr", 1), ("cd", 0), ("alpha_max", 1)):
            value = check_number("AdaptiveAlpha", name, getattr(self, name))
            if not (value > above and (name == "alpha_max" or math.isfinite(value))):
                raise ValueError(f"AdaptiveAlpha: {name} must be a number > {above}, got {value:g}")
            object.__setattr__(self, name, value)
        period = check_whole("AdaptiveAlpha", "period", self.period, at_least=1)
        object.__setattr__(self, "period", period)
        check_word("AdaptiveAlpha", "keep", self.keep, "phi", "theta")
        check_word("AdaptiveAlpha", "entries", self.entries, "all", "trained")
        if not isinstance(self.per_layer, bool):
            raise TypeError(
                f"AdaptiveAlpha: per_layer must be True or False, got {self.per_layer!r}"
            )


@dataclass(frozen=True)
class Memory:
    """What the algorithm remembers: the phase, and the decision before."""

    init: bool = True
    old_alpha: float | None = None
    old_sparsity: float = 0.0


@dataclass
class Phase:
    """The layers that share one exponent, and what the algorithm remembers of them."""

    layers: dict[str, PoweredLayer]
    memory: Memory = field(default_factory=Memory)

    def decide(self, options: Options, alpha: float, sparsity: float) -> tuple[Decision, float]:
        """The algorithm: what is decided, and the next α. No entries say nothing."""
        if math.isnan(sparsity):
            return "hold", alpha
        init, old_alpha = self.memory.init, self.memory.old_alpha
        is_new = old_alpha is not None and old_alpha != alpha
        if is_new and sparsity < self.memory.old_sparsity:
            return "fall", 1 + (alpha - 1) / options.cr
        risen = 1 + options.cr * (alpha - 1) if init else alpha + options.cd
        chosen = min(risen, options.alpha_max)
        return "rise" if chosen > alpha else "hold", chosen

    def remember(self, decision: Decision, alpha: float, sparsity: float) -> None:
        """Take note of what was decided, by which α and sparsity."""
        if not math.isnan(sparsity):
            self.memory = Memory(self.memory.init and decision != "fall", alpha, sparsity)


def phases_of(model: nn.Module, per_layer: bool, select: Select | None) -> dict[str, Phase]:
    """The chosen layers of ``model`` as one phase, or each as its own; by name, ties once."""
    layers: dict[int, tuple[str, PoweredLayer]] = {}
    for path, layer in _chosen(model, select).items():
        name = shown(path, layer)
        layers.setdefault(id(own_weight("AdaptiveAlpha", name, layer)), (name, layer))
    named = dict(layers.values())
    if per_layer:
        return {name: Phase({name: layer}) for name, layer in named.items()}
    return {MODEL: Phase(named)}


def _chosen(model: nn.Module, select: Select | None) -> dict[str, PoweredLayer]:
    powered = powered_layers(model)
    if not powered:
        raise ValueError(
            f"AdaptiveAlpha: {type(model).__name__} holds no powered layer; pp.powerize makes them"
        )
    if select is None:
        chosen = {name: each for name, each in powered.items() if each.weight.requires_grad}
    elif callable(select):
        chosen = {
            name: each for name, each in powered.items() if select(name, cast(nn.Module, each))
        }
    elif isinstance(select, (str, bytes)) or not isinstance(select, Iterable):
        raise TypeError(
            f"AdaptiveAlpha: select must be several names or a function, got {select!r}"
        )
    else:
        names = list(select)
        unknown = [name for name in names if name not in powered]
        if unknown:
            raise ValueError(
                f"AdaptiveAlpha: {unknown[0]!r} in select is none of the powered layers, which are "
                f"{', '.join(map(repr, powered))}"
            )
        chosen = {name: powered[name] for name in powered if name in names}
    if not chosen:
        raise ValueError(
            f"AdaptiveAlpha: of {type(model).__name__} no powered layer was selected"
            + (", for none requires a gradient" if select is None else "")
        )
    return chosen


def layers_of(model: nn.Module, phases: Mapping[str, Phase]) -> dict[str, PoweredLayer]:
    """All layers of ``phases`` by name, after a look whether they are what they were."""
    layers = {name: layer for phase in phases.values() for name, layer in phase.layers.items()}
    made = "powered layer that it was when the controller was made"
    paths = {
        "" if cast(nn.Module, layer) is model else name: layer for name, layer in layers.items()
    }
    check_present("AdaptiveAlpha", made, model, paths, is_powered)
    for name, layer in layers.items():
        weight = own_weight("AdaptiveAlpha", name, layer)
        if len({other.stores for other in (layer, *powered_layers_of(weight))}) > 1:
            raise ValueError(
                f"AdaptiveAlpha: {name!r} stores {layer.stores} in a weight that another layer "
                "shares and that is something else there; one weight cannot be both"
            )
    return layers


def sparsity_of(
    model: nn.Module, phases: Mapping[str, Phase], options: Options
) -> dict[str, float]:
    """The share of entries with |θ| < ε in each phase, NaN of none: one pass over the weights.

    Raises:
        ValueError: no entries that count at all; NaN or infinity among them.
        RuntimeError: layers that are not what they were.
    """
    layers = layers_of(model, phases)
    masks = {name: layer.mask for name, layer in layers.items()}
    if options.entries == "trained":
        masks = {name: _both(mask, layers[name].update_mask) for name, mask in masks.items()}
    alphas = {name: alpha_of_stored(layer) for name, layer in layers.items()}
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    for name, weight in weights.items():
        check_floating("AdaptiveAlpha", f"the weight of {name!r}", weight)
    epsilon = options.epsilon
    try:
        found = statistics(weights, [epsilon], alphas, within=masks)
    except ValueError as error:
        raise ValueError(f"AdaptiveAlpha: has the training diverged? {error}") from error
    for name, of_layer in found.items():
        if math.inf in (-of_layer.min, of_layer.max) and of_layer.count:
            raise ValueError(
                f"AdaptiveAlpha: has the training diverged? There is an infinite weight in {name!r}"
            )
    shares = {}
    for name, phase in phases.items():
        below = sum(found[layer].below[epsilon] for layer in phase.layers)
        count = seen = sum(found[layer].count for layer in phase.layers)
        if options.entries == "all":
            count = sum(map(entries_of, phase.layers.values()))
        # What a mask hides, or a sparse layer does not store, is 0 to the network.
        shares[name] = (below + count - seen) / count if count else math.nan
    if all(map(math.isnan, shares.values())):
        raise ValueError(
            f"AdaptiveAlpha: there are no entries to count in {', '.join(map(repr, shares))}"
        )
    return shares


def check_fits(name: str, layer: PoweredLayer, after: float) -> None:
    """θ under the exponent ``after``, with φ kept, is finite wherever it is now.

    Raises:
        ValueError: an entry above 1 grows beyond the dtype.
    """
    weight = layer.weight.detach()
    if weight.numel() == 0:
        return
    ends = torch.stack(torch.aminmax(weight))
    now, then = (
        _theta(layer, ends, layer.alpha),
        _theta(layer, ends, torch.full_like(layer.alpha, after)),
    )
    if now.isfinite().all() and not then.isfinite().all():
        raise ValueError(
            f"AdaptiveAlpha: with alpha {after:g} the weight of {name!r} would overflow "
            f"{str(weight.dtype).removeprefix('torch.')}: its largest |theta| is "
            f"{now.abs().max().item():g}, and entries above 1 grow with alpha; lower alpha_max, or "
            "keep='theta'"
        )


def _theta(layer: PoweredLayer, ends: Tensor, alpha: Tensor) -> Tensor:
    """What the values ``ends`` of the weight are to the network under another exponent."""
    return power(ends, alpha) if layer.stores == "phi" else rebase(ends, alpha, layer.alpha)


def _both(first: BitMask | None, second: BitMask | None) -> BitMask | None:
    """The mask of what both masks have; None is one that has all."""
    if first is None or second is None:
        return second if first is None else first
    return first & second
