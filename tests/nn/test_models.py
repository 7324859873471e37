"""Whole models: they powerize, keep their outputs, and train a step."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ppkernels as pp


def resnet(name: str) -> tuple[nn.Module, torch.Tensor]:
    torchvision = pytest.importorskip("torchvision")
    return getattr(torchvision.models, name)(num_classes=10), torch.randn(2, 3, 32, 32)


def encoder_layer() -> tuple[nn.Module, torch.Tensor]:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.randn(3, 5, 8)


Make = Callable[[str], tuple[nn.Module, torch.Tensor]]


@pytest.fixture
def make(tied_model: type[nn.Module]) -> Make:
    models = {
        "resnet18": lambda: resnet("resnet18"),
        "resnet50": lambda: resnet("resnet50"),
        "encoder_layer": encoder_layer,
        "language_model": lambda: (tied_model(), torch.randint(17, (3, 5))),
    }
    return lambda name: models[name]()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "encoder_layer", "language_model"])
def test_theta(name: str, make: Make) -> None:
    torch.manual_seed(0)
    model, x = make(name)
    model.eval()
    with torch.no_grad():
        expected = model(x)  # the encoder's fast path, which reads its children's weights
    parameters = list(model.parameters())
    pp.powerize(model, 1.5)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    before = [parameter.detach().clone() for parameter in parameters]
    model.train()
    optimizer = pp.optim.PowerSGD(model, 0.05, momentum=0.9)
    model(x).square().mean().backward()
    # A fresh ResNet-50 on two tiny pictures has gradients of 1e6, plain or powered.
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    moved = [not torch.equal(*pair) for pair in zip(parameters, before, strict=True)]
    assert sum(moved) > 0.9 * len(moved)  # some gradients are too small to move a weight
    assert all(parameter.isfinite().all() for parameter in parameters)
    with pytest.raises(RuntimeError, match="holds theta"):
        torch.optim.SGD(model.parameters(), 0.1).step()
    with torch.no_grad():
        stepped = model.train()(x) if "resnet" in name else model.eval()(x)
        assert torch.equal(pp.fold(model)(x), stepped)


@pytest.mark.parametrize("name", ["resnet18", "language_model"])
def test_phi(name: str, make: Make) -> None:
    torch.manual_seed(0)
    model, x = make(name)
    model.eval()
    expected = model(x)
    inside = ("self_attn.out_proj", "linear1", "linear2", "head")
    pp.powerize(model, 1.5, "phi", select=lambda name, _: not name.endswith(inside))
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(x).square().mean().backward()
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_tied_weight_is_stepped_once_with_the_power(
    make: Make, stepped: Callable[..., torch.Tensor]
) -> None:
    torch.manual_seed(0)
    model, x = make("language_model")
    pp.powerize(model, 2.0)
    logits = model(x)
    F.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
    weight = model.head.weight
    expected = stepped(weight.detach(), weight.grad, model.head.alpha, 0.1)
    pp.optim.PowerSGD(model.parameters(), 0.1).step()
    assert torch.equal(model.tokens.weight, expected)
    assert model.tokens.weight is model.head.weight


def test_a_model_made_elsewhere_loads_and_trains(make: Make, tied_model: type[nn.Module]) -> None:
    """A plain checkpoint, a powered model, a step, a powered checkpoint, a fresh powered model."""
    plain, x = make("language_model")
    model = pp.powerize(tied_model(), 1.5)
    model.load_state_dict(plain.state_dict())
    torch.testing.assert_close(model(x), plain(x))
    model(x).sum().backward()
    pp.optim.PowerSGD(model, 0.1).step()
    fresh = pp.powerize(tied_model(), 3.0)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(fresh(x), model(x))
    assert fresh.head.alpha.item() == 1.5
