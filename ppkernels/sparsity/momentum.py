"""An optimizer's state when φ becomes another coordinate of the same θ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from ppkernels._optimizers import group_of, innermost
from ppkernels._powered import PoweredLayer, weight_parameter

# Averages of the gradient, and of its square: how often the factor of the gradient is in them.
_DEGREES = {"momentum_buffer": 1, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2}
# States of a weight's shape that are no averages of gradients.
_OTHERS = ("master",)


def check_follows(optimizers: Sequence[Optimizer], layers: Mapping[str, PoweredLayer]) -> None:
    """The states of the layers' weights are such that `follow_alpha` can carry them over.

    Raises:
        ValueError: no optimizer holds a weight that requires a gradient.
        RuntimeError: a state holds what is not known to be an average of gradients.
    """
    for name, layer in layers.items():
        weight = layer.weight
        holding = [each for each in optimizers if group_of(each, weight) is not None]
        if weight.requires_grad and not holding:
            classes = ", ".join(type(each).__name__ for each in optimizers)
            raise ValueError(
                f"AdaptiveAlpha: keep='theta' needs the optimizer of every weight, whose momentum "
                f"has to follow, and none of those given ({classes}) holds the weight of {name!r}"
            )
        for optimizer in holding:
            _check_state(innermost(optimizer), name, layer)


def _check_state(optimizer: Optimizer, name: str, layer: PoweredLayer) -> None:
    state = _state(optimizer, layer)
    # It keeps one flat history of all weights, under the first of them.
    unknown = ["old_dirs"] if isinstance(optimizer, LBFGS) else []
    unknown += [key for key, value in state.items() if not _is_known(key, value, layer)]
    if unknown:
        raise RuntimeError(
            f"AdaptiveAlpha: nobody has said how {unknown[0]!r} in the state that "
            f"{type(optimizer).__name__} keeps of the weight of {name!r} follows when theta is "
            f"kept and phi changes; known are {', '.join(_DEGREES)}, of the weight's shape, so use "
            "SGD or one of Adam's kind, or keep='phi'"
        )


def _is_known(key: str, value: Any, layer: PoweredLayer) -> bool:
    """Whether a state is scaled, or has no part in φ: a single number, or nothing."""
    if isinstance(value, Tensor) and value.dim() > 0:
        return (key in _DEGREES or key in _OTHERS) and value.shape == layer.weight.shape
    return value is None or isinstance(value, (Tensor, bool, int, float, str))


@torch.no_grad()
def follow_alpha(optimizer: Optimizer, layer: PoweredLayer, before: float, after: float) -> None:
    """Turn averages of ∂L/∂φ into those of ∂L/∂φ', in place, after α has become α' with θ kept.

    ∂L/∂φ' = ∂L/∂φ · dφ/dφ', and dφ/dφ' = (α'/α)·|θ|^(1/α − 1/α'). Where θ = 0 and α' < α that is
    infinite, and the averages begin anew at 0. Averages of ∂L/∂θ, those of the virtual rule, stay.
    """
    state = _state(innermost(optimizer), layer)
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
    # A part of a sharded state may be that of other weights.
    group = None if weight is None else group_of(optimizer, weight)
    if weight is None or group is None:
        return {}
    averages_theta = layer.stores == "theta" and group.get("rule") == "virtual"
    return {} if averages_theta else optimizer.state.get(weight, {})
