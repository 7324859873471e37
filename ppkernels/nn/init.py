"""Initialisers of powered layers: they draw θ, and the layer stores what it stores."""

from __future__ import annotations

import math

import torch
from torch import nn

from ppkernels._powered import is_sparse
from ppkernels.nn.powered import Powered

# Standard deviation of a standard normal cut off at ±2.
_TRUNCATED_STD = 0.87962566103423978


def truncated_normal_(
    layer: Powered, scale: float = 1.0, generator: torch.Generator | None = None
) -> None:
    """Draw θ from a truncated normal of variance scale / fan_in, and set the bias to 0.

    u is normal, cut off at two standard deviations and stretched so that its variance after the cut
    is scale / fan_in; θ = u, that is φ = sign(u)·|u|^(1/α).

    Args:
        layer: a powered layer with a weight of at least two dimensions, or a sparse one, whose
            fan_in is that of the dense layer.
        scale: variance times fan_in.
        generator: the source of randomness; torch's own by default.

    Raises:
        TypeError: ``layer`` is not a powered layer.
        ValueError: ``scale`` is not a positive number.

    Source: Schwarz et al. 2021, the notebook published with the paper (variance scaling with its
    defaults: scale 1, fan_in, truncated normal).
    """
    if not isinstance(layer, Powered):
        raise TypeError(f"truncated_normal_: {type(layer).__name__} is not a powered layer")
    if not 0 < scale < math.inf:
        raise ValueError(f"truncated_normal_: scale must be a positive number, got {scale}")
    fan_in = layer.topology.in_features if is_sparse(layer) else layer.weight[0].numel()
    std = math.sqrt(scale / max(fan_in, 1)) / _TRUNCATED_STD
    u = torch.empty_like(layer.weight, requires_grad=False)
    nn.init.trunc_normal_(u, std=std, a=-2 * std, b=2 * std, generator=generator)
    layer.set_theta(u)
    if isinstance(layer.bias, torch.Tensor):
        nn.init.zeros_(layer.bias)
