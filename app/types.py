"""The nouns that cross rooms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

RGBImage = NewType("RGBImage", Image.Image)
"""A decoded image of any size: mode RGB, or L, whose one channel stands for three equal ones."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom, in pixels of an image."""

Pixels = NDArray[np.uint8]
"""uint8 (S, S, 3), RGB, 0..255, C-contiguous."""

Batch = NDArray[np.uint8]
"""uint8 (N, S, S, 3), RGB, 0..255, C-contiguous."""

Vector = NDArray[np.float32]
"""float32 (C,) or (D,)."""


@dataclass(frozen=True, slots=True)
class Rows:
    """What a backend answers to a batch.

    Attributes:
        logits: float32 (N, C).
        embedding: float32 (N, D), pooled, after the final norm, not normalised to length one.
    """

    logits: NDArray[np.float32]
    embedding: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Row:
    """What one image got, and what it cost.

    Attributes:
        logits: float32 (C,).
        embedding: float32 (D,).
        queue_seconds: from submission to the start of its batch.
        inference_seconds: of the batch it was in.
    """

    logits: Vector
    embedding: Vector
    queue_seconds: float
    inference_seconds: float


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class of a ranking.

    Attributes:
        index: of the class.
        label: its name, None where the package has no labels.
        probability: softmax over all classes, float32, 0..1.
    """

    index: int
    label: str | None
    probability: np.float32


@dataclass(frozen=True, slots=True)
class WordNetPrediction(Prediction):
    """One class of a ranking, in a package whose classes have WordNet ids.

    Attributes:
        wordnet_id: `n` and eight digits.
    """

    wordnet_id: str
