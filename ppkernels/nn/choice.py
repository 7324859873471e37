"""Which layers of a model `pp.powerize` is to power, and which exponent each gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from ppkernels._checks import DTYPES
from ppkernels._powered import is_powered
from ppkernels.nn.conv import PowerConv1d, PowerConv2d, PowerConv3d
from ppkernels.nn.linear import PowerLinear
from ppkernels.nn.powered import Powered, alpha_value

Alpha = float | Tensor
Alphas = Alpha | Mapping[str, Alpha] | Callable[[str, nn.Module], Alpha]
Select = Callable[[str, nn.Module], bool] | Iterable[str]

# Exact types: a subclass may use its weight in a way of its own. The second is how
# nn.MultiheadAttention writes its output projection, and otherwise an nn.Linear.
POWERED: dict[type[nn.Module], type[Powered]] = {
    nn.Linear: PowerLinear,
    NonDynamicallyQuantizableLinear: PowerLinear,
    nn.Conv1d: PowerConv1d,
    nn.Conv2d: PowerConv2d,
    nn.Conv3d: PowerConv3d,
}
_OWN_NAMES = ("alpha", "theta", "stores", "mask", "update_mask")
_KINDS = "only nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d can be, and no subclasses"


def chosen_layers(
    model: nn.Module, alpha: Alphas, select: Select | None
) -> dict[str, tuple[nn.Module, float]]:
    """The layers to power and their exponents by name, those powered already included."""
    check_model("powerize", model)
    if isinstance(select, str) or not (select is None or callable(select) or _is_several(select)):
        raise TypeError(f"powerize: select must be several names or a function, got {select!r}")
    if isinstance(alpha, Mapping):
        for name in alpha:
            _named(model, name)
        if select is None:
            select = list(alpha)
    layers = _selected(model, select)
    return {name: (layer, _alpha_of(name, layer, alpha)) for name, layer in layers.items()}


def check_model(op: str, model: Any) -> None:
    """``model`` is a torch.nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")


def called(name: str, module: nn.Module | None) -> str:
    """A module as an error names it: ``'encoder.0' (Linear)``."""
    return f"{name!r} ({type(module).__name__})" if name else f"the {type(module).__name__} given"


def _is_several(select: Any) -> bool:
    return isinstance(select, Iterable) and not isinstance(select, bytes)


def _selected(model: nn.Module, select: Select | None) -> dict[str, nn.Module]:
    if select is None or callable(select):
        able = {name: layer for name, layer in model.named_modules() if not obstacle(layer)}
        if not able:
            _refuse_all(model)
        chosen = {
            name: layer for name, layer in able.items() if select is None or select(name, layer)
        }
    else:
        chosen = {name: _able(name, _named(model, name)) for name in select}
        if len({id(layer) for layer in chosen.values()}) < len(chosen):
            raise ValueError(f"powerize: two of the names {list(chosen)} mean the same layer")
    if not chosen:
        raise ValueError(f"powerize: of {type(model).__name__} no layer at all was selected")
    return chosen


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"powerize: {type(model).__name__} has no module named {name!r}") from None


def _able(name: str, module: nn.Module) -> nn.Module:
    if reason := obstacle(module):
        raise TypeError(f"powerize: {called(name, module)} cannot be powered: {reason}")
    return module


def _refuse_all(model: nn.Module) -> None:
    """Raise for a model in which there is nothing to power: it is a layer, or holds such layers."""
    with_weights = [
        (name, module)
        for name, module in model.named_modules()
        if module._parameters or is_parametrized(module)
    ]
    if with_weights and with_weights[0][1] is model:
        _able("", model)
    found = [f"{called(name, module)}: {obstacle(module)}" for name, module in with_weights[:3]]
    raise ValueError(
        f"powerize: {type(model).__name__} holds no layer that can be powered: "
        f"{'; '.join(found) or _KINDS}"
    )


def obstacle(module: nn.Module) -> str | None:
    """Why ``module`` cannot be powered; None if it can be, or is."""
    if is_parametrized(module):
        return "torch.nn.utils has parametrized it"
    if is_powered(module):
        return None
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy; run a batch through the model first"
    if type(module) not in POWERED:
        return _KINDS
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no Parameter (torch.nn.utils has normalised or pruned it)"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, not a floating dtype that has kernels"
    taken = [name for name in _OWN_NAMES if hasattr(module, name)]
    return f"it has an attribute {taken[0]!r} of its own" if taken else None


def _alpha_of(name: str, layer: nn.Module, alpha: Alphas) -> float:
    op = f"powerize: {called(name, layer)}"
    if isinstance(alpha, Mapping):
        if name not in alpha:
            raise ValueError(f"{op} is selected, but the mapping alpha has no entry for it")
        return alpha_value(op, alpha[name])
    return alpha_value(op, alpha(name, layer) if callable(alpha) else alpha)
