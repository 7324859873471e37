"""The rows of a single small layer: what a powered one adds to nn.Linear in calls."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import models
from bench.contenders import seeded
from bench.row import Bar, Build, Call, Row

BATCH = 64


@dataclass(frozen=True)
class LayerInputs:
    """A batch for one layer, the gradient of its output, and the plain layer to start from."""

    input: Tensor  # [B, N]
    grad_output: Tensor  # [B, N]
    plain: nn.Linear


def layer_inputs(size: int, device: torch.device) -> LayerInputs:
    """One layer of ``size`` inputs and outputs."""
    with seeded(device):
        return LayerInputs(
            torch.randn(BATCH, size), torch.randn(BATCH, size), nn.Linear(size, size)
        )


def forward_backward(prepare: models.Prepare) -> Build:
    """One forward and one backward of a layer, gradients fresh as after zero_grad()."""

    def build(inputs: LayerInputs) -> Call:
        layer = prepare(copy.deepcopy(inputs.plain))
        weight, bias = layer.weight, layer.bias

        def call() -> Tensor:
            weight.grad = bias.grad = None
            output = layer(inputs.input)
            output.backward(inputs.grad_output)
            return output

        return call

    return build


def layer_rows() -> list[Row]:
    """A layer of 64 features for each kind of storage."""
    return [
        Row(
            name=f"layer/stores={stores}/alpha=1.5",
            suite="layers",
            ops=("power", "power_backward", "inverse_power"),
            inputs=layer_inputs,
            ours=forward_backward(models.powered(1.5, stores)),
            rivals={
                "nn.Linear": forward_backward(models.dense),
                "eager": forward_backward(models.handwritten(1.5)),
            },
            size=64,
            quick_size=64,
            unit="features",
            in_cache=True,
            bars=(Bar("us_above", limit, "nn.Linear"),),
            rtol=1e-3,
            atol=1e-4,
        )
        for stores, limit in (("phi", 15), ("theta", 2))
    ]
