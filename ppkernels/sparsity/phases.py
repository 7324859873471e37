"""Where the adaptive algorithm stands, for the model or for each of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ppkernels._powered import PoweredLayer, powered_layers, weight_parameter
from ppkernels.ops import BitMask, statistics

Entries = Literal["all", "trained"]

# What all powered layers together are called.
MODEL = "model"


@dataclass
class Phase:
    """The layers that share one exponent, and what the algorithm remembers of them."""

    layers: dict[str, PoweredLayer]
    init: bool = True
    # Of the decision before.
    old_alpha: float | None = None
    old_sparsity: float = 0.0


def phases_of(model: nn.Module, per_layer: bool) -> dict[str, Phase]:
    """All powered layers of ``model`` as one phase, or each as its own; by name, ties once."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"AdaptiveAlpha: model must be a torch.nn.Module, got {type(model).__name__}"
        )
    layers: dict[int, tuple[str, PoweredLayer]] = {}
    for name, layer in powered_layers(model).items():
        weight = weight_parameter(layer)
        if weight is None:
            raise RuntimeError(
                f"AdaptiveAlpha: the weight of {name!r} is no longer a Parameter of its own "
                "(torch.nn.utils.prune, parametrize or weight_norm has replaced it)"
            )
        # The wrapper that torch.compile makes would give the same layer another name.
        name = name.removeprefix("_orig_mod.") or type(layer).__name__
        layers.setdefault(id(weight), (name, layer))
    if not layers:
        raise ValueError(
            f"AdaptiveAlpha: {type(model).__name__} holds no powered layer; pp.powerize makes them"
        )
    named = dict(layers.values())
    if per_layer:
        return {name: Phase({name: layer}) for name, layer in named.items()}
    return {MODEL: Phase(named)}


def sparsity_of(phases: Mapping[str, Phase], epsilon: float, entries: Entries) -> dict[str, float]:
    """The share of entries with |θ| < ε in each phase: one pass over the weights.

    Raises:
        ValueError: a phase without entries that count; a NaN, which the error names.
    """
    layers = {name: layer for phase in phases.values() for name, layer in phase.layers.items()}
    masks = {name: layer.mask for name, layer in layers.items()}
    if entries == "trained":
        masks = {name: _both(mask, layers[name].update_mask) for name, mask in masks.items()}
    # A stored θ is what it is.
    alphas = {
        name: layer.alpha if layer.stores == "phi" else None for name, layer in layers.items()
    }
    weights = {name: layer.weight.detach() for name, layer in layers.items()}
    found = statistics(weights, [epsilon], alphas, within=masks)
    shares = {}
    for name, phase in phases.items():
        below = sum(found[layer].below[epsilon] for layer in phase.layers)
        count = seen = sum(found[layer].count for layer in phase.layers)
        if entries == "all":
            count = sum(layer.weight.numel() for layer in phase.layers.values())
        if count == 0:
            raise ValueError(f"AdaptiveAlpha: {name!r} has no entries to count")
        # What a mask hides is 0 to the network.
        shares[name] = (below + count - seen) / count
    return shares


def _both(first: BitMask | None, second: BitMask | None) -> BitMask | None:
    """The mask of what both masks have; None is one that has all."""
    if first is None or second is None:
        return second if first is None else first
    return first & second
