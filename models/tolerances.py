"""How far a precision's answers may be from torch in float32; no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Precision = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class Tolerance:
    """Bounds of a proof.

    Attributes:
        logit: largest absolute difference of a logit ...
        relative_logit: ... plus this share of the standard deviation of the reference's logits.
        cosine: largest cosine distance of an embedding.
    """

    logit: float
    relative_logit: float
    cosine: float

    def allowed(self, reference: NDArray[np.float32]) -> float:
        """Return the largest allowed difference from logits (N, C)."""
        return self.logit + self.relative_logit * float(reference.std(dtype=np.float64))

    @property
    def embedding(self) -> float:
        """The largest distance of an embedding, relative to its length."""
        # Two vectors of the same length at cosine distance c are sqrt(2 c) of that length apart.
        return math.sqrt(2 * self.cosine)


# fp32: sums in another order differ by about 1e-5 on logits of size one to ten.
# Halves: a few times the worst of seven networks with random weights, see docs/decisions/0004: fp16
# 0.0083 standard deviations and 7e-6 in cosine distance, bf16 0.13 and 6e-4. A wrong graph is off
# by about one. The absolute part is for logits that are all the same.
TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(logit=1e-4, relative_logit=0.0, cosine=1e-6),
    "fp16": Tolerance(logit=1e-4, relative_logit=0.04, cosine=5e-5),
    "bf16": Tolerance(logit=1e-4, relative_logit=0.3, cosine=3e-3),
}

# These hold where a package is exported; other processors add in other orders. In float32 that is
# a difference which a wrong graph or a damaged library exceeds by far; half precisions round more
# coarsely than sums differ.
ELSEWHERE: dict[Precision, float] = {"fp32": 10, "fp16": 2, "bf16": 2}
"""By how much a tolerance widens on another machine than the one of the export."""


def cosine_distance(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return 1 - cosine similarity of the rows of two (N, D) arrays, in float64."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    distance: NDArray[np.float64] = 1 - (a * b).sum(1) / norms.clip(1e-300)
    return distance
