"""Scans become strokes: the centre line of the ink, kept as the distance to it.

The scans have 8x8 pixels; a drawing has crisp strokes of any width. From the distance to the
centre line a stroke of any width is one comparison, after any warp. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.neighbors import KNeighborsClassifier

from examples.digits.data import Scans
from examples.digits.shapes import reshape
from examples.digits.thinning import thin

CELL = 6  # fine pixels per pixel of a scan
MARGIN = 12  # fine pixels of paper around the scan
FINE_SIDE = 8 * CELL + 2 * MARGIN
# How much the enlarged scan is sharpened before it is cut into ink and paper. Little keeps
# faint joins, much opens the loops that 8x8 pixels have filled.
SHARPENINGS = (1.5, 3.0, 4.5)
PEN = 8.0  # width in fine pixels that comes closest to the scans
STYLES = 6  # ways to write a digit, for `style_weights`
# Loops of each digit. A nine traced with a break is a four to anybody who sees only the line.
LOOPS = ((1,), (0,), (0, 1), (0,), (0, 1), (0,), (1,), (0,), (2,), (1,))


@dataclass(frozen=True)
class Strokes:
    """Every scan as it is and as centre lines: one per sharpening, then these in a rare shape.

    Attributes:
        fine: float32 (N, FINE_SIDE, FINE_SIDE), the scan enlarged, 0 paper .. 1 ink.
        distances: float32 (N, L, FINE_SIDE, FINE_SIDE), fine pixels to the centre line.
        legible: bool (N, L), whether the line still reads as the digit.
    """

    fine: NDArray[np.float32]
    distances: NDArray[np.float32]
    legible: NDArray[np.bool_]


def trace(scans: Scans) -> Strokes:
    """Trace the centre lines of scans."""
    fine = enlarge(scans.ink)
    blurred = ndimage.gaussian_filter(fine, (0, CELL, CELL))
    lines = [thin(fine + amount * (fine - blurred) > 0.5) for amount in SHARPENINGS]
    distances = np.stack([_distance_to(line) for line in lines], axis=1)
    loops = np.stack([_count_loops(line) for line in lines], axis=1)
    has_loops = [
        np.isin(found, LOOPS[label]) for found, label in zip(loops, scans.labels, strict=True)
    ]
    legible = _legible(scans, distances) & np.stack(has_loops)
    chance = np.random.default_rng(0)
    rare = [reshape(line, scans.labels, chance) for line in lines]
    rare_distances = np.stack([_distance_to(line) for line, _ in rare], axis=1)
    is_rare = np.stack([changed for _, changed in rare], axis=1)
    return Strokes(
        fine,
        np.concatenate((distances, rare_distances), axis=1),
        np.concatenate((legible, legible & is_rare), axis=1),
    )


def enlarge(ink: NDArray[np.float32]) -> NDArray[np.float32]:
    """Enlarge scans smoothly and put paper around them.

    Args:
        ink: float32 (N, 8, 8), 0..1.

    Returns:
        float32 (N, FINE_SIDE, FINE_SIDE), 0..1.
    """
    rim = MARGIN // CELL
    padded = np.pad(ink, ((0, 0), (rim, rim), (rim, rim)))
    # grid_mode: a pixel is an area, so that a scan keeps its place when it is enlarged.
    fine = ndimage.zoom(padded, (1, CELL, CELL), order=3, mode="grid-constant", grid_mode=True)
    return np.clip(np.asarray(fine, np.float32), 0, 1)


def style_weights(scans: Scans) -> NDArray[np.float32]:
    """Weigh scans so that every way to write a digit counts the same.

    Few writers draw a seven without a bar, or a one with a base; nobody labelled which. The
    clusters of a class tell them apart well enough.

    Returns:
        float32 (N,), with the same sum for every cluster of a class.
    """
    weights = np.empty(len(scans.labels), np.float32)
    for label in np.unique(scans.labels):
        members = np.flatnonzero(scans.labels == label)
        pixels = scans.ink[members].reshape(len(members), 64)
        styles = KMeans(STYLES, n_init=10, random_state=0).fit_predict(pixels)
        weights[members] = 1 / np.bincount(styles)[styles]
    return weights


def _distance_to(lines: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return float32 (N, H, W): Euclidean distance to the nearest set pixel of the same image."""
    return np.stack([ndimage.distance_transform_edt(~line) for line in lines]).astype(np.float32)


def _count_loops(lines: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return int64 (N,): how many pieces of paper the lines of an image enclose."""
    return np.array([ndimage.label(~line)[1] - 1 for line in lines])


def _legible(scans: Scans, distances: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Tell which lines, redrawn and scanned again, lie among scans of the same class.

    A blot thins to a line that is no digit any more: a filled eight becomes a one.
    """
    inner = slice(MARGIN, FINE_SIDE - MARGIN)
    pen = np.clip(PEN / 2 + 0.5 - distances[:, :, inner, inner], 0, 1)
    count, levels = pen.shape[:2]
    rescanned = pen.reshape(count, levels, 8, CELL, 8, CELL).mean(axis=(3, 5))
    neighbours = KNeighborsClassifier(5).fit(scans.ink.reshape(count, 64), scans.labels)
    read = neighbours.predict(rescanned.reshape(-1, 64)).reshape(count, levels)
    return np.asarray(read == scans.labels[:, None])
