"""Who reads, shares or has a weight, and what is refused because of that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

from torch import nn

from ppkernels._powered import (
    MaskedLayer,
    Stores,
    is_masked,
    is_powered,
    masked_layers_of,
    weight_parameter,
)
from ppkernels.nn.choice import called
from ppkernels.nn.powered import Powered

Chosen = dict[str, tuple[nn.Module, float]]

# Modules that read the weight of these children themselves, so it has to be θ. By name, for not
# every PyTorch has them all, and nobody needs torchvision; subclasses read as they do.
_READERS: dict[str, tuple[str, ...]] = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torch.nn.modules.transformer.TransformerEncoderLayer": (
        "linear1",
        "linear2",
        "self_attn.out_proj",
    ),
    "torch.nn.modules.loss.LinearCrossEntropyLoss": ("linear",),
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": ("qkv", "proj"),
}


def check_powered_already(chosen: Chosen, stores: Stores) -> None:
    """A layer that is powered already has the exponent and ``stores`` asked for."""
    for name, (layer, alpha) in chosen.items():
        if not is_powered(layer):
            continue
        layer = cast(Powered, layer)
        if layer.stores != stores:
            raise ValueError(
                f"powerize: {called(name, layer)} is powered already and stores "
                f"{layer.stores}, not {stores}; to change that, pp.fold it first"
            )
        if float(layer.alpha) != alpha:
            raise ValueError(
                f"powerize: {called(name, layer)} is powered already with alpha "
                f"{float(layer.alpha)}, not {alpha}; pp.set_alpha(..., keep=...) changes an "
                "exponent, or leave the layer out with select"
            )


def check_no_readers(model: nn.Module, chosen: Chosen) -> None:
    """Nobody in ``model`` that is known to read a chosen layer's weight would take φ for θ."""
    names = {id(layer): name for name, (layer, _) in chosen.items()}
    for layer, reader in readers_of(model).values():
        if id(layer) in names:
            raise ValueError(
                f"powerize: {called(names[id(layer)], layer)} cannot store phi, because {reader} "
                "reads its weight and would take phi for theta; use stores='theta', or leave the "
                "layer out with select"
            )


def readers_of(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """The layers whose weight somebody in ``model`` is known to read, by id, and who does."""
    readers: dict[int, tuple[nn.Module, str]] = {}
    for name, reader in model.named_modules():
        for layer in _read_by(reader):
            readers.setdefault(id(layer), (layer, called(name, reader)))
    return readers


def _read_by(reader: nn.Module) -> Iterator[nn.Module]:
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(reader).__mro__]
    for kind in kinds:
        if kind in _READERS:
            modules = dict(reader.named_modules(remove_duplicate=False))
            yield from (modules[child] for child in _READERS[kind] if child in modules)


# ---- ties


def check_ties(model: nn.Module, chosen: Chosen, stores: Stores) -> None:
    """Whoever shares a weight must agree on what it holds, and under which exponent."""
    wanted = {id(layer): alpha for layer, alpha in chosen.values()}
    owners = owners_of(model)
    for name, (layer, alpha) in chosen.items():
        weight = weight_parameter(layer)
        if weight is None:
            continue  # powered before torch.nn.utils replaced it
        for other, other_called in others_with(layer, weight, owners):
            pair = f"{called(name, layer)} and {other_called} share one weight"
            if is_powered(other):
                _check_pair(pair, layer, alpha, stores, cast(Powered, other))
            elif id(other) not in wanted:
                _check_plain(pair, stores)
            elif wanted[id(other)] != alpha:
                _disagree(pair, alpha, stores, wanted[id(other)], stores)


def check_one_mask(model: nn.Module, layers: Mapping[str, MaskedLayer]) -> None:
    """Whoever shares a weight that a mask hides in part has the same mask."""
    owners = owners_of(model)
    for name, layer in layers.items():
        weight, module = weight_parameter(layer), cast(nn.Module, layer)
        if layer.mask is None or weight is None:
            continue
        for other, other_called in others_with(module, weight, owners):
            if not is_masked(other) or other.mask != layer.mask:
                raise ValueError(
                    f"fold: {called(name, module)} and {other_called} share one weight, and the "
                    "first hides a part of it that the second would lose; set its mask to None, "
                    "or give both the same"
                )


def owners_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Module]]]:
    """The modules in ``model`` that have each Parameter, by its id, with their names."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module))
    return owners


def others_with(
    layer: nn.Module, weight: nn.Parameter, owners: dict[int, list[tuple[str, nn.Module]]]
) -> Iterator[tuple[nn.Module, str]]:
    """Who else has ``weight``: all in the model, and outside it layers with masks or a power."""
    inside = [(other, called(name, other)) for name, other in owners.get(id(weight), ())]
    seen = {id(other) for other, _ in inside}
    yield from (pair for pair in inside if pair[0] is not layer)
    for outside in masked_layers_of(weight):
        if id(outside) not in seen:
            yield cast(nn.Module, outside), f"{outside} outside the model"


def _check_plain(pair: str, stores: Stores) -> None:
    if stores == "phi":
        raise ValueError(
            f"powerize: {pair}, and the second would take phi for theta; use "
            "stores='theta', or leave the first out with select"
        )


def _check_pair(pair: str, layer: nn.Module, alpha: float, stores: Stores, other: Powered) -> None:
    if (alpha, stores) != (float(other.alpha), other.stores):
        _disagree(pair, alpha, stores, float(other.alpha), other.stores)
    if stores == "phi" and not is_powered(layer):
        raise ValueError(
            f"powerize: {pair}, which holds phi for the second already; tie them after "
            "both are powered"
        )


def _disagree(
    pair: str, alpha: float, stores: Stores, other_alpha: float, other_stores: Stores
) -> None:
    raise ValueError(
        f"powerize: {pair}, so they need the same alpha and stores; got alpha={alpha}, "
        f"stores={stores!r} and alpha={other_alpha}, stores={other_stores!r}"
    )
