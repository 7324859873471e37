"""Before and after the step of an optimizer that knows nothing of powered layers and of masks.

Its step is refused where it would train a weight θ as if it were not powered, and where its state
belongs to the entries that a weight had in another shape, dense or sparse. Where it may step a
weight, frozen entries are kept: see `ppkernels.nn.frozen`.

What cannot be seen, because the optimizer's tensors are not the layer's own: float32 master copies
of half-precision weights, the flattened parameters of FSDP1 (FSDP2 is seen), functional optimizers
that never call ``torch.optim.Optimizer.step``. Nor is anything looked at again where nothing tells
of it: a Parameter exchanged in place in a group's list, other than the first, or one put by hand
into ``layer._parameters`` that an optimizer looked through before has already. The optimizers of
`pp.optim` (PowerSGD, PowerAdamW) look at each step.
"""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ppkernels import _powered
from ppkernels._checks import is_captured
from ppkernels._resized import any_resized, check_state, is_resized
from ppkernels.nn.frozen import FrozenEntries, StepArguments, freeze
from ppkernels.ops import BitMask

# A group's own list with its length and first tensor: every tensor of the lists by itself would
# cost more than all the rest.
_Group = tuple[list[Tensor], int, Tensor | None]


class _Look(NamedTuple):
    """What was found when an optimizer was looked through."""

    # The registry's at that moment.
    generation: object
    groups: list[_Group]
    # Weights that it may not step, and those of which it may not move every entry.
    theta: list[Tensor]
    frozen: list[Tensor]
    # Those that have had other shapes.
    resized: list[Tensor]


_NEVER = _Look(None, [], [], [], [])
_seen: WeakKeyDictionary[Optimizer, _Look] = WeakKeyDictionary()
# The masks that CUDA graphs read at each replay; when a graph ends, nobody is told.
_captured: WeakKeyDictionary[Optimizer, list[BitMask]] = WeakKeyDictionary()


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Raise if ``optimizer`` would step a weight θ wrongly; begin to keep frozen entries.

    A global hook, so it runs before every step of every optimizer: half a microsecond once an
    optimizer has been looked through and has nothing here.
    """
    has_nothing = not (_powered.any_layers() or any_resized())
    if has_nothing or getattr(optimizer, "steps_theta", False):
        return None
    look = _seen.get(optimizer, _NEVER)
    if look.generation is not _powered.generation() or _differ(optimizer.param_groups, look.groups):
        look = _seen[optimizer] = _look_through(optimizer)
    for weight in look.resized:
        check_state(optimizer, weight)
    for weight in look.theta:
        if _may_move(weight) and not _hands_on(optimizer):
            _refuse(optimizer, weight)
    return _keep_frozen(optimizer, look, args, kwargs) if look.frozen else None


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Put frozen entries back; a global hook like the other."""
    if isinstance(args, StepArguments):
        for entries in args.frozen:
            entries.put_back()
        return
    if not _powered.any_layers():
        return
    look = _seen.get(optimizer, _NEVER)
    if look.frozen and look.generation is _powered.generation():
        raise RuntimeError(
            f"{type(optimizer).__name__}.step: frozen entries may have moved, because a step "
            "pre-hook has put new arguments in place of those that it was given; let it return "
            "None and do without"
        )


# A graph cannot hold the copies of one step.
@_disable_dynamo
def _keep_frozen(optimizer: Optimizer, look: _Look, args: Any, kwargs: Any) -> tuple[Any, Any]:
    name, frozen = f"{type(optimizer).__name__}.step", []
    for weight in [] if _hands_on(optimizer) else look.frozen:
        if weight.is_meta or not _may_move(weight):
            continue
        mask = _powered.update_mask_of(name, weight)
        if mask is None:
            continue  # the layer is gone by now
        if hasattr(weight, "__tensor_flatten__"):
            raise RuntimeError(
                f"{name}: {_powered.freezing_layer(weight)} has an update_mask, but its weight is "
                f"a {type(weight).__name__}, in which no entry can be frozen; set the layer's "
                "update_mask to None"
            )
        if is_captured(weight.device):
            _captured.setdefault(optimizer, []).append(mask)
        frozen.append(FrozenEntries(weight, mask))
    return freeze(frozen, args, kwargs)


def _may_move(weight: Tensor) -> bool:
    """Whether a step may move ``weight``.

    A closure may fill the gradient later; a frozen weight that kept one would still move.
    """
    return weight.requires_grad or weight.grad is not None


def _hands_on(optimizer: Optimizer) -> bool:
    """Whether ``optimizer`` hands its steps to one that knows of powers and masks.

    ZeroRedundancyOptimizer and wrappers like it have the optimizer that steps as ``optim``.
    """
    return getattr(getattr(optimizer, "optim", None), "steps_theta", False)


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
    groups = [(params, len(params), params[0] if params else None) for params in lists]
    weights = [weight for params in lists for weight in params]
    theta = [weight for weight in weights if _powered.theta_layer(weight) is not None]
    frozen = [weight for weight in weights if _powered.freezing_layer(weight) is not None]
    for weight in frozen:
        _powered.check_one_update_mask(f"{type(optimizer).__name__}.step", weight)
    resized = [weight for weight in weights if is_resized(weight)]
    return _Look(generation, groups, theta, frozen, resized)


def _refuse(optimizer: Optimizer, weight: Tensor) -> None:
    """Raise, unless the layer is gone by now."""
    layer, name = _powered.theta_layer(weight), type(optimizer).__name__
    if layer is None:
        return
    hint = (
        ""
        if weight.requires_grad
        else " (The weight is frozen, but its .grad is not None, so the step would move it all the "
        "same: set .grad to None.)"
    )
    raise RuntimeError(
        f"{name}.step: the weight of {layer} holds theta, and {name} would "
        "train it as a plain weight, without the power. Two ways out: step it with an "
        "optimizer of pp.optim (PowerSGD, PowerAdamW), or let the layer store phi, which any "
        "optimizer may step: "
        f"pp.powerize(pp.fold(model), alpha, stores='phi').{hint}"
    )


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
