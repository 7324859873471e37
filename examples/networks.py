"""Networks of linear layers, and what is asked of any: accuracy, θ, pruned copies, rates."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import ppkernels as pp


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them: ``hidden``, or ``hidden1`` and on, then ``output``."""
    steps: OrderedDict[str, nn.Module] = OrderedDict()
    hidden = len(sizes) - 2
    for place, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        number = str(place) if hidden > 1 else ""
        is_last = place > hidden
        steps["output" if is_last else f"hidden{number}"] = nn.Linear(inputs, outputs)
        if not is_last:
            steps[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(steps)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of the images that ``model`` gets right."""
    pairs = zip(images.split(2_000), labels.split(2_000), strict=True)
    return sum((model(part).argmax(1) == own).sum().item() for part, own in pairs) / len(labels)


def powered_layers(model: nn.Module) -> dict[str, pp.nn.Powered]:
    """The powered layers of ``model`` by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, pp.nn.Powered)}


def thetas(model: nn.Module) -> dict[str, Tensor]:
    """θ of every powered layer by name, whatever the layer stores."""
    return {name: layer.theta.detach() for name, layer in powered_layers(model).items()}


def prune(model: nn.Module, kept: float) -> nn.Module:
    """A plain copy of ``model`` with only the largest |θ| of the whole network, the others 0.

    Exactly round(kept · number of weights) stay; of equals, the earlier. Biases stay.
    """
    pruned = copy.deepcopy(model)
    layers = powered_layers(pruned)
    weights = thetas(pruned)
    count = round(kept * sum(theta.numel() for theta in weights.values()))
    for name, mask in pp.topk_mask(weights, count).items():
        layers[name].mask = mask
    return pp.fold(pruned)


def evened(model: nn.Module, rate: float, like: nn.Module | None = None) -> list[dict[str, Any]]:
    """Parameter groups in which α does not decide how fast the layers begin to learn.

    A step of φ by −rate·g·dθ/dφ moves θ by −rate·g·(dθ/dφ)² to first order. With torch's initial
    weights at α = 1.5 that is 2 to 8 times less than the plain step, the less the more inputs a
    layer has. So the rate of each powered weight is divided by the mean of (dθ/dφ)² =
    (α·|θ|^((α−1)/α))², which is 1 at α = 1. All others, biases and norms, have the rate itself.

    Args:
        model: whose parameters are grouped.
        rate: that of a plain layer.
        like: a model with layers of the same names, whose θ count instead of those of ``model``.
    """
    found = powered_layers(like or model)
    groups = []
    for name, layer in powered_layers(model).items():
        alpha, theta = float(found[name].alpha), found[name].theta.detach()
        slowness = (alpha * theta.abs() ** ((alpha - 1) / alpha)).square().mean().item()
        groups.append({"params": [layer.weight], "lr": rate / slowness})
    weights = {group["params"][0] for group in groups}
    others = [parameter for parameter in model.parameters() if parameter not in weights]
    return [*groups, {"params": others, "lr": rate}]
