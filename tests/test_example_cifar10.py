"""The CIFAR-10 example end to end on a few coloured squares, its data, and its learning rates."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import ppkernels as pp

EXAMPLES = Path(__file__).parents[1] / "examples"
COLOURS = {"blue": (40, 60, 200), "green": (60, 190, 50), "red": (210, 50, 60)}


@pytest.fixture
def cifar10(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    for package in ("matplotlib", "rich", "torchvision"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.chdir(tmp_path)
    import cifar10

    threads = torch.get_num_threads()
    yield cifar10
    torch.set_num_threads(threads)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of JPEG files: for each colour 40 noisy squares to train, 10 to test."""
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 40), ("test", 10)):
        for name, colour in COLOURS.items():
            for place in range(count):
                noise = torch.randint(-30, 31, (32, 32, 3), generator=generator)
                write(tmp_path / "in" / part / name / f"{place}.jpg", torch.tensor(colour) + noise)
    return tmp_path / "in"


def write(path: Path, pixels: torch.Tensor) -> None:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clamp(0, 255).to(torch.uint8).numpy()).save(path)


def results(*arguments: str | Path, cifar10: ModuleType) -> dict[str, object]:
    """What the example writes to results.json; in seconds."""
    short = ("--quick", "--batch-size", "16", "--device", "cpu", "--out", "out")
    cifar10.main([*short, *map(str, arguments)])
    return json.loads(Path("out/results.json").read_text())


def test_one_shot(
    cifar10: ModuleType,
    pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ("--data", pictures, "--alpha", "1", "1.5", "--seeds", "3", "4", "--kept", "0.1")
    first = results(*arguments, cifar10=cifar10)
    assert [(run["alpha"], run["seed"]) for run in first["runs"]] == [
        ("α = 1", 3),
        ("α = 1", 4),
        ("α = 1.5", 3),
        ("α = 1.5", 4),
    ]
    for run in first["runs"]:
        assert run["accuracy"] > 0.6
        assert list(run["layers"]) == ["conv1", "conv2", "conv3", "hidden", "output"]
        assert set(run["pruned"]) == {"one-shot", "BatchNorm re-estimated"}
        assert len(run["epochs"]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "108 images to train, 30 to test" in printed
    assert "JPEG copies: accuracies lie a little below those on the original pixels" in printed
    for name in ("histograms", "depth", "epochs", "pruning"):
        assert Path(f"out/{name}.png").read_bytes().startswith(b"\x89PNG")

    # Decoded once: the second start reads the cache, and gives the same numbers.
    monkeypatch.setattr(cifar10.images, "_decoded", None)
    assert results(*arguments, cifar10=cifar10) == first


def test_gradual(cifar10: ModuleType, pictures: Path) -> None:
    arguments = ("--data", pictures, "--alpha", "1.25", "--prune", "gradual", "--every", "2")
    found = results(*arguments, "--kept", "0.05", "0.2", cifar10=cifar10)
    assert [run["target"] for run in found["runs"]] == [0.2, 0.05]
    for run in found["runs"]:
        kept = [epoch["kept"] for epoch in run["epochs"]]
        assert 1 > kept[0] > kept[-1] == pytest.approx(run["target"], abs=1e-5)
        assert run["pruned"] == {}
    assert Path("out/pruning.png").is_file()


@pytest.mark.parametrize("keep", ["phi", "theta"])
def test_adaptive(cifar10: ModuleType, pictures: Path, keep: str) -> None:
    arguments = ("--data", pictures, "--alpha", "adaptive", "--period", "1", "--keep", keep)
    (run,) = results(*arguments, "--prune", "none", "--validate", cifar10=cifar10)["runs"]
    assert run["alpha"] == "α adaptive"
    assert [epoch["alpha"] for epoch in run["epochs"]] == [1.25, 1.375]
    assert not Path("out/pruning.png").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--no-norm", "--optimizer", "adamw"),
        ("--optimizer", "adam"),
        ("--rule", "virtual", "--momentum", "0", "--bfloat16", "--no-reestimate"),
        pytest.param(("--model", "resnet18"), marks=pytest.mark.slow),
    ],
)
def test_other_networks_and_optimizers(
    cifar10: ModuleType, pictures: Path, arguments: tuple[str, ...]
) -> None:
    one = ("--data", pictures, "--alpha", "1.5", "--kept", "0.5", "--epochs", "1")
    (run,) = results(*one, *arguments, cifar10=cifar10)["runs"]
    is_reestimated = "--no-norm" not in arguments and "--no-reestimate" not in arguments
    assert ("BatchNorm re-estimated" in run["pruned"]) == is_reestimated
    assert len(run["layers"]) == (21 if "resnet18" in arguments else 5)


# ---- learning rates


@pytest.mark.parametrize("rule", ["chain", "virtual"])
def test_evened_rates_move_powered_weights_as_far_as_plain_ones(
    cifar10: ModuleType, rule: str
) -> None:
    moved = {}
    for alpha in (1.0, 1.5, 2.0):
        torch.manual_seed(0)
        model = pp.powerize(nn.Linear(400, 300), alpha)
        before = model.theta.detach().clone()
        groups = cifar10.evened(model, 1e-3)
        assert [len(group["params"]) for group in groups] == [1, 1]
        optimizer = pp.optim.PowerSGD(groups, 1e-3, rule=rule)
        model.weight.grad, model.bias.grad = torch.ones(300, 400), torch.ones(300)
        optimizer.step()
        moved[alpha] = (before - model.theta.detach()).mean().item()
        assert groups[-1]["lr"] == 1e-3
    assert moved[1.0] == pytest.approx(1e-3, rel=1e-3)
    assert moved[1.5] == pytest.approx(1e-3, rel=0.02)
    assert moved[2.0] == pytest.approx(1e-3, rel=0.02)


def test_the_rate_rises_and_falls(cifar10: ModuleType) -> None:
    heights = [cifar10.height(step / 100) for step in range(101)]
    assert heights[0] == 0
    assert heights[100] == pytest.approx(0, abs=1e-12)
    peak = heights.index(max(heights))
    assert peak == 10
    assert heights[peak] == pytest.approx(0.976, abs=1e-3)
    assert heights == [*sorted(heights[: peak + 1]), *sorted(heights[peak + 1 :], reverse=True)]


# ---- data


def test_the_cache_follows_the_pictures(cifar10: ModuleType, pictures: Path) -> None:
    def load() -> torch.Tensor:
        return cifar10.images.load(pictures, Path("data"), Path("cache.pt"), False).test_images

    first = load()
    assert first.shape == (30, 32, 32, 3)
    write(pictures / "test" / "red" / "new.jpg", torch.zeros(32, 32, 3))
    assert len(load()) == 31
    written = Path("cache.pt").read_bytes()
    for broken in (b"", written[:1000], pickle.dumps({}, protocol=2)):
        Path("cache.pt").write_bytes(broken)
        assert len(load()) == 31
    assert [path.name for path in Path().glob("cache*")] == ["cache.pt"]


def test_held_out_images_are_in_no_other_set(cifar10: ModuleType, pictures: Path) -> None:
    data = cifar10.images.load(pictures, Path("data"), Path("cache.pt"), False)
    side = slice(cifar10.images.PADDING, -cifar10.images.PADDING)
    train = data.train_images[:, side, side]
    assert (len(train), len(data.held_out_images)) == (108, 12)
    sets = [
        {image.numpy().tobytes() for image in images}
        for images in (train, data.held_out_images, data.test_images)
    ]
    assert len(set.union(*sets)) == 108 + 12 + 30
    validation = data.with_validation()
    assert torch.equal(validation.test_images, data.held_out_images)
    assert torch.equal(validation.test_labels, data.held_out_labels)


def test_torchvisions_files_are_read(
    cifar10: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rows = torch.arange(20 * 3072).remainder(251).to(torch.uint8).view(20, 3072)

    def store(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    train = store("data_batch_1", {"data": rows.numpy(), "labels": list(range(10)) * 2})
    test = store("test_batch", {"data": rows[:5].numpy(), "labels": [9, 8, 7, 6, 5]})
    monkeypatch.setattr(CIFAR10, "train_list", [train])
    monkeypatch.setattr(CIFAR10, "test_list", [test])
    meta = dict(zip(("filename", "md5"), store("meta", {"names": list("abcdefghij")}), strict=True))
    monkeypatch.setattr(CIFAR10, "meta", {**meta, "key": "names"})

    # By its folder, and as an earlier download.
    for named, source in ((tmp_path / "data", "CIFAR-10 in"), (None, "torchvision's download")):
        data = cifar10.images.load(named, tmp_path / "data", Path("cache.pt"), False)
        assert source in data.source
        assert data.classes == tuple("abcdefghij")
        assert len(data.train_labels) == 18
        for image, label in zip(data.test_images, data.test_labels, strict=True):
            assert torch.equal(image.permute(2, 0, 1).flatten(), rows[9 - int(label)])
    assert not Path("cache.pt").exists()


def test_augmented_images_are_crops_and_mirrored_crops(cifar10: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    padded = torch.randint(0, 256, (200, 40, 40, 3), generator=generator).to(torch.uint8)
    seen = set()
    for image, whole in zip(cifar10.images.augmented(padded, generator), padded, strict=True):
        (found,) = (
            (row, column, is_flipped)
            for row in range(9)
            for column in range(9)
            for is_flipped in (False, True)
            for crop in [whole[row : row + 32, column : column + 32]]
            if torch.equal(image, crop.flip(1) if is_flipped else crop)
        )
        seen.add(found)
    # 200 draws of 162 cases find about 115 of them.
    assert len(seen) > 90
    assert {flip for _, _, flip in seen} == {False, True}


def test_normalised_images_lie_as_the_bytes_do(cifar10: ModuleType) -> None:
    pixels = torch.tensor(cifar10.images.MEAN).round().to(torch.uint8).expand(2, 32, 32, 3)
    inputs = cifar10.images.normalised(pixels.contiguous())
    assert inputs.shape == (2, 3, 32, 32)
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert inputs.abs().max() < 0.01


# ---- what goes wrong gets a sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nowhere"], "--data must name a folder with CIFAR-10; there is no nowhere"),
        (["--data", "."], "must hold CIFAR-10 as torchvision stores it"),
        ([], "--quick downloads nothing; give a folder that holds cifar-10-batches-py, or"),
        (["--data", "in", "--no-norm", "--lr", "1e30", "--momentum", "1e9"], "diverged in epoch"),
        (["--alpha", "0.5"], "must be a number >= 1.0, got 0.5"),
        (["--alpha", "often"], "invalid float value: 'often'"),
        (["--alpha", "2", "2"], "must not name a value twice"),
        (["--kept", "0"], "must be a share, above 0 and at most 1, got 0"),
        (["--begin", "0.8"], "--begin must be below --end, got 0.8 and 0.75"),
        (["--alpha", "adaptive", "--start", "1"], "--start must be above 1"),
        (["--optimizer", "adam", "--rule", "virtual"], "needs --optimizer sgd or adamw"),
        (["--optimizer", "adam", "--momentum", "0.9"], "is an option of --optimizer sgd"),
        (["--model", "resnet18", "--no-norm"], "is an option of --model five-layer"),
    ],
)
def test_errors_are_sentences(
    cifar10: ModuleType,
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cifar10.main(["--quick", "--device", "cpu", "--out", "out", *arguments])
    assert stopped.value.code not in (0, None)
    assert sentence in " ".join(f"{stopped.value.code} {capsys.readouterr().err}".split())


def test_no_web_is_a_sentence(cifar10: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10.images.CIFAR10, "url", "http://127.0.0.1:9/")
    with pytest.raises(SystemExit, match=r"it could not be downloaded: .* with --data"):
        cifar10.main(["--device", "cpu", "--out", "out"])


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (("test/red/0.jpg", (16, 32, 3)), "must have 32 × 32 pixels, got 32 × 16 in .*0.jpg"),
        (("test/grey/0.jpg", (32, 32, 3)), "the same classes, got blue, green, red and blue, gr"),
        (("test/red/0.jpg", None), "0.jpg is no picture"),
    ],
)
def test_pictures_that_are_none(
    cifar10: ModuleType,
    pictures: Path,
    spoil: tuple[str, tuple[int, ...] | None],
    sentence: str,
) -> None:
    name, shape = spoil
    if shape is None:
        (pictures / name).write_bytes(b"no picture")
    else:
        write(pictures / name, torch.zeros(shape))
    with pytest.raises(SystemExit, match=sentence):
        cifar10.main(["--quick", "--data", str(pictures), "--out", "out"])
    assert not list(Path().rglob("*.pt*"))
