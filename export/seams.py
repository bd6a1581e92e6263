"""What the command line brings from the service: its backends and its way to read an image.

The rooms of export and app do not know each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.package import InputSpec, Package
from models.tolerances import Precision

Array = NDArray[np.float32]
Answers = tuple[Array, Array]
"""Logits float32 (N, C) and embeddings float32 (N, D)."""
Run = Callable[[NDArray[np.uint8]], Answers]
"""Answers a batch uint8 (N, S, S, 3)."""


class CannotStart(Exception):
    """A backend that does not run here; the message is one sentence that says why."""


@dataclass(frozen=True)
class Candidate:
    """A started backend, as far as a proof needs it.

    Attributes:
        backend: as in `METASERVE_BACKEND`.
        precision: that it computes in.
        device: for example `cpu` or `cuda:0`.
        runtime: library and version, in words.
        max_batch_size: images a batch may hold at most, None for any number.
        run: answers a batch.
        close: frees what it holds.
    """

    backend: str
    precision: Precision
    device: str
    runtime: str
    max_batch_size: int | None
    run: Run
    close: Callable[[], None]


OpenBackend = Callable[[str, Package], Candidate]
"""Starts the backend of a name on a package, or raises CannotStart."""


class UnusableImage(Exception):
    """A file that is no image the service would take; the message says why."""


ReadImage = Callable[[bytes, InputSpec], NDArray[np.uint8]]
"""Reads a file as the service does, into uint8 (S, S, 3); raises UnusableImage."""
