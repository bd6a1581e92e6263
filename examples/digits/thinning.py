"""Shapes become lines one pixel wide; and the neighbours of a line's pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def thin(shapes: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Thin shapes to lines one pixel wide.

    Args:
        shapes: bool (N, H, W); the outermost pixels must be empty.

    Source: Zhang and Suen, "A fast parallel algorithm for thinning digital patterns" (1984).
    """
    lines = shapes.copy()
    while True:
        before = int(lines.sum())
        for is_first in (True, False):
            lines &= ~_removable(lines, is_first)
        if int(lines.sum()) == before:
            return lines


def joins(lines: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which pixels of lines (..., H, W) three or more strokes leave."""
    return np.asarray(lines & (_entries(_ring(lines)) >= 3))


def _ring(lines: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the eight neighbours (8, ..., H, W) of every pixel, clockwise from the north."""
    clockwise = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))
    return np.stack([np.roll(lines, (-dy, -dx), axis=(-2, -1)) for dy, dx in clockwise])


def _entries(ring: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Count how often a walk around a pixel steps from paper onto ink."""
    return np.asarray((~ring & np.roll(ring, -1, axis=0)).sum(axis=0, dtype=np.int8))


def _removable(lines: NDArray[np.bool_], is_first: bool) -> NDArray[np.bool_]:
    """Return the pixels that one of the two alternating passes of the algorithm takes away."""
    ring = _ring(lines)
    north, east, south, west = ring[::2]
    neighbours = ring.sum(axis=0, dtype=np.int8)
    if is_first:
        is_on_rim = ~(north & east & south) & ~(east & south & west)
    else:
        is_on_rim = ~(north & east & west) & ~(north & south & west)
    is_inside = (neighbours >= 2) & (neighbours <= 6) & (_entries(ring) == 1)
    return np.asarray(lines & is_inside & is_on_rim)
