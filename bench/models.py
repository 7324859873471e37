"""The contenders that are layers and models: dense, powered, and powered by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ppkernels as pp
from bench.row import Build, Call

BATCH = 128
CLASSES = 10
LEARNING_RATE = 1e-3
MOMENTUM = 0.9

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class HandwrittenPowerLinear(nn.Linear):
    """Powerpropagation as published for PyTorch: θ = w·|w|^(α−1) in the forward, by autograd."""

    def __init__(self, in_features: int, out_features: int, alpha: float) -> None:
        super().__init__(in_features, out_features)
        self.alpha = alpha

    def forward(self, input: Tensor) -> Tensor:
        theta = self.weight * self.weight.abs().pow(self.alpha - 1)
        return F.linear(input, theta, self.bias)


MakeLayer = Callable[[int, int], nn.Linear]


def dense(in_features: int, out_features: int) -> nn.Linear:
    """The layer that every other is compared with."""
    return nn.Linear(in_features, out_features)


def handwritten(alpha: float) -> MakeLayer:
    """`HandwrittenPowerLinear` of one α."""
    return lambda in_features, out_features: HandwrittenPowerLinear(
        in_features, out_features, alpha
    )


def powered(alpha: float, stores: Literal["theta", "phi"]) -> MakeLayer:
    """`pp.nn.PowerLinear` of one α and one kind of storage."""
    return lambda in_features, out_features: pp.nn.PowerLinear(
        in_features, out_features, alpha=alpha, stores=stores
    )


def start_at(layer: nn.Linear, theta: Tensor, bias: Tensor) -> None:
    """Give ``layer`` the weight θ, whatever it stores, so that all contenders compute the same."""
    with torch.no_grad():
        if isinstance(layer, pp.nn.PowerLinear):
            layer.set_theta(theta)
        elif isinstance(layer, HandwrittenPowerLinear):
            layer.weight.copy_(pp.inverse_power(theta, layer.alpha))
        else:
            layer.weight.copy_(theta)
        layer.bias.copy_(bias)


@dataclass(frozen=True)
class LayerInputs:
    """A batch for one layer, the gradient of its output, and the θ and bias to start from."""

    input: Tensor  # [B, N]
    grad_output: Tensor  # [B, N]
    theta: Tensor  # [N, N]
    bias: Tensor  # [N]


def layer_inputs(size: int) -> LayerInputs:
    """One layer of ``size`` inputs and outputs at a batch of 64."""
    generator = torch.Generator().manual_seed(0)
    return LayerInputs(
        torch.randn(64, size, generator=generator),
        torch.randn(64, size, generator=generator),
        torch.randn(size, size, generator=generator) * size**-0.5,
        torch.randn(size, generator=generator),
    )


def forward_backward(make: MakeLayer) -> Build:
    """One forward and one backward of a layer, gradients fresh as after zero_grad()."""

    def build(inputs: LayerInputs) -> Call:
        size = len(inputs.bias)
        layer = make(size, size)
        start_at(layer, inputs.theta, inputs.bias)
        weight, bias = layer.weight, layer.bias

        def call() -> Tensor:
            weight.grad = bias.grad = None
            output = layer(inputs.input)
            output.backward(inputs.grad_output)
            return output

        return call

    return build


@dataclass(frozen=True)
class TrainingInputs:
    """One batch, and the θ and biases of the network to start from."""

    input: Tensor  # [B, N]
    target: Tensor  # [B]
    thetas: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]


def training_inputs(size: int) -> TrainingInputs:
    """Three hidden layers of ``size`` and a head of 10 classes, at a batch of 128."""
    generator = torch.Generator().manual_seed(0)
    widths = (size, size, size, CLASSES)
    return TrainingInputs(
        torch.randn(BATCH, size, generator=generator),
        torch.randint(CLASSES, (BATCH,), generator=generator),
        tuple(torch.randn(w, size, generator=generator) * (2 / size) ** 0.5 for w in widths),
        tuple(torch.zeros(w) for w in widths),
    )


def training_flops(size: int) -> int:
    """2·B operations a weight in the forward, twice that in the backward.

    The first layer's input needs no gradient: its backward counts once.
    """
    weights = 3 * size * size + CLASSES * size
    return BATCH * (6 * weights - 2 * size * size)


def fused_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """torch's own SGD with momentum, fused."""
    return torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, fused=True)


def power_sgd(model: nn.Module) -> torch.optim.Optimizer:
    """The powered SGD with momentum, for layers that store θ."""
    return pp.optim.PowerSGD(model, lr=LEARNING_RATE, momentum=MOMENTUM)


def training_step(
    make: MakeLayer, make_optimizer: MakeOptimizer, is_compiled: bool = False
) -> Build:
    """One step of training: zero_grad, forward, cross-entropy, backward, optimizer step."""

    def build(inputs: TrainingInputs) -> Call:
        layers: list[nn.Module] = []
        for theta, bias in zip(inputs.thetas, inputs.biases, strict=True):
            layer = make(theta.shape[1], theta.shape[0])
            start_at(layer, theta, bias)
            layers += [layer, nn.ReLU()]
        model = nn.Sequential(*layers[:-1])
        optimizer = make_optimizer(model)
        network = torch.compile(model, dynamic=False) if is_compiled else model

        def call() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(network(inputs.input), inputs.target)
            loss.backward()
            optimizer.step()
            return loss

        return call

    return build
