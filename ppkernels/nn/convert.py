"""Turns the layers of a model into powered ones, in place, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from ppkernels._checks import DTYPES
from ppkernels._powered import Stores, is_powered, layers_of, powered_layers, weight_parameter
from ppkernels.nn.conv import PowerConv1d, PowerConv2d, PowerConv3d
from ppkernels.nn.linear import PowerLinear
from ppkernels.nn.powered import Powered, alpha_value, check_stores

ModelT = TypeVar("ModelT", bound=nn.Module)
Alpha = float | Tensor
Select = Callable[[str, nn.Module], bool] | Iterable[str]

# Exact types: a subclass may use its weight in a way of its own. The second is how
# nn.MultiheadAttention writes its output projection, and otherwise an nn.Linear.
_POWERED: dict[type[nn.Module], type[Powered]] = {
    nn.Linear: PowerLinear,
    NonDynamicallyQuantizableLinear: PowerLinear,
    nn.Conv1d: PowerConv1d,
    nn.Conv2d: PowerConv2d,
    nn.Conv3d: PowerConv3d,
}

# Modules that read the weight of these children themselves, so it has to be θ.
_READERS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2", "self_attn.out_proj"),
}


def powerize(
    model: ModelT,
    alpha: Alpha | Mapping[str, Alpha] | Callable[[str, nn.Module], Alpha],
    stores: Stores = "theta",
    *,
    select: Select | None = None,
) -> ModelT:
    """Turn the linear and convolution layers of ``model`` into powered ones, in place.

    The modules and Parameters stay the same objects: hooks, tied weights and an optimizer's
    references hold. Outputs stay too: bit for bit with ``stores="theta"``; with ``stores="phi"`` θ
    is within α+1 ULP of what it was (float32, compiled CPU kernels). Nothing is changed when an
    error is raised.

    Powered are modules of exactly these types: nn.Linear (the output projection inside
    nn.MultiheadAttention included), nn.Conv1d, nn.Conv2d, nn.Conv3d. All others are left alone:
    transposed convolutions, embeddings, nn.Bilinear, recurrent layers, the input projection of
    nn.MultiheadAttention, subclasses, lazy layers that have seen no batch yet, layers whose weight
    torch.nn.utils has parametrized or pruned. Asking for one of them by name is an error.

    A layer that is powered already stays as it is, provided it has the exponent and ``stores``
    asked for; else it is an error, for `set_alpha` says what is to be kept.

    ``stores="phi"`` is refused where somebody else reads the weight: in nn.MultiheadAttention and
    nn.TransformerEncoderLayer, and where a weight is tied to a module that is not powered along
    (an embedding, say). A module of your own that reads a child's ``.weight`` is not noticed; it
    has to read ``.theta``.

    Args:
        model: any module; a layer itself is changed and returned.
        alpha: α ≥ 1 for all layers; or a mapping from names (of ``model.named_modules()``) to α,
            which also chooses the layers; or a function of name and layer.
        stores: ``"theta"``: the weight is θ, to be stepped by an optimizer of `pp.optim`;
            ``"phi"``: the weight is φ, for any optimizer.
        select: which layers: the names of some, or a function of name and layer, asked about those
            that can be powered. All of them by default.

    Returns:
        ``model``.

    Raises:
        TypeError: a module that was named and cannot be powered.
        ValueError: no such module; exponents that are none, or that differ between tied weights; a
            weight that cannot hold φ.

    Example::

        model = pp.powerize(torchvision.models.resnet18(), 1.5, select=lambda name, _: name != "fc")
    """
    check_stores("powerize", stores)
    chosen = _chosen(model, alpha, select)
    alphas = {name: _alpha_of(name, layer, alpha) for name, layer in chosen.items()}
    _check_powered_already(chosen, alphas, stores)
    if stores == "phi":
        _check_no_readers(model, chosen)
    _check_ties(model, chosen, alphas, stores)
    plain = {name: layer for name, layer in chosen.items() if not is_powered(layer)}
    for name, layer in plain.items():
        _become_powered(layer, alphas[name], stores)
    if stores == "phi":
        for powered in _one_per_weight(plain.values()):
            powered.set_theta(powered.weight)
    return model


def fold(model: ModelT) -> ModelT:
    """Turn the powered layers of ``model`` back into plain ones whose weight is θ, in place.

    The opposite of `powerize`: the same modules and Parameters, each layer of the class it was made
    from (nn.Linear, nn.Conv2d, ...), with no exponent. Outputs stay bit for bit the same.

    Args:
        model: any module; a powered layer itself is changed and returned.

    Returns:
        ``model``.

    Raises:
        TypeError: a subclass of a powered layer, which has no plain class.
        RuntimeError: a weight that torch.nn.utils has parametrized or pruned.
        ValueError: φ is stored in a weight that a powered layer outside ``model`` shares.
    """
    layers = {name: cast(Powered, layer) for name, layer in powered_layers(model).items()}
    for name, layer in layers.items():
        weight = weight_parameter(layer)
        if weight is None:
            raise RuntimeError(
                f"fold: the weight of {_called(name, layer)} is no longer a Parameter of its own "
                "(torch.nn.utils.prune, parametrize or weight_norm has replaced it); undo that "
                "first"
            )
        if type(layer) not in _POWERED.values():
            raise TypeError(
                f"fold: {_called(name, layer)} is a subclass of a powered layer, and nobody but "
                "you can say which plain class it folds to"
            )
        tied = [other for other in layers_of(weight) if other not in layers.values()]
        if layer.stores == "phi" and tied:
            raise ValueError(
                f"fold: {_called(name, layer)} shares its weight, which holds phi, with {tied[0]} "
                "outside the model; fold a module that contains both"
            )
    for layer in _one_per_weight(layers.values()):
        if layer.stores == "phi":
            with torch.no_grad():
                layer.weight.copy_(layer.theta)
    for layer in layers.values():
        layer.become_plain()
    return model


# ---- which layers, with which exponent


def _chosen(
    model: nn.Module,
    alpha: Alpha | Mapping[str, Alpha] | Callable[[str, nn.Module], Alpha],
    select: Select | None,
) -> dict[str, nn.Module]:
    """The layers to power by name, those included that are powered already."""
    if isinstance(select, str):
        raise TypeError(f"powerize: select must be several names or a function, got {select!r}")
    if select is None and isinstance(alpha, Mapping):
        select = list(alpha)
    if select is not None and not callable(select):
        named = {name: _named(model, name) for name in select}
        if len({id(layer) for layer in named.values()}) < len(named):
            raise ValueError(f"powerize: two of the names {list(named)} mean the same layer")
        return named
    chosen = {}
    for name, module in model.named_modules():
        if _obstacle(module) is None and (select is None or select(name, module)):
            chosen[name] = module
    return chosen


def _named(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"powerize: {type(model).__name__} has no module named {name!r}") from None
    obstacle = _obstacle(module)
    if obstacle is not None:
        raise TypeError(f"powerize: {_called(name, module)} cannot be powered: {obstacle}")
    return module


def _obstacle(module: nn.Module) -> str | None:
    """Why ``module`` cannot be powered; None if it can be, or is."""
    if is_parametrized(module):
        return "torch.nn.utils has parametrized it"
    if is_powered(module):
        return None
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "it is lazy; run a batch through the model first"
    if type(module) not in _POWERED:
        return "only nn.Linear, nn.Conv1d, nn.Conv2d and nn.Conv3d can be, and no subclasses"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is no Parameter (torch.nn.utils has normalised or pruned it)"
    if weight.dtype not in DTYPES:
        return f"its weight is {weight.dtype}, not a floating dtype that has kernels"
    taken = [name for name in ("alpha", "theta", "stores") if hasattr(module, name)]
    return f"it has an attribute {taken[0]!r} of its own" if taken else None


def _alpha_of(
    name: str,
    layer: nn.Module,
    alpha: Alpha | Mapping[str, Alpha] | Callable[[str, nn.Module], Alpha],
) -> float:
    op = f"powerize: {_called(name, layer)}"
    if isinstance(alpha, Mapping):
        if name not in alpha:
            raise ValueError(f"{op} is selected, but the mapping alpha has no entry for it")
        return alpha_value(op, alpha[name])
    return alpha_value(op, alpha(name, layer) if callable(alpha) else alpha)


# ---- what may not be


def _check_powered_already(
    chosen: dict[str, nn.Module], alphas: dict[str, float], stores: Stores
) -> None:
    for name, layer in chosen.items():
        if not is_powered(layer):
            continue
        layer = cast(Powered, layer)
        if layer.stores != stores:
            raise ValueError(
                f"powerize: {_called(name, layer)} is powered already and stores "
                f"{layer.stores}, not {stores}; to change that, pp.fold it first"
            )
        if float(layer.alpha) != alphas[name]:
            raise ValueError(
                f"powerize: {_called(name, layer)} is powered already with alpha "
                f"{float(layer.alpha)}, not {alphas[name]}; pp.set_alpha(..., keep=...) changes an "
                "exponent, or leave the layer out with select"
            )


def _check_no_readers(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    names = {id(layer): name for name, layer in chosen.items()}
    for reader_name, reader in model.named_modules():
        for kind, children in _READERS.items():
            if not isinstance(reader, kind):
                continue
            read = (dict(reader.named_modules()).get(child) for child in children)
            for layer in read:
                if id(layer) in names:
                    raise ValueError(
                        f"powerize: {_called(names[id(layer)], layer)} cannot store phi, because "
                        f"{_called(reader_name, reader)} reads its weight and would take phi for "
                        "theta; use stores='theta', or leave the layer out with select"
                    )


def _check_ties(
    model: nn.Module, chosen: dict[str, nn.Module], alphas: dict[str, float], stores: Stores
) -> None:
    """Whoever shares a weight must agree on what it holds, and under which exponent."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    names = {id(layer): name for name, layer in chosen.items()}
    for name, layer in chosen.items():
        for other_name, other in owners[id(layer.weight)]:
            if other is layer:
                continue
            pair = f"{_called(name, layer)} and {_called(other_name, other)} share one weight"
            wanted, other_wanted = (
                (alphas[name], stores),
                (alphas.get(names.get(id(other), "")), stores),
            )
            if is_powered(other):
                other = cast(Powered, other)
                other_wanted = (float(other.alpha), other.stores)
            elif id(other) not in names:
                if stores == "theta":
                    continue
                raise ValueError(
                    f"powerize: {pair}, and the second would take phi for theta; use "
                    "stores='theta', or leave the first out with select"
                )
            if wanted != other_wanted:
                raise ValueError(
                    f"powerize: {pair}, so they need the same alpha and stores; got "
                    f"alpha={wanted[0]}, stores={wanted[1]!r} and alpha={other_wanted[0]}, "
                    f"stores={other_wanted[1]!r}"
                )
            if stores == "phi" and is_powered(other) and not is_powered(layer):
                raise ValueError(
                    f"powerize: {pair}, which holds phi for the second already; tie them after "
                    "both are powered"
                )


# ---- the change itself


def _become_powered(layer: nn.Module, alpha: float, stores: Stores) -> None:
    plain_class = type(layer)
    layer.__class__ = _POWERED[plain_class]
    powered = cast(Powered, layer)
    powered.give_alpha(alpha, stores)
    if plain_class is not powered.plain_class:
        powered.__dict__["plain_class"] = plain_class


def _one_per_weight(layers: Iterable[nn.Module]) -> Iterable[Powered]:
    return {id(layer.weight): cast(Powered, layer) for layer in layers}.values()


def _called(name: str, module: nn.Module | None) -> str:
    """A module as an error names it: ``'encoder.0' (Linear)``."""
    return f"{name!r} ({type(module).__name__})" if name else f"the {type(module).__name__} given"
