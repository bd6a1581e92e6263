"""Shapes that few of the data set's writers make, from the lines of shapes that they do make.

A seven loses its bar, a four gets a stem at which its crossbar ends, a one gets a base. What is
added is ruled: straight strokes of about the length that the scans' own have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from examples.digits.thinning import joins

Line = NDArray[np.bool_]  # (H, W)
TOUCHING = np.ones((3, 3), np.bool_)


def reshape(
    lines: NDArray[np.bool_], labels: NDArray[np.int64], chance: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Give digits the shape of their class that is rare.

    Args:
        lines: bool (N, H, W), centre lines one pixel wide.
        labels: int64 (N,), 0..9.
        chance: for the lengths of strokes.

    Returns:
        bool (N, H, W), the lines, and bool (N,), which of them have another shape than before.
    """
    reshaped, is_rare = lines.copy(), np.zeros(len(lines), np.bool_)
    for index, label in enumerate(labels.tolist()):
        shape = RARE_SHAPES[label](lines[index], chance) if label in RARE_SHAPES else None
        if shape is not None:
            reshaped[index], is_rare[index] = shape, True
    return reshaped, is_rare


def one_with_base(line: Line, chance: np.random.Generator) -> Line | None:
    """Rule a base at the foot, unless there is one."""
    rows, columns = np.nonzero(line)
    bottom, height = rows.max(), np.ptp(rows)
    if np.ptp(columns[rows > bottom - 0.15 * height]) > 0.25 * height:
        return None
    left, right = chance.uniform(0.15, 0.35, 2) * height
    foot = columns[rows == bottom].mean()
    return _rule(line, (bottom, foot - left), (bottom, foot + right))


def four_without_overshoot(line: Line, chance: np.random.Generator) -> Line | None:
    """Keep the left arm and the crossbar of an open four; rule a stem where the bar ends."""
    at_joins = np.argwhere(joins(line))
    is_open = ndimage.label(~line)[1] == 1
    if not is_open or len(at_joins) == 0 or np.ptp(at_joins, axis=0).max() > 3:
        return None
    row, column = np.round(at_joins.mean(axis=0)).astype(int)
    cut = line.copy()
    cut[row - 2 : row + 3, column - 2 : column + 3] = False
    pieces, _ = ndimage.label(cut, TOUCHING)
    rows, columns = np.nonzero(line)
    top, height = rows[0], np.ptp(rows)
    arm = np.asarray(pieces == pieces[top, columns[0]], np.bool_)
    arm_pixels = np.argwhere(arm)
    left, right = arm_pixels[:, 1].min(), arm_pixels[:, 1].max()
    depth = row - top
    if column - left < 0.15 * height or depth < 0.3 * height:
        return None
    lean = chance.uniform(0, 0.9) * (right - left) / depth
    gap = chance.uniform(0.2, 0.35) * height  # less, and it would be the loop of a nine
    stem = max(right + gap - lean * depth, column)
    above, below = chance.uniform(0.75, 1.1) * depth, chance.uniform(0.4, 1.1) * depth
    arm_end = arm_pixels[np.abs(arm_pixels - (row, column)).sum(axis=1).argmin()]
    with_bar = _rule(arm, (arm_end[0], arm_end[1]), (row, stem))
    return _rule(with_bar, (row - above, stem + lean * above), (row + below, stem - lean * below))


def seven_without_bar(line: Line, chance: np.random.Generator) -> Line | None:
    """Keep what lies above the bar; rule the stem from there to the foot.

    A top stroke that is short or steep is refused: it would be the flag of a one.
    """
    rows, columns = np.nonzero(line)
    top, height = rows.min(), np.ptp(rows)
    cut = top + round(0.25 * height)
    upper = columns[rows <= cut]
    width, drop = np.ptp(upper), rows[columns == upper.min()].min() - top
    if width < 0.35 * height or drop > 0.5 * width:
        return None
    start, foot = columns[rows == cut].max(), columns[rows == rows.max()].max()
    upright = chance.uniform(0, 0.45)  # the scans' sevens slant more than drawn ones
    above_bar = line.copy()
    above_bar[cut:] = False
    return _rule(above_bar, (cut, start), (rows.max(), foot + upright * (start - foot)))


RARE_SHAPES: dict[int, Callable[[Line, np.random.Generator], Line | None]] = {
    1: one_with_base,
    4: four_without_overshoot,
    7: seven_without_bar,
}


def _rule(line: Line, start: tuple[float, float], end: tuple[float, float]) -> Line:
    """Add a straight stroke from one (row, column) to another."""
    points = np.rint(np.linspace(start, end, 2 * len(line))).astype(int).clip(0, len(line) - 1)
    ruled = line.copy()
    ruled[points[:, 0], points[:, 1]] = True
    return ruled
