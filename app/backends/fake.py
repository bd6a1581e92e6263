"""Answers known in advance: for tests, demonstrations and load tests without a network."""

from __future__ import annotations

import math
import threading
import time

import numpy as np

from app.backends.base import BackendInfo
from app.types import Batch, Rows

# Rows and columns that are looked at, about.
SIDE = 32


class FakeBackend:
    """Computes its answers from the pixels' mean, so that a swapped row is seen at once.

    Of a large image it looks at 32 rows and columns: load tests want it to cost next to nothing.

    Args:
        input_size: S of the batches.
        classes: length of a logits row.
        embedding_dim: length of an embedding row.
        seconds: how long a batch takes.
        gate: when given, every batch waits for it to be set.
    """

    def __init__(
        self,
        input_size: int = 8,
        classes: int = 10,
        embedding_dim: int = 4,
        *,
        seconds: float = 0.0,
        gate: threading.Event | None = None,
    ) -> None:
        self.info = BackendInfo(
            name="fake",
            device="cpu",
            precision="fp32",
            runtime="answers from the mean of the pixels",
            input_size=input_size,
            classes=classes,
            embedding_dim=embedding_dim,
            runs_package=False,
        )
        self._seconds = seconds
        self._gate = gate

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        """Answer with functions of each image's mean.

        The best class is the mean scaled to the number of classes; every component of the
        embedding is the mean in 0..1, plus its index.
        """
        if self._gate is not None and not self._gate.wait(timeout=60):
            raise TimeoutError("the fake backend's gate stayed shut for 60 s")
        if self._seconds:
            time.sleep(self._seconds)
        step = max(self.info.input_size // SIDE, 1)
        means = batch[:, ::step, ::step].mean((1, 2, 3), dtype=np.float64) / 255
        classes = np.arange(self.info.classes)
        logits = -((means[:, None] * (self.info.classes - 1) - classes) ** 2)
        embedding = means[:, None] + np.arange(self.info.embedding_dim)
        return Rows(logits.astype(np.float32), embedding.astype(np.float32))

    def close(self) -> None:
        """Nothing to free."""
