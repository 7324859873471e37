"""The networks of the rows, plain, and what makes them powered: by ppkernels, or by hand.

Each network is made once as a plain one. A contender is a copy of it that `dense`, `handwritten` or
`powered` has prepared, so that all of them start from the same θ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ppkernels as pp

CLASSES = 10

Prepare = Callable[[nn.Module], nn.Module]
"""Turns a plain model into a contender, in place, and returns it."""


class HandwrittenPowerLinear(nn.Linear):
    """Powerpropagation as published for PyTorch: θ = w·|w|^(α−1) in the forward, by autograd."""

    alpha: float

    def forward(self, input: Tensor) -> Tensor:
        theta = self.weight * self.weight.abs().pow(self.alpha - 1)
        return F.linear(input, theta, self.bias)


class HandwrittenPowerConv2d(nn.Conv2d):
    """The same for a convolution that pads with zeros."""

    alpha: float

    def forward(self, input: Tensor) -> Tensor:
        theta = self.weight * self.weight.abs().pow(self.alpha - 1)
        how = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(input, theta, self.bias, *how)


HANDWRITTEN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: HandwrittenPowerLinear,
    nn.Conv2d: HandwrittenPowerConv2d,
}


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a plain model whose weights are powered, by name."""
    return {name: layer for name, layer in model.named_modules() if type(layer) in HANDWRITTEN}


def dense(model: nn.Module) -> nn.Module:
    """The model that every other is compared with: the plain one."""
    return model


def handwritten(alpha: float) -> Prepare:
    """Every layer the handwritten one of the same kind, its weight w such that θ stays."""

    def prepare(model: nn.Module) -> nn.Module:
        for layer in weight_layers(model).values():
            layer.__class__ = HANDWRITTEN[type(layer)]
            layer.alpha = alpha
            with torch.no_grad():
                layer.weight.copy_(pp.inverse_power(layer.weight, alpha))
        return model

    return prepare


def powered(
    alpha: float,
    stores: Literal["theta", "phi"],
    update_masks: Mapping[str, Tensor] | None = None,
) -> Prepare:
    """Every layer powered by `pp.powerize`; frozen where its mask in ``update_masks`` is False."""

    def prepare(model: nn.Module) -> nn.Module:
        pp.powerize(model, alpha, stores)
        for name, is_trained in (update_masks or {}).items():
            model.get_submodule(name).update_mask = pp.BitMask.pack(is_trained)
        return model

    return prepare


def sparse(prepare: Prepare) -> Prepare:
    """What ``prepare`` makes, with sparse linear layers: of the weights that are not 0 alone."""

    def make_sparse(model: nn.Module) -> nn.Module:
        model = prepare(model)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, nn.Linear):
                model.set_submodule(name, pp.nn.SparseLinear.from_linear(layer))
        return model

    return make_sparse


@dataclass(frozen=True)
class Network:
    """A network at any size N, of which it says what N counts.

    Attributes:
        name: as in the rows' names.
        plain: makes it from N, in torch's own layers, with their own initial values.
        input_shape: of one input, from N.
        unit: what N counts.
        size, quick_size: N of the rows, and of a quick run.
    """

    name: str
    plain: Callable[[int], nn.Module]
    input_shape: Callable[[int], tuple[int, ...]]
    unit: str
    size: int
    quick_size: int

    def flops(self, batch: int, size: int) -> int:
        """Operations of the matrix products and convolutions in one forward and backward."""
        return _flops(self, batch, size)

    def mask_bytes(self, size: int) -> int:
        """One bit for each weight that is powered, whole bytes for each layer."""
        with torch.device("meta"):
            layers = weight_layers(self.plain(size)).values()
        return sum(math.ceil(layer.weight.numel() / 8) for layer in layers)


@cache
def _flops(network: Network, batch: int, size: int) -> int:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        network.plain(size)(torch.empty(batch, *network.input_shape(size))).sum().backward()
    return counter.get_total_flops()


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers from each width to the next, and to the classes, with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in zip(widths, (*widths[1:], CLASSES), strict=True):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(side: int) -> nn.Sequential:
    """Three 3x3 convolutions, each halving the picture's side, then 256 features and the head."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), *mlp(64 * (side // 8) ** 2, 256))


MLP_300 = Network(
    "mlp-300",
    plain=lambda size: mlp(size, 300, 100),
    input_shape=lambda size: (size,),
    unit="inputs",
    size=784,
    quick_size=784,
)
MLP_2048 = Network(
    "mlp-2048",
    plain=lambda size: mlp(size, size, size, size),
    input_shape=lambda size: (size,),
    unit="features",
    size=2048,
    quick_size=256,
)
CNN = Network(
    "cnn",
    plain=cnn,
    input_shape=lambda side: (3, side, side),
    unit="pixels a side",
    size=32,
    quick_size=16,
)
RESNET_18 = Network(
    "resnet-18",
    plain=lambda side: torchvision.models.resnet18(num_classes=CLASSES),
    input_shape=lambda side: (3, side, side),
    unit="pixels a side",
    size=64,
    quick_size=32,
)
