"""Refuses the optimizers that would train a weight θ as if it were not powered, or frozen entries.

What it cannot see, because the optimizer's tensors are not the layer's own: float32 master copies
of half-precision weights, the flattened parameters of FSDP1 (FSDP2 is seen), functional optimizers
that never call ``torch.optim.Optimizer.step``. Nor does it look again where nothing tells it to: a
Parameter exchanged in place in a group's list, other than the first, or one put by hand into
``layer._parameters`` that an optimizer looked through before has already. The optimizers of
`pp.optim` (PowerSGD, PowerAdamW) look at each step.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ppkernels import _powered

# When an optimizer was looked through: the registry's generation, its groups' own lists with their
# length and first tensor, and which of its tensors are weights that it may not step. Every tensor
# of the lists by itself would cost more than all the rest.
_Group = tuple[list[Tensor], int, Tensor | None]
_Look = tuple[object, list[_Group], list[Tensor]]
_NEVER: _Look = (None, [], [])
_seen: WeakKeyDictionary[Optimizer, _Look] = WeakKeyDictionary()


def _refuse_plain_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Raise if ``optimizer`` knows nothing of powered layers and would step one's weight wrongly.

    A global hook, so it runs before every step of every optimizer: half a microsecond once an
    optimizer has been looked through.
    """
    if not _powered.any_layers() or getattr(optimizer, "steps_theta", False):
        return
    generation, known, weights = _seen.get(optimizer, _NEVER)
    if generation is not _powered.generation() or _differ(optimizer.param_groups, known):
        look = _seen[optimizer] = _look_through(optimizer)
        weights = look[2]
    for weight in weights:
        # A closure may fill the gradient later; a frozen weight that kept one would still move.
        if weight.requires_grad or weight.grad is not None:
            _refuse(optimizer, weight)


def _differ(groups: list[dict[str, Any]], known: list[_Group]) -> bool:
    """Whether the groups hold other tensors than when they were looked through."""
    if len(groups) != len(known):
        return True
    for group, (params, size, first) in zip(groups, known):  # noqa: B905 - no time for strict
        if (
            group["params"] is not params
            or len(params) != size
            or (size and params[0] is not first)
        ):
            return True
    return False


def _look_through(optimizer: Optimizer) -> _Look:
    # Taken first: what changes during the look makes it old again.
    generation = _powered.generation()
    _powered.refresh()
    lists = [group["params"] for group in optimizer.param_groups]
    return (
        generation,
        [(params, len(params), params[0] if params else None) for params in lists],
        [
            weight
            for params in lists
            for weight in params
            if _powered.theta_layer(weight) is not None
            or _powered.freezing_layer(weight) is not None
        ],
    )


def _refuse(optimizer: Optimizer, weight: Tensor) -> None:
    """Raise, unless the layer is gone by now or the optimizer hands its steps to one that knows."""
    layer, freezing = _powered.theta_layer(weight), _powered.freezing_layer(weight)
    # ZeroRedundancyOptimizer and wrappers like it have the optimizer that steps as `optim`.
    if getattr(getattr(optimizer, "optim", None), "steps_theta", False):
        return
    name = type(optimizer).__name__
    if layer is not None:
        raise RuntimeError(
            f"{name}.step: the weight of {layer} holds theta, and {name} would "
            "train it as a plain weight, without the power. Two ways out: step it with an "
            "optimizer of pp.optim (PowerSGD, PowerAdamW), or let the layer store phi, which any "
            "optimizer may step: "
            f"pp.powerize(pp.fold(model), alpha, stores='phi').{_hint(weight)}"
        )
    if freezing is not None:
        raise RuntimeError(
            f"{name}.step: {freezing} has an update_mask, and {name} would move the entries that "
            "it freezes. Two ways out: step the weight with an optimizer of pp.optim (PowerSGD, "
            f"PowerAdamW), or set the layer's update_mask to None.{_hint(weight)}"
        )


def _hint(weight: Tensor) -> str:
    if weight.requires_grad:
        return ""
    return (
        " (The weight is frozen, but its .grad is not None, so the step would move it all the "
        "same: set .grad to None.)"
    )


register_optimizer_step_pre_hook(_refuse_plain_step)
