"""What the network answered -> what the caller asked for: the best classes, or a unit vector."""

from __future__ import annotations

import math

import numpy as np

from app.errors import InferenceFailed
from app.types import Prediction, Vector, WordNetPrediction

Names = tuple[str, ...]

FEW_CLASSES = 64
"""Up to here Python sorts faster than NumPy."""


def rank(
    logits: Vector, labels: Names | None, top_k: int, wordnet_ids: Names | None = None
) -> list[Prediction]:
    """Return the most probable classes, best first; of equals, the lower index first.

    Args:
        logits: float32 (C,).
        labels: one per class, or None.
        top_k: how many, at least 1; more than C gives C.
        wordnet_ids: one per class, or None.

    Raises:
        InferenceFailed: a logit is NaN or infinite upwards.
    """
    exponentials, total = _exponentials(logits)
    predictions = []
    for index in _largest(logits, min(top_k, len(logits))):
        known = index, labels[index] if labels else None, exponentials[index] / total
        predictions.append(
            WordNetPrediction(*known, wordnet_ids[index]) if wordnet_ids else Prediction(*known)
        )
    return predictions


def normalise(embedding: Vector) -> Vector:
    """Return the vector at L2 length one, float32 (D,); a zero vector stays zero.

    Raises:
        InferenceFailed: an element is NaN or infinite.
    """
    # Squares of float32 neither overflow nor vanish in float64.
    length = np.linalg.norm(embedding.astype(np.float64))
    if not np.isfinite(length):
        raise InferenceFailed("the network's embedding of this image is not finite")
    return embedding.copy() if length == 0 else (embedding / length).astype(np.float32)


def _exponentials(logits: Vector) -> tuple[Vector, np.float32]:
    """Return a softmax before its division, float32 (C,), and what to divide by.

    The largest exponent is 0, so nothing overflows.
    """
    peak = logits.max()
    if not math.isfinite(peak):  # NaN spreads to the maximum, so this sees every bad element
        raise InferenceFailed("the network's logits of this image are not finite")
    exponentials: Vector = logits - peak
    np.exp(exponentials, out=exponentials)
    return exponentials, exponentials.sum()


def _largest(logits: Vector, count: int) -> list[int]:
    """Return the indices of the `count` largest, largest first; of equals, the lower first.

    NumPy lets go of the interpreter to sort, however little, and at each step over more than 500
    elements; to have it back takes longer than the step where images are decoded meanwhile. So
    for a few of many there is one such step, and Python does the rest.
    """
    if len(logits) <= FEW_CLASSES:
        values = logits.tolist()
        return sorted(range(len(values)), key=values.__getitem__, reverse=True)[:count]
    if count <= FEW_CLASSES and count < len(logits):
        first_beyond = len(logits) - count - 1
        beyond, *best = np.argpartition(logits, first_beyond)[first_beyond:].tolist()
        found = {index: logits.item(index) for index in sorted(best)}
        if logits.item(beyond) < min(found.values()):  # else of equals any may be left out
            return sorted(found, key=found.__getitem__, reverse=True)
    # A partition is in no fixed order among equals: it says how much the last has that belongs,
    # and a stable sort orders all that reach it.
    last = np.partition(logits, len(logits) - count)[len(logits) - count]
    candidates = np.flatnonzero(logits >= last)
    order = np.argsort(-logits[candidates], kind="stable")[:count]
    return [int(index) for index in candidates[order]]
