"""Refuses the optimizers that would train a weight θ as if it were not powered."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ppkernels import _powered

# For each optimizer: when it was looked through (the registry's generation and the number of its
# parameters), and which of its parameters are weights of θ-storing layers.
_seen: WeakKeyDictionary[Optimizer, tuple[int, int, list[Tensor]]] = WeakKeyDictionary()


def _refuse_plain_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Raise if ``optimizer`` knows nothing of powered layers and would move the weight of one.

    A global hook, so it runs before every step of every optimizer: half a microsecond once an
    optimizer has been looked through.
    """
    if not _powered.any_layers() or getattr(optimizer, "steps_theta", False):
        return
    size = 0
    for group in optimizer.param_groups:
        size += len(group["params"])
    seen = _seen.get(optimizer)
    if seen is None or seen[0] != _powered.generation() or seen[1] != size:
        seen = _seen[optimizer] = (_powered.generation(), size, _theta_weights(optimizer))
    for weight in seen[2]:
        # A closure may fill the gradient later; a frozen weight that kept one would still move.
        if weight.requires_grad or weight.grad is not None:
            raise RuntimeError(_refusal(optimizer, weight))


def _theta_weights(optimizer: Optimizer) -> list[Tensor]:
    _powered.refresh()
    return [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if _powered.theta_layer(parameter) is not None
    ]


def _refusal(optimizer: Optimizer, weight: Tensor) -> str:
    name = type(optimizer).__name__
    frozen = (
        ""
        if weight.requires_grad
        else " (The weight is frozen, but its .grad is not None, so the step would move it all the "
        "same: set .grad to None.)"
    )
    return (
        f"{name}.step: the weight of {_powered.theta_layer(weight)} holds theta, and {name} would "
        "train it as a plain weight, without the power. Two ways out: step it with pp.optim."
        "PowerSGD, or let the layer store phi, which any optimizer may step: "
        f"pp.powerize(pp.fold(model), alpha, stores='phi').{frozen}"
    )


register_optimizer_step_pre_hook(_refuse_plain_step)
