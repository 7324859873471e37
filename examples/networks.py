"""Networks of linear layers, and what is asked of any network: accuracy, θ, pruned copies."""

from __future__ import annotations

import copy
from collections import OrderedDict
from itertools import pairwise

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
