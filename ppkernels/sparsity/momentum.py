"""An optimizer's state when φ becomes another coordinate of the same θ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ppkernels._powered import PoweredLayer, weight_parameter

# Averages of the gradient, and of its square: how often the factor of the gradient is in them.
_DEGREES = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
# States of a weight's shape that are no averages of gradients.
_OTHERS = ("master",)


def check_follows(optimizer: Optimizer, layer: PoweredLayer) -> None:
    """The state of ``layer``'s weight is one that `follow_alpha` can carry over.

    Raises:
        RuntimeError: it holds a tensor that is not known to be an average of gradients.
    """
    for name, value in _state(optimizer, layer).items():
        is_known = name in _DEGREES or name in _OTHERS
        if isinstance(value, Tensor) and value.shape == layer.weight.shape and not is_known:
            raise RuntimeError(
                f"AdaptiveAlpha: nobody has said how {name!r} in the state of "
                f"{type(optimizer).__name__} follows when theta is kept and phi changes; known are "
                f"{', '.join(_DEGREES)}, so use SGD or one of Adam's kind, or keep='phi'"
            )


@torch.no_grad()
def follow_alpha(optimizer: Optimizer, layer: PoweredLayer, before: float, after: float) -> None:
    """Turn averages of ∂L/∂φ into those of ∂L/∂φ', in place, after α has become α' with θ kept.

    ∂L/∂φ' = ∂L/∂φ · dφ/dφ', and dφ/dφ' = (α'/α)·|θ|^(1/α − 1/α'). Where θ = 0 and α' < α that is
    infinite, and the averages begin anew at 0. Averages of ∂L/∂θ, those of the virtual rule, stay.
    """
    state = _state(optimizer, layer)
    if not any(name in state for name in _DEGREES):
        return
    # |θ|^(1/α − 1/α') = |φ'|^(α'/α − 1)
    exponent = 1 / before - 1 / after if layer.stores == "theta" else after / before - 1
    magnitude = layer.weight.detach().abs()
    factor = magnitude.pow(exponent).mul_(after / before)
    if exponent < 0:
        factor.masked_fill_(magnitude == 0, 0)
    for name, degree in _DEGREES.items():
        if isinstance(state.get(name), Tensor):
            state[name].mul_(factor if degree == 1 else factor.square())


def _state(optimizer: Optimizer, layer: PoweredLayer) -> dict[str, Any]:
    """What ``optimizer`` keeps of ∂L/∂φ for ``layer``'s weight; nothing where it averages ∂L/∂θ."""
    weight = weight_parameter(layer)
    if weight is None:
        return {}
    for group in optimizer.param_groups:
        if any(parameter is weight for parameter in group["params"]):
            averages_theta = layer.stores == "theta" and group.get("rule") == "virtual"
            return {} if averages_theta else optimizer.state.get(weight, {})
    return {}
