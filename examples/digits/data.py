"""The scans of scikit-learn's `load_digits`: a fixed split, and a digit as a client sends it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

CLASSES = 10
GREY_LEVELS = 17
# Of every five digits of a class, in the order of the data set, this one is held out, and that
# one is left out of training when something has to be chosen.
FOLDS, HELD_OUT_FOLD, VALIDATION_FOLD = 5, 2, 4


@dataclass(frozen=True)
class Scans:
    """Some of the data set's digits.

    Attributes:
        ink: float32 (N, 8, 8), 0 paper .. 1 ink.
        labels: int64 (N,), 0..9.
    """

    ink: NDArray[np.float32]
    labels: NDArray[np.int64]

    def take(self, chosen: NDArray[np.bool_]) -> Scans:
        """Return the digits whose flag is set."""
        return Scans(self.ink[chosen], self.labels[chosen])


def training_scans() -> Scans:
    """Return the 1,438 digits that weights may be fitted to."""
    scans, folds = _all_scans()
    return scans.take(folds != HELD_OUT_FOLD)


def training_and_validation_scans() -> tuple[Scans, Scans]:
    """Split the training digits once more, to choose a recipe without the held-out ones."""
    scans, folds = _all_scans()
    training = (folds != HELD_OUT_FOLD) & (folds != VALIDATION_FOLD)
    return scans.take(training), scans.take(folds == VALIDATION_FOLD)


def held_out_scans() -> Scans:
    """Return the 359 digits that no weight was fitted to."""
    scans, folds = _all_scans()
    return scans.take(folds == HELD_OUT_FOLD)


def held_out(size: int = 32) -> list[tuple[bytes, int]]:
    """Return the held-out digits as (PNG, label), in the order of the data set."""
    scans = held_out_scans()
    return [
        (encode_png(render_scan(ink, size)), int(label))
        for ink, label in zip(scans.ink, scans.labels, strict=True)
    ]


def render_scan(ink: NDArray[np.float32], size: int = 32) -> Image.Image:
    """Draw a scan as the image a client would send: dark ink on white paper, enlarged.

    Args:
        ink: float32 (8, 8), 0 paper .. 1 ink.
        size: side of the image in pixels.
    """
    grey = np.rint(255 * (1 - ink)).astype(np.uint8)
    return Image.fromarray(grey).resize((size, size), Image.Resampling.BICUBIC)


def encode_png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    file = BytesIO()
    image.save(file, "png", optimize=True)
    return file.getvalue()


@cache
def _all_scans() -> tuple[Scans, NDArray[np.int64]]:
    """Return all 1,797 digits, and the fold of each: its position within its class, modulo 5."""
    digits = load_digits()
    ink = (digits.images / (GREY_LEVELS - 1)).astype(np.float32)
    labels = digits.target.astype(np.int64)
    folds = np.empty_like(labels)
    for label in range(CLASSES):
        members = np.flatnonzero(labels == label)
        folds[members] = np.arange(len(members)) % FOLDS
    return Scans(ink, labels), folds
