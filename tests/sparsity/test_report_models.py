"""pp.report on models that torch has changed, wrapped or built otherwise, and how wide it is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import ppkernels as pp

# ---- the model stays what it is


class Counted(nn.Module):
    """A parametrization that counts how often it is asked, and sees in which mode."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: list[bool] = []

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.training)
        return 2 * weight


def test_a_parametrized_weight_is_read_once_and_in_evaluation() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).eval())
    for layer in model:
        nn.utils.parametrize.register_parametrization(layer, "weight", Counted(), unsafe=True)
        layer.parametrizations.weight[0].modes.clear()
    modes = {name: module.training for name, module in model.named_modules()}
    pp.report(model)
    for layer in model:
        assert layer.parametrizations.weight[0].modes == [False]
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_power_iteration_does_not_go_on() -> None:
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8))).train()
    before = copy.deepcopy(model.state_dict())
    pp.report(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer,
        parametrizations.weight_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: pp.powerize(layer, 2.0, "phi"),
    ],
)
def test_frozen_is_what_no_parameter_of_the_weight_trains(change: Any, grad: bool) -> None:
    layer = change(nn.Linear(8, 8))
    with torch.set_grad_enabled(grad):
        assert pp.report(layer).layers[0].frozen == 0
        layer.bias.requires_grad_(False)
        assert pp.report(layer).layers[0].frozen == 0
        layer.requires_grad_(False)
        layer.bias.requires_grad_(True)
        assert pp.report(layer).layers[0].frozen == 64


# ---- what is not listed


class Adapted(nn.Linear):
    def __init__(self) -> None:
        super().__init__(8, 8)
        self.down, self.up = nn.Parameter(torch.ones(2, 8)), nn.Parameter(torch.ones(8, 2))


@pytest.mark.parametrize("change", [lambda layer: layer, parametrizations.weight_norm])
def test_what_a_subclass_has_besides_is_another_parameter(change: Any) -> None:
    assert pp.report(change(Adapted())).other_parameters == 8 + 16 + 16


def test_every_parameter_is_listed_or_not() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2), nn.LSTM(4, 4), nn.Embedding(5, 4)])
    report = pp.report(model)
    assert report.other_parameters + report.total.entries == sum(
        parameter.numel() for parameter in model.parameters()
    )
    assert "recurrent weights, input projections of attention" in str(report)


# ---- arguments


def test_epsilons_may_be_anything_that_gives_numbers_once() -> None:
    layer = nn.Linear(4, 4)
    expected = pp.report(layer, [1e-3, 1e-2])
    assert pp.report(layer, (epsilon for epsilon in (1e-3, 1e-2))) == expected
    assert pp.report(layer, np.array([1e-3, 1e-2, 1e-3])) == expected
    assert pp.report(layer, []).epsilons == ()
    assert len(pp.report(layer, bins=np.int64(3)).layers[0].statistics.histogram) == 3


def weight_of(weight: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(weight, requires_grad=False)
    return model


LAYER = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pp.report(LAYER, 1e-3), TypeError, "epsilons must be a list of numbers, got 0"),
        (lambda: pp.report(LAYER, "ab"), TypeError, "epsilons must be a list of numbers, got 'ab'"),
        (lambda: pp.report(LAYER, ["x"]), TypeError, "epsilons must be numbers, got 'x'"),
        (lambda: pp.report(LAYER, bins=-1), ValueError, "bins must be a whole number >= 0, got -1"),
        (lambda: pp.report(LAYER, bins=2.5), TypeError, "bins must be a whole .*, got 2.5"),
        (lambda: pp.report(LAYER, bins=True), TypeError, "bins must be a whole .*, got True"),
        (
            lambda: pp.report(weight_of(torch.ones(4, 4, dtype=torch.int8))),
            TypeError,
            "the weight of '1' must be float32, .* got int8",
        ),
        (
            lambda: pp.report(weight_of(torch.eye(4).to_sparse())),
            TypeError,
            "the weight of '1' must be a dense tensor",
        ),
        (
            lambda: pp.report(weight_of(torch.full((4, 4), 1e308, dtype=torch.float64))),
            ValueError,
            r"goes up to 1e\+308 in '1', and no histogram",
        ),
        (
            lambda: pp.report(weight_of(torch.full((4, 4), math.nan))),
            ValueError,
            "the weight of '1': .* NaN",
        ),
    ],
)
def test_errors_name_argument_or_layer(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=rf"^report: .*{message}"):
        call()


def test_huge_weights_without_a_histogram() -> None:
    model = weight_of(torch.full((4, 4), 1e308, dtype=torch.float64))
    assert pp.report(model, bins=0).layers[1].statistics.max == 1e308


# ---- how wide it is


def resnet18() -> nn.Module:
    """The convolutions of a ResNet-18 by their names."""
    model = nn.Module()

    def put(name: str, layer: nn.Module) -> None:
        at = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(last, layer)

    put("conv1", nn.Conv2d(3, 64, 7))
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512), 1):
        for block in (0, 1):
            put(f"layer{stage}.{block}.conv1", nn.Conv2d(inputs, outputs, 3))
            put(f"layer{stage}.{block}.conv2", nn.Conv2d(outputs, outputs, 3))
            if inputs != outputs:
                put(f"layer{stage}.{block}.downsample.0", nn.Conv2d(inputs, outputs, 1))
            inputs = outputs
    put("fc", nn.Linear(512, 1000))
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10))


@pytest.mark.parametrize("make", [mlp, resnet18])
def test_usual_models_fit_a_terminal(make: Callable[[], nn.Module]) -> None:
    model = pp.powerize(make(), 1.84375)
    for layer in model.modules():
        if hasattr(layer, "update_mask"):
            layer.update_mask = pp.BitMask.pack(torch.rand(layer.weight.shape) < 0.1)
    report = pp.report(model, bins=0)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 100
    # However it is shortened, no two rows have one name.
    rows = lines[2 : 2 + len(report.layers)]
    assert len({row.split()[0] for row in rows}) == len(report.layers)


def test_no_two_epsilons_have_one_heading() -> None:
    text = str(pp.report(LAYER, [0.1, 0.1000000001])).splitlines()[0]
    assert "|θ|<0.1 " in text
    assert "|θ|<0.1000000001 " in text


# ---- the picture


def drawn(report: pp.sparsity.Report, monkeypatch: pytest.MonkeyPatch, path: Path) -> Any:
    """The figure that `plot` saves."""
    figures = pytest.importorskip("matplotlib.figure")
    saved = []
    save = figures.Figure.savefig

    def noted(figure: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(figures.Figure, "savefig", noted)
    report.plot(path / "report.png")
    return saved[0]


def test_titles_do_not_overlap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = nn.Module()
    for place in range(5):
        name = f"encoder_{place}_with_a_name_that_is_longer_than_any_picture_is_wide_$x_{place}"
        model.add_module(name, nn.Linear(9, 9))
    figure = drawn(pp.report(pp.powerize(model, 1.23456)), monkeypatch, tmp_path)
    boxes = [axis.title.get_window_extent() for axis in figure.axes if axis.get_title()]
    assert len(boxes) == 5
    assert not any(
        first.overlaps(second) for place, first in enumerate(boxes) for second in boxes[:place]
    )


def test_many_layers_are_drawn_in_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = [2] * 200 + [9] * 24 + [3] * 200
    model = nn.Sequential(*[nn.Linear(size, size) for size in sizes])
    figure = drawn(pp.report(model), monkeypatch, tmp_path)
    titles = [axis.get_title().splitlines()[0] for axis in figure.axes if axis.get_title()]
    assert titles == [str(place) for place in range(200, 224)]
    assert figure.get_suptitle() == "the largest 24 of 424 layers, and all together"


def test_tensorboard_without_histograms() -> None:
    class Writer:
        def __init__(self) -> None:
            self.tags: list[str] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.tags.append(tag)

    writer = Writer()
    pp.report(LAYER, [0.1, 0.1000000001], bins=0).to_tensorboard(writer, 0)
    assert "kept/Linear" in writer.tags
    assert len(set(writer.tags)) == len(writer.tags)
    assert {"below_0.1/total", "below_0.1000000001/total"} < set(writer.tags)
