"""Which layers of a model `pp.powerize` and `pp.nn.add_masks` are to change, and to what."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from ppkernels._checks import DTYPES, check_model
from ppkernels._powered import is_masked, is_powered
from ppkernels.nn.conv import (
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    PowerConv1d,
    PowerConv2d,
    PowerConv3d,
)
from ppkernels.nn.linear import MaskedLinear, PowerLinear
from ppkernels.nn.masks import Masked
from ppkernels.nn.powered import Powered, alpha_value
from ppkernels.nn.sparse_conv import PowerSparseConv2d, SparseConv2d
from ppkernels.nn.sparse_linear import PowerSparseLinear, SparseLinear

Alpha = float | Tensor
Alphas = Alpha | Mapping[str, Alpha] | Callable[[str, nn.Module], Alpha]
Select = Callable[[str, nn.Module], bool] | Iterable[str]

# Exact types: a subclass may use its weight in a way of its own. The second is how
# nn.MultiheadAttention writes its output projection, and otherwise an nn.Linear.
MASKED: dict[type[nn.Module], type[Masked]] = {
    nn.Linear: MaskedLinear,
    NonDynamicallyQuantizableLinear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
}
POWERED: dict[type[nn.Module], type[Powered]] = {
    nn.Linear: PowerLinear,
    NonDynamicallyQuantizableLinear: PowerLinear,
    nn.Conv1d: PowerConv1d,
    nn.Conv2d: PowerConv2d,
    nn.Conv3d: PowerConv3d,
    MaskedLinear: PowerLinear,
    MaskedConv1d: PowerConv1d,
    MaskedConv2d: PowerConv2d,
    MaskedConv3d: PowerConv3d,
    SparseLinear: PowerSparseLinear,
    SparseConv2d: PowerSparseConv2d,
}
_KINDS = "only nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d can be, and no subclasses"


@dataclass(frozen=True)
class Change:
    """What a function does to layers.

    Attributes:
        op: the function, as errors call it.
        done: what a layer is afterwards, in words.
        is_done: whether a layer is that already.
        classes: which class becomes which.
        names: the attributes that the layer gets.
    """

    op: str
    done: str
    is_done: Callable[[nn.Module], bool]
    classes: Mapping[type[nn.Module], type[Masked]]
    names: tuple[str, ...]


ADD_MASKS = Change("add_masks", "given masks", is_masked, MASKED, ("theta", "mask", "update_mask"))
POWERIZE = Change("powerize", "powered", is_powered, POWERED, ("alpha", "stores", *ADD_MASKS.names))


def selected_layers(
    change: Change, model: nn.Module, select: Select | None
) -> dict[str, nn.Module]:
    """The layers to change by name, those that are what they shall be already included."""
    check_model(change.op, model)
    if isinstance(select, str) or not (select is None or callable(select) or _is_several(select)):
        raise TypeError(f"{change.op}: select must be several names or a function, got {select!r}")
    return _selected(change, model, select)


def chosen_layers(
    model: nn.Module, alpha: Alphas, select: Select | None
) -> dict[str, tuple[nn.Module, float]]:
    """The layers to power and their exponents by name, those powered already included."""
    check_model(POWERIZE.op, model)
    if isinstance(alpha, Mapping):
        for name in alpha:
            _named(POWERIZE.op, model, name)
        if select is None:
            select = list(alpha)
    layers = selected_layers(POWERIZE, model, select)
    return {name: (layer, _alpha_of(name, layer, alpha)) for name, layer in layers.items()}


def called(name: str, module: nn.Module | None) -> str:
    """A module as an error names it: ``'encoder.0' (Linear)``."""
    return f"{name!r} ({type(module).__name__})" if name else f"the {type(module).__name__} given"


def _is_several(select: Any) -> bool:
    return isinstance(select, Iterable) and not isinstance(select, bytes)


def _selected(change: Change, model: nn.Module, select: Select | None) -> dict[str, nn.Module]:
    if select is None or callable(select):
        able = {name: each for name, each in model.named_modules() if not _obstacle(change, each)}
        if not able:
            _refuse_all(change, model)
        chosen = {
            name: layer for name, layer in able.items() if select is None or select(name, layer)
        }
    else:
        chosen = {name: _able(change, name, _named(change.op, model, name)) for name in select}
        if len({id(layer) for layer in chosen.values()}) < len(chosen):
            raise ValueError(f"{change.op}: two of the names {list(chosen)} mean the same layer")
    if not chosen:
        raise ValueError(f"{change.op}: of {type(model).__name__} no layer at all was selected")
    return chosen


def _named(op: str, model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{op}: {type(model).__name__} has no module named {name!r}") from None


def _able(change: Change, name: str, module: nn.Module) -> nn.Module:
    if reason := _obstacle(change, module):
        raise TypeError(f"{change.op}: {called(name, module)} cannot be {change.done}: {reason}")
    return module


def _refuse_all(change: Change, model: nn.Module) -> None:
    """Raise for a model in which there is nothing to change: a layer, or it holds such layers."""
    with_weights = [
        (name, module)
        for name, module in model.named_modules()
        if module._parameters or is_parametrized(module)
    ]
    if with_weights and with_weights[0][1] is model:
        _able(change, "", model)
    found = [f"{called(name, each)}: {_obstacle(change, each)}" for name, each in with_weights[:3]]
    raise ValueError(
        f"{change.op}: {type(model).__name__} holds no layer that can be {change.done}: "
        f"{'; '.join(found) or _KINDS}"
    )


def _obstacle(change: Change, module: nn.Module) -> str | None:
    """Why ``module`` cannot be changed; None if it can be, or is changed already."""
    if is_parametrized(module):
        return "torch.nn.utils has parametrized it"
    if change.is_done(module):
        return None
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy; run a batch through the model first"
    if type(module) not in change.classes:
        return _KINDS
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no Parameter (torch.nn.utils has normalised or pruned it)"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, not a floating dtype that has kernels"
    has_masks = is_masked(module)
    names = [name for name in change.names if not (has_masks and name in ADD_MASKS.names)]
    taken = [name for name in names if hasattr(module, name)]
    return f"it has an attribute {taken[0]!r} of its own" if taken else None


def _alpha_of(name: str, layer: nn.Module, alpha: Alphas) -> float:
    op = f"powerize: {called(name, layer)}"
    if isinstance(alpha, Mapping):
        if name not in alpha:
            raise ValueError(f"{op} is selected, but the mapping alpha has no entry for it")
        return alpha_value(op, alpha[name])
    return alpha_value(op, alpha(name, layer) if callable(alpha) else alpha)
