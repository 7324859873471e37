"""Which weights one call of the fused step takes, and what their layers say of each."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ppkernels import _powered
from ppkernels._checks import alpha_tensor, check_floating, is_captured
from ppkernels._resized import check_state, is_resized

# What the fused step takes for "α = 1" and for "no mask".
_ONE = torch.tensor(1.0, dtype=torch.float64, device="cpu")
_NO_WORDS = torch.empty(0, dtype=torch.uint8, device="cpu")


@dataclass
class Batch:
    """The parameters of a group that one call of the fused step takes, and how each is stepped.

    Attributes:
        params: the parameters with a gradient, all on one device.
        alphas: a 0-dim float64 tensor each; its value is read at each step.
        masks: the words of each update mask, those of no elements for none; an empty list if there
            is no mask at all.
        holds_phi: 1 for a weight that holds φ, else 0.
        resized: those of the parameters that have had another shape.
        generation: the registry's when this was found out.
        group_alpha: the group's own exponent at that moment.
    """

    params: list[Tensor]
    alphas: list[Tensor]
    masks: list[Tensor]
    holds_phi: list[int]
    resized: list[Tensor]
    generation: object
    group_alpha: float | Tensor | None

    def is_for(self, params: list[Tensor], group_alpha: float | Tensor | None) -> bool:
        """Whether nothing has changed since."""
        return (
            self.generation is _powered.generation()
            and self.group_alpha is group_alpha
            and len(params) == len(self.params)
            and all(map(operator.is_, params, self.params))
        )

    def check_states(self, optimizer: Optimizer) -> None:
        """What ``optimizer`` keeps of the parameters is of the entries that they have."""
        for parameter in self.resized:
            check_state(optimizer, parameter)

    def only(self, chosen: list[int]) -> Batch:
        """The batch of some of the parameters, by their places."""

        def pick(values: list[Any]) -> list[Any]:
            return [values[i] for i in chosen] if values else []

        return replace(
            self,
            params=pick(self.params),
            alphas=pick(self.alphas),
            masks=pick(self.masks),
            holds_phi=pick(self.holds_phi),
        )


def batch_of(optimizer: str, params: list[Tensor], group_alpha: float | Tensor | None) -> Batch:
    """What the layers of ``params``, which are on one device, say at this moment."""
    # Taken first: what changes meanwhile makes the batch old again.
    generation = _powered.generation()
    alphas, masks, holds_phi = [], [], []
    for parameter in params:
        check_floating(optimizer, "parameters", parameter)
        # Where torch.nn.utils has replaced the weight, the parameter is not what the layer means;
        # one that holds θ is refused there.
        theta_layer = _powered.theta_layer(parameter)
        layers = _powered.powered_layers_of(parameter)
        own = [layer for layer in layers if _powered.weight_parameter(layer) is parameter]
        if own:
            alpha = own[0].alpha
        elif group_alpha is None or layers:
            alpha = _ONE
        else:
            alpha = alpha_tensor(optimizer, group_alpha, parameter.device)
        alphas.append(alpha)
        mask = _powered.update_mask_of(optimizer, parameter)
        masks.append(_NO_WORDS if mask is None else mask.words)
        holds_phi.append(int(bool(layers) and theta_layer is None))
    if all(words is _NO_WORDS for words in masks):
        masks = []
    resized = [parameter for parameter in params if is_resized(parameter)]
    return Batch(params, alphas, masks, holds_phi, resized, generation, group_alpha)


def check_owners(optimizer: str, parameter: Tensor, group_alpha: float | Tensor | None) -> None:
    """The layers that share ``parameter`` agree with each other, and with the group."""
    layers = _powered.masked_layers_of(parameter)
    powered = [layer for layer in layers if _powered.is_powered(layer)]
    if powered and group_alpha is not None:
        raise ValueError(
            f"{optimizer}: a group with an alpha of its own has the weight of {powered[0]}, which "
            "has its layer's; put it into another group"
        )
    if len(layers) < 2:
        return
    # Values are compared where that is possible; a GPU is waited for.
    may_ask = not is_captured(parameter.device)
    forms = {(layer.stores, float(layer.alpha) if may_ask else None) for layer in powered}
    if len(forms) > 1:
        raise ValueError(
            f"{optimizer}: {' and '.join(map(str, powered))} share one weight, so they need the "
            "same alpha and stores"
        )
    _powered.check_one_update_mask(optimizer, parameter)
