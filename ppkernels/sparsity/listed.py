"""The layers that a report lists, their weights, and the Parameters that these come from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from ppkernels._checks import check_floating
from ppkernels._powered import is_powered, weight_parameter
from ppkernels.nn import FoldedSparse, Sparse
from ppkernels.sparsity.layers import check_whole_weight, shown

# What has a topology, and stores kept values alone.
SPARSE = (Sparse, FoldedSparse)


def listed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that a report has a row for, or names in one, in the model's order."""
    for path, module in model.named_modules():
        if is_powered(module) or isinstance(module, (*SPARSE, nn.Linear, _ConvNd)):
            name = shown(path, module)
            if isinstance(module, LazyModuleMixin):
                raise ValueError(f"report: {name!r} is lazy; run a batch through the model first")
            yield name, cast(nn.Module, module)


def weight_of(name: str, layer: nn.Module) -> Tensor:
    """The weight of ``layer``, read once and as in evaluation, which leaves no traces.

    A parametrization computes it anew at each look, and spectral_norm's goes on with its power
    iteration where the layer is in training.
    """
    modes = [(module, module.training) for module in layer.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            weight = cast(Tensor, layer.weight)
    finally:
        for module, mode in modes:
            module.training = mode
    check_whole_weight("report", name, weight)
    check_floating("report", f"the weight of {name!r}", weight)
    if weight.is_meta:
        raise ValueError(f"report: {name!r} is on the meta device and holds no values")
    return weight


def sources_of(layer: nn.Module) -> list[nn.Parameter]:
    """The Parameters that the weight comes from; torch.nn.utils puts others in its place."""
    weight = weight_parameter(layer)
    if weight is not None:
        return [weight]
    return [
        parameter
        for name, parameter in layer.named_parameters()
        if name.removeprefix("parametrizations.").startswith("weight")
    ]
