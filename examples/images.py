"""CIFAR-10 as tensors of bytes, from torchvision's files or from folders of pictures; batches."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import web
from digits import DataError
from torch import Tensor
from torch.nn.functional import pad
from torchvision.datasets import CIFAR10, ImageFolder

SIDE = 32  # pixels, of each image

# Random crops come from images with this many reflected pixels more on each side.
PADDING = 4

# The last images of a fixed order of the training set are held out: one in ten, CIFAR-10's 5,000.
HELD_OUT = 0.1

# Mean and standard deviation of red, green and blue over the 50,000 training images, in bytes.
MEAN = (125.3, 123.0, 113.9)
STD = (63.0, 62.1, 66.7)


@dataclass(frozen=True)
class Images:
    """Images [N, 32, 32, 3], uint8, and labels [N], int64; ``classes`` names the labels.

    Those held out are no part of the training: choices are made on them. The training images
    have `PADDING` more pixels on each side.
    """

    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    source: str

    def first(self, train: int, test: int) -> Images:
        """The first images only, for a quick run."""
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
            source=f"{self.source}, the first {train:,} and {test:,}",
        )

    def with_validation(self) -> Images:
        """The images held out as the test set; the real one is left alone."""
        return replace(
            self,
            test_images=self.held_out_images,
            test_labels=self.held_out_labels,
            source=f"{self.source}, tested on training images held out",
        )

    def to(self, device: torch.device) -> Images:
        """The same on ``device``."""
        values = vars(self).items()
        return Images(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in values})


# ---- where they come from


def load(folder: Path | None, download_to: Path, cache: Path, use_web: bool) -> Images:
    """CIFAR-10 from ``folder``, or from the web.

    Args:
        folder: holds ``cifar-10-batches-py`` as torchvision stores it, or the pictures as files,
            ``train/<class>/*`` and ``test/<class>/*``.
        download_to: without a folder, where torchvision's download goes and is found again.
        cache: the file that keeps decoded pictures for the next start.
        use_web: whether to try the download.

    Raises:
        DataError: there are no such images, and none can be downloaded.
    """
    if folder is None:
        pixels, source = _from_web(download_to, use_web)
    elif not folder.is_dir():
        raise DataError(f"--data must name a folder with CIFAR-10; there is no {folder}")
    elif (folder / "train").is_dir() and (folder / "test").is_dir():
        pixels, source = _from_pictures(folder, cache)
    else:
        pixels, source = _from_torchvision(folder), f"CIFAR-10 in {folder}"
    return _split(*pixels, source)


# Both sets as (images [N, 32, 32, 3], labels [N]), and the names of the classes.
_Pixels = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[str, ...]]


def _from_torchvision(folder: Path) -> _Pixels:
    try:
        train, test = (CIFAR10(str(folder), train=is_train) for is_train in (True, False))
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise DataError(
            f"{folder} must hold CIFAR-10 as torchvision stores it (cifar-10-batches-py) or as "
            f"pictures (train/<class>/*.jpg and test/<class>/*.jpg): {web.first_line(error)}"
        ) from error
    sets = [(torch.from_numpy(part.data), torch.tensor(part.targets)) for part in (train, test)]
    return sets[0], sets[1], tuple(train.classes)


def _from_web(folder: Path, use_web: bool) -> tuple[_Pixels, str]:
    if not (folder / CIFAR10.base_folder).is_dir():
        why = "--quick downloads nothing"
        if use_web:
            why = _download(folder)
        if why:
            raise DataError(
                f"there is no CIFAR-10 to train on: {why}; give a folder that holds "
                "cifar-10-batches-py, or train/<class>/*.jpg and test/<class>/*.jpg, with --data"
            )
    return _from_torchvision(folder), f"CIFAR-10 in {folder}, torchvision's download"


def _download(folder: Path) -> str:
    """Why there is nothing; or nothing, and the files are there."""
    # torchvision prints a progress bar of its own; the caller says what came of it in one line.
    try:
        with (
            web.impatient(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            web.check([CIFAR10.url])
            CIFAR10(str(folder), download=True)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        return f"it could not be downloaded: {web.first_line(error)}"
    return ""


def _from_pictures(folder: Path, cache: Path) -> tuple[_Pixels, str]:
    """Pictures decoded once: they come from ``cache`` until a file of theirs changes."""
    state, kinds = _fingerprint(folder)
    pixels = _read_cache(cache, state)
    if pixels is None:
        pixels = _decoded(folder)
        cache.parent.mkdir(parents=True, exist_ok=True)
        # Never half a file under this name, whatever happens meanwhile.
        beside = cache.with_name(cache.name + ".part")
        torch.save({"state": state, "pixels": pixels}, beside)
        beside.replace(cache)
    source = f"pictures in {folder}"
    if kinds & {".jpg", ".jpeg"}:
        source += ", JPEG copies: accuracies lie a little below those on the original pixels"
    return pixels, source


def _fingerprint(folder: Path) -> tuple[str, set[str]]:
    """What changes when a picture is added, taken away or written anew; and the kinds of files."""
    files = sorted(path for part in ("train", "test") for path in (folder / part).glob("*/*"))
    digest, kinds = hashlib.sha256(), set()
    for path in files:
        stat = path.stat()
        digest.update(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        kinds.add(path.suffix.lower())
    return digest.hexdigest(), kinds


def _read_cache(cache: Path, state: str) -> _Pixels | None:
    try:
        stored = torch.load(cache, weights_only=True)
        return stored["pixels"] if stored["state"] == state else None
    # Nothing there, or something else: the pictures are decoded anew.
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, KeyError, TypeError):
        return None


def _decoded(folder: Path) -> _Pixels:
    try:
        parts = [ImageFolder(str(folder / part)) for part in ("train", "test")]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"{folder} must hold pictures as train/<class>/*.jpg and test/<class>/*.jpg: "
            f"{web.first_line(error)}"
        ) from error
    if parts[0].classes != parts[1].classes:
        raise DataError(
            f"train and test in {folder} must have the same classes, got "
            f"{', '.join(parts[0].classes)} and {', '.join(parts[1].classes)}"
        )
    sets = [
        (torch.stack(list(_bytes_of(part))), torch.tensor(part.targets, dtype=torch.int64))
        for part in parts
    ]
    return sets[0], sets[1], tuple(parts[0].classes)


def _bytes_of(part: ImageFolder) -> Iterator[Tensor]:
    for place, (path, _) in enumerate(part.samples):
        try:
            picture, _ = part[place]
        except OSError as error:
            raise DataError(f"{path} is no picture: {web.first_line(error)}") from error
        if picture.size != (SIDE, SIDE):
            width, height = picture.size
            raise DataError(
                f"pictures must have {SIDE} × {SIDE} pixels, got {width} × {height} in {path}"
            )
        yield torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(SIDE, SIDE, 3)


def _split(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: tuple[str, ...], source: str
) -> Images:
    images, labels = train
    # They may come sorted by label; one fixed order for all, so that the two sets never mix.
    order, test_order = (
        torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
        for part in (labels, test[1])
    )
    rest = len(labels) - round(HELD_OUT * len(labels))
    if not 0 < rest < len(labels):
        raise DataError(f"there must be at least 5 training images, got {len(labels)} ({source})")
    return Images(
        _padded(images[order[:rest]]),
        labels[order[:rest]],
        images[order[rest:]],
        labels[order[rest:]],
        test[0][test_order],
        test[1][test_order],
        classes,
        source,
    )


def _padded(images: Tensor) -> Tensor:
    sides = (PADDING,) * 4
    # One image of all channels at a time would take seconds, all of them at once gigabytes.
    parts = [
        pad(part.permute(0, 3, 1, 2).float(), sides, "reflect").byte().permute(0, 2, 3, 1)
        for part in images.split(1_000)
    ]
    return torch.cat(parts).contiguous()


# ---- batches


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image cropped at a random place and flipped in one of two cases.

    Args:
        images: [N, 40, 40, 3], uint8: padded ones.
        generator: on the CPU, whatever the images' device, so that all devices see the same.

    Returns:
        [N, 32, 32, 3], uint8.
    """
    n = len(images)
    corner = torch.randint(0, 2 * PADDING + 1, (2, n, 1), generator=generator)
    is_flipped = torch.rand(n, 1, generator=generator) < 0.5
    side = torch.arange(SIDE)
    rows = (corner[0] + side).to(images.device)
    columns = (corner[1] + torch.where(is_flipped, SIDE - 1 - side, side)).to(images.device)
    every = torch.arange(n, device=images.device)
    return images[every[:, None, None], rows[:, :, None], columns[:, None, :]]


def normalised(images: Tensor) -> Tensor:
    """What the networks read: [N, 3, 32, 32], float32, with mean about 0 and deviation about 1.

    The channels lie next to each other in memory (channels_last), as in ``images``
    [N, 32, 32, 3], uint8.
    """
    mean, std = (torch.tensor(v, device=images.device) for v in (MEAN, STD))
    return ((images - mean) / std).permute(0, 3, 1, 2)
