"""pp.report: its numbers against plain torch, its text, its picture, its TensorBoard events."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import ppkernels as pp

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def mixed() -> nn.Sequential:
    """φ stored and masked, θ stored and frozen in part, plain; a norm that is not listed."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(24, 8), nn.Linear(8, 5)
    )
    pp.powerize(model, 2.0, "phi", select=["0"])
    pp.powerize(model, 1.5, select=["3"])
    model[0].mask = pp.BitMask.pack(torch.rand(6, 2, 3, 3) < 0.3)
    kept = torch.rand(8, 24) < 0.2
    model[3].set_theta(model[3].theta.detach() * kept)
    model[3].update_mask = pp.BitMask.pack(kept)
    return model


def thetas(model: nn.Module) -> dict[str, Tensor]:
    layers = {name: layer for name, layer in model.named_modules() if name in ("0", "3", "4")}
    return {name: getattr(layer, "theta", layer.weight).detach() for name, layer in layers.items()}


# ---- the numbers


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_against_torch(dtype: torch.dtype) -> None:
    model = mixed().to(dtype)
    report = pp.report(model, (0.001, 0.1))
    assert [layer.name for layer in report.layers] == ["0", "3", "4"]
    for layer, theta in zip(report.layers, thetas(model).values(), strict=True):
        exact = theta.double()
        found = layer.statistics
        assert (layer.entries, layer.shape) == (theta.numel(), tuple(theta.shape))
        assert layer.dtype == str(dtype).removeprefix("torch.")
        assert layer.kept == theta.count_nonzero().item()
        assert layer.share_kept == layer.kept / layer.entries
        for epsilon in (0.001, 0.1):
            assert found.share_below(epsilon) == (exact.abs() < epsilon).double().mean().item()
        assert (found.min, found.max) == (exact.min().item(), exact.max().item())
        assert found.mean == pytest.approx(exact.mean().item(), rel=1e-10, abs=1e-15)
        assert found.mean_abs == pytest.approx(exact.abs().mean().item(), rel=1e-10)
        assert layer.bytes_dense == theta.numel() * theta.element_size()
        packed = layer.kept * theta.element_size() + math.ceil(theta.numel() / 8)
        assert layer.bytes_packed == min(packed, layer.bytes_dense)
        assert sum(found.histogram) == theta.numel()
        assert found.range == (-exact.abs().max().item(), exact.abs().max().item())
        middle = exact.abs() < found.range[1] / 101 * 0.999
        assert found.histogram[50] >= middle.sum().item()


def test_what_is_said_of_each_layer() -> None:
    model = mixed()
    first, second, third = pp.report(model).layers
    assert [layer.kind for layer in (first, second, third)] == [
        "PowerConv2d",
        "PowerLinear",
        "Linear",
    ]
    assert [(x.alpha, x.stores) for x in (first, second, third)] == [
        (2.0, "phi"),
        (1.5, "theta"),
        (None, None),
    ]
    assert second.frozen == 8 * 24 - model[3].update_mask.count() > 0
    assert (first.frozen, third.frozen) == (0, 0)
    assert (first.bytes_packed, third.bytes_packed) == (first.kept * 4 + 14, 160)
    model[4].weight.requires_grad_(False)
    assert pp.report(model).layers[2].frozen == 40


def test_total() -> None:
    model = mixed()
    report = pp.report(model)
    everything = torch.cat([theta.flatten() for theta in thetas(model).values()]).double()
    total = report.total
    assert total.entries == everything.numel() == 108 + 192 + 40
    assert total.kept == everything.count_nonzero().item()
    assert total.statistics.mean_abs == pytest.approx(everything.abs().mean().item())
    assert total.bytes_packed == sum(layer.bytes_packed for layer in report.layers)
    assert (total.alpha, total.stores, total.dtype) == (None, None, "float32")
    assert report.other_parameters == 6 + 2 * 6 + 8 + 5
    one = pp.report(pp.powerize(nn.Linear(3, 2), 1.5))
    assert (one.total.alpha, one.total.stores, one.layers[0].name) == (1.5, "theta", "PowerLinear")


@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_is_not_zero_however_small(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 1, dtype=dtype)
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, -0.0, smallest, -smallest]], dtype=dtype))
    assert layer.weight.count_nonzero() == 2
    assert pp.report(layer).layers[0].kept == 2


def test_weights_that_are_shared_come_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    report = pp.report(model)
    assert [layer.name for layer in report.layers] == ["0", "1"]
    assert report.layers[0].tied == ("2",)
    assert report.total.entries == 32
    assert report.other_parameters == 12
    assert "0 = 2" in str(report)


def test_weights_that_torch_has_replaced() -> None:
    model = nn.Sequential(nn.Linear(6, 4), parametrizations.weight_norm(nn.Linear(6, 4)))
    prune.l1_unstructured(model[0], "weight", 0.5)
    report = pp.report(model)
    assert [layer.kept for layer in report.layers] == [12, 24]
    assert report.other_parameters == 8


def test_compiled_and_transposed_layers() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.MultiheadAttention(4, 2))
    names = [layer.name for layer in pp.report(torch.compile(model)).layers]
    assert names == ["0", "1.out_proj"]


def test_no_entries_and_nothing_but_zeros() -> None:
    empty = nn.Linear(4, 4, bias=False)
    empty.weight = nn.Parameter(torch.empty(0, 4))
    zeros = nn.Linear(4, 4)
    nn.init.zeros_(zeros.weight)
    report = pp.report(nn.Sequential(empty, zeros))
    assert report.layers[0].as_dict()["share_kept"] is None
    assert math.isnan(report.layers[0].share_kept)
    assert (report.total.kept, report.total.entries) == (0, 16)
    assert report.layers[1].statistics.histogram[50] == 16
    json.dumps(report.as_dict(), allow_nan=False)
    assert "nan" not in str(report)


def test_nothing_of_the_model_changes() -> None:
    model = mixed()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pp.report(model)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())


# ---- as text, as a dict


def test_text() -> None:
    """The table as a newcomer sees it."""
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 10))
    pp.powerize(model, 1.5, select=["0"])
    with torch.no_grad():
        model[0].weight.copy_(torch.linspace(-0.1, 0.1, 1200).view(30, 40))
        model[0].weight[:, :20] = 0
        model[2].weight.fill_(0.25)
    model[0].update_mask = pp.BitMask.pack(model[0].weight != 0)
    expected = """\
layer  shape    α     kept  frozen  |θ|<0.001  |θ|<0.01    dense   packed
-------------------------------------------------------------------------
0      30x40  1.5   50.00%  50.00%     50.50%    55.00%  4.7 KiB  2.5 KiB
2      10x30    -  100.00%   0.00%      0.00%     0.00%  1.2 KiB  1.2 KiB
-------------------------------------------------------------------------
total  1,500    -   60.00%  40.00%     40.40%    44.00%  5.9 KiB  3.7 KiB

θ is the weight as the network sees it. kept: θ ≠ 0. frozen: no step moves it.
packed: the kept values and a mask of 1 bit an entry, or dense where that is less.
Under shape, the last row has the number of all entries.
Not listed: 40 entries of other parameters (biases, norms, embeddings,
recurrent weights, input projections of attention, a subclass's own)."""
    assert str(pp.report(model)) == expected


def test_shares_are_not_rounded_to_all_or_none() -> None:
    layer = nn.Linear(1000, 100)
    with torch.no_grad():
        layer.weight.fill_(0.5)
        layer.weight[0, 0] = 0
    text = str(pp.report(layer))
    assert ">99.99%" in text
    assert "<0.01%" in text
    assert "100.00%" not in text


def test_dict_goes_through_json() -> None:
    report = pp.report(mixed(), [0.01])
    numbers = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert numbers == report.as_dict()
    first = numbers["layers"][0]
    assert (first["name"], first["alpha"], first["shape"]) == ("0", 2.0, [6, 2, 3, 3])
    assert first["kept"] == report.layers[0].kept
    assert first["share_below"] == {"0.01": report.layers[0].statistics.share_below(0.01)}
    assert numbers["total"]["shape"] is None


# ---- the picture


@pytest.mark.parametrize("layers", [1, 6])
def test_plot(layers: int, tmp_path: Path) -> None:
    model = nn.Sequential(*[nn.Linear(9, 9) for _ in range(layers)])
    pp.report(model).plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"Report\.plot: pictures need matplotlib"):
        pp.report(mixed()).plot(tmp_path / "report.png")


# ---- TensorBoard


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from torch.utils.tensorboard import SummaryWriter

    model = mixed()
    report = pp.report(model)
    with SummaryWriter(str(tmp_path)) as writer:
        for step in (3, 4):
            report.to_tensorboard(writer, step)
    events = accumulators.EventAccumulator(str(tmp_path))
    events.Reload()
    for layer in (*report.layers, report.total):
        expected = {
            "kept": layer.share_kept,
            "frozen": layer.share_frozen,
            "below_0.001": layer.statistics.share_below(0.001),
            "below_0.01": layer.statistics.share_below(0.01),
            "mean": layer.statistics.mean,
            "mean_abs": layer.statistics.mean_abs,
        }
        for tag, value in expected.items():
            found = events.Scalars(f"{tag}/{layer.name}")
            assert [event.step for event in found] == [3, 4]
            assert found[0].value == pytest.approx(value, rel=1e-6)
    tags = events.Tags()
    assert [tag for tag in tags["scalars"] if tag.startswith("alpha/")] == ["alpha/0", "alpha/3"]
    assert events.Scalars("alpha/0")[0].value == 2.0
    assert tags["histograms"] == ["theta/0", "theta/3", "theta/4"]
    histogram = events.Histograms("theta/3")[0].histogram_value
    theta = model[3].theta.detach().double()
    assert histogram.num == theta.numel() == sum(histogram.bucket)
    assert (histogram.min, histogram.max) == (theta.min().item(), theta.max().item())
    assert histogram.sum == pytest.approx(theta.sum().item())
    assert histogram.sum_squares == pytest.approx(theta.square().sum().item())
    # A reader counts by the right edges.
    for limit, below in zip(histogram.bucket_limit, _running(histogram.bucket), strict=True):
        assert below == pytest.approx((theta <= limit).sum().item(), abs=1)


def _running(counts: list[float]) -> list[float]:
    return torch.tensor(counts).cumsum(0).tolist()


# ---- errors


def test_without_histograms(tmp_path: Path) -> None:
    report = pp.report(mixed(), bins=0)
    assert str(report) == str(pp.report(mixed()))
    with pytest.raises(ValueError, match=r"Report\.plot: the report has no histograms"):
        report.plot(tmp_path / "report.png")


def filled(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    nn.init.constant_(model[1].weight, value)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: [nn.Linear(2, 2)], TypeError, r"model must be a torch\.nn\.Module, got list"),
        (lambda: nn.ReLU(), ValueError, "ReLU holds no powered, linear or convolution layer"),
        (lambda: nn.Sequential(nn.LazyLinear(2)), ValueError, "'0' is lazy; run a batch"),
        (lambda: nn.Linear(2, 2, device="meta"), ValueError, "'Linear' is on the meta device"),
        (lambda: filled(math.nan), ValueError, r"NaN in tensors\['1'\]"),
        (lambda: filled(-math.inf), ValueError, "infinite weight in '1'"),
    ],
)
def test_wrong_models(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pp.report(make())


@pytest.mark.parametrize("epsilon", [0, -1.0, math.nan, math.inf])
def test_wrong_epsilons(epsilon: float) -> None:
    with pytest.raises(ValueError, match="epsilons must be finite and > 0, got"):
        pp.report(nn.Linear(2, 2), [0.1, epsilon])
