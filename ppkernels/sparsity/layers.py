"""The layers that a pruner, the controller of α and a report look after: found, and still there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ppkernels import _powered
from ppkernels._powered import MaskedLayer

Select = Callable[[str, nn.Module], bool] | Iterable[str]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, out of DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif "_orig_mod" in model._modules:  # its class comes with the compiler
            model = cast(nn.Module, model._modules["_orig_mod"])
        else:
            return model


def check_present(
    owner: str,
    made: str,
    model: nn.Module,
    layers: Mapping[str, nn.Module | MaskedLayer],
    is_kind: Callable[[object], bool],
    hint: str = "",
) -> None:
    """``layers`` still stand in ``model`` under their names, and are what they were.

    Raises:
        RuntimeError: a layer that was exchanged, folded or taken away; ``made`` says what it was,
            and ``hint`` what else can be done.
    """
    present = dict(model.named_modules(remove_duplicate=False))
    for name, layer in layers.items():
        if present.get(name) is not layer or not is_kind(layer):
            raise RuntimeError(
                f"{owner}: {shown(name, layer)!r} is no longer the {made}; make a new one{hint}"
            )


def shown(name: str, layer: object) -> str:
    """What a layer is called: its name, or that of its class where it is the model itself."""
    return name or type(layer).__name__


def own_weight(owner: str, name: str, layer: MaskedLayer) -> nn.Parameter:
    """The Parameter that ``layer`` holds its weight in, whole and of its own.

    Raises:
        RuntimeError: torch.nn.utils has put something in its place.
        TypeError: it is sharded.
    """
    weight = _powered.weight_parameter(layer)
    if weight is None:
        raise RuntimeError(
            f"{owner}: the weight of {name!r} is no longer a Parameter of its own "
            "(torch.nn.utils.prune, parametrize or weight_norm has replaced it)"
        )
    check_whole_weight(owner, name, weight)
    return weight


def check_whole_weight(owner: str, name: str, weight: Tensor) -> None:
    """All entries of ``weight`` are here: it is of no class that may have them elsewhere."""
    if type(weight) not in (nn.Parameter, Tensor):
        raise TypeError(
            f"{owner}: the weight of {name!r} is a {type(weight).__name__}, whose entries may be "
            "elsewhere; do this before the model is sharded"
        )
