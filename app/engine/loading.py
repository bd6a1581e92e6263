"""A package becomes a warm engine: hashes, backend, golden outputs, batch sizes timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from app.backends.base import Backend
from app.engine.base import GoldenCheck
from app.engine.timing import USEFUL_GAIN, ServiceTimes
from app.errors import first_line
from app.types import Batch, Rows
from models.buckets import bucket_sizes
from models.golden import golden_images
from models.package import Package, PackageError
from models.tolerances import ELSEWHERE, TOLERANCES, Precision

# A run of a small network takes less than a millisecond, and another process on the same core takes
# it away for several: the best of 50 ms is one that was left alone. Of a large network two runs
# that agree are enough, or a start would take a minute; where they do not, something interfered.
MIN_RUNS = 2
MIN_SECONDS = 0.05
MAX_SECONDS = 1.0
MAX_RUNS = 200


def check_golden(backend: Backend, package: Package) -> GoldenCheck:
    """Reproduce the package's golden outputs, alone and in one batch, or in as large ones as fit.

    Raises:
        PackageError: the graph cannot be run as the manifest says, or the answers differ by more
            than the tolerance of the backend's precision allows.
    """
    logits, embedding = package.golden
    limit = backend.info.max_batch_size
    # Each image depends on how many there are, so all are made before some are left out.
    images = golden_images(package.manifest.input.size, len(logits))[:limit]
    logits, embedding = logits[:limit], embedding[:limit]
    try:
        together = backend.run(images)
        singles = [backend.run(images[i : i + 1]) for i in range(len(images))]
    except Exception as error:  # each library has errors of its own
        raise PackageError(
            f"{package.path} cannot be run on {backend.info.runtime}: {first_line(error)}"
        ) from error
    found_shapes = together.logits.shape, together.embedding.shape
    if found_shapes != (logits.shape, embedding.shape):
        raise PackageError(
            f"{package.path} answers with shapes {found_shapes}, its golden outputs have "
            f"{(logits.shape, embedding.shape)}; export it again"
        )
    alone = Rows(
        np.concatenate([rows.logits for rows in singles]),
        np.concatenate([rows.embedding for rows in singles]),
    )
    # numpy's max, not Python's, which loses a NaN that comes second.
    difference = float(np.max([np.abs(rows.logits - logits) for rows in (together, alone)]))
    apart = [np.linalg.norm(rows.embedding - embedding, axis=1) for rows in (together, alone)]
    allowed_logit, allowed_embedding = start_tolerances(backend.info.precision, logits)
    for what, found, allowed in (
        ("logits differ", difference, allowed_logit),
        (
            "embeddings differ, relative to their length,",
            float(np.max(apart / np.linalg.norm(embedding, axis=1).clip(1e-30))),
            allowed_embedding,
        ),
    ):
        if not found <= allowed:  # also true for NaN
            raise PackageError(
                f"{backend.info.runtime} does not reproduce the golden outputs of {package.path}: "
                f"{what} by {found:.2g}, {allowed:.2g} is allowed; run `metaserve verify` on it "
                "and export it again"
            )
    return GoldenCheck(difference, float(np.abs(together.logits - alone.logits).max()))


def start_tolerances(precision: Precision, logits: NDArray[np.float32]) -> tuple[float, float]:
    """Return how far a backend may be from the golden outputs.

    Args:
        precision: that the backend computes in.
        logits: the golden ones, (N, C).

    Returns:
        The largest difference of a logit, and of an embedding relative to its length.
    """
    tolerance, factor = TOLERANCES[precision], ELSEWHERE[precision]
    return factor * tolerance.allowed(logits), factor * tolerance.embedding


def warm_up(
    backend: Backend, max_batch_size: int, clock: Callable[[], float] = time.perf_counter
) -> ServiceTimes:
    """Run and time batches of 1, 2, 4 ... `max_batch_size` images, while larger ones still gain.

    Returns:
        The durations; the best of several runs each, after one that is not counted.
    """
    times: dict[int, float] = {}
    best, without_gain = float("inf"), 0
    image = golden_images(backend.info.input_size, 1)
    for size in bucket_sizes(max_batch_size):
        times[size] = _fastest(backend, image.repeat(size, 0), clock)
        gains = times[size] / size <= best * (1 - USEFUL_GAIN)
        without_gain = 0 if gains else without_gain + 1
        if without_gain == 2:
            break
        best = min(best, times[size] / size)
    return ServiceTimes(times)


def run_once(backend: Backend, sizes: Iterable[int]) -> None:
    """Run a batch of each size, so that none is the first of its kind when callers wait."""
    image = golden_images(backend.info.input_size, 1)
    for size in sizes:
        backend.run(image.repeat(size, 0))


def _fastest(backend: Backend, batch: Batch, clock: Callable[[], float]) -> float:
    """Time a batch `MIN_RUNS` to `MAX_RUNS` times and return the best."""
    backend.run(batch)
    durations: list[float] = []
    while len(durations) < MIN_RUNS or not _is_settled(durations):
        started_at = clock()
        backend.run(batch)
        durations.append(clock() - started_at)
    return min(durations)


def _is_settled(durations: list[float]) -> bool:
    """Tell whether the best of several runs is one that was left alone."""
    total, (best, second, *_) = sum(durations), sorted(durations)
    is_confirmed = second <= best * (1 + USEFUL_GAIN) or total >= MAX_SECONDS
    return (total >= MIN_SECONDS and is_confirmed) or len(durations) >= MAX_RUNS
