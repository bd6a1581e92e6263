"""What the machine can do without HTTP: decoding alone, the graph alone, both at once."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np

from app.backends.fake import FakeBackend
from app.images.read import read_image
from app.types import Batch, Pixels, Rows
from benchmarks.serving_loads import Load
from models.onnx_runtime import import_onnxruntime

BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Best:
    """How the graph alone is fastest: intra-operator threads, and images in a batch."""

    threads: int
    batch: int


class Limits:
    """Measures one load; sessions are kept between rounds."""

    def __init__(self, load: Load, cpus: int) -> None:
        self._load = load
        self._cpus = cpus
        self._pixels = self._decode(load.modes[0])
        counts = sorted({1, cpus})
        self._sessions = {threads: self._session(threads) for threads in counts}

    def decode_rate(self, mode: str, threads: int, seconds: float) -> float:
        """Return images per second of decoding and preparing alone."""
        return _rate(lambda: self._decode(mode), threads, seconds)

    def decode_ms(self, mode: str) -> float:
        """Return the median of one image on an idle machine."""
        return _median_ms(lambda: self._decode(mode), 30, 3.0)

    def run_ms(self) -> float:
        """Return the median of one image on all threads."""
        return _median_ms(lambda: self._run(self._cpus, 1), 30, 5.0)

    def buckets(self, seconds: float) -> dict[str, float]:
        """Return images per second of plain `session.run`, by threads and batch."""
        return {
            f"{threads} threads, batch {batch}": batch
            * _rate(partial(self._run, threads, batch), 1, seconds)
            for threads in self._sessions
            for batch in BATCHES
        }

    def best(self, buckets: dict[str, float]) -> Best:
        """Return the fastest of them."""
        words = max(buckets, key=buckets.__getitem__).split()
        return Best(int(words[0]), int(words[3]))

    def run_rate(self, best: Best, seconds: float) -> float:
        """Return images per second of the graph alone, at its best."""
        return best.batch * _rate(lambda: self._run(best.threads, best.batch), 1, seconds)

    def pipelined_rate(self, mode: str, best: Best, seconds: float) -> float:
        """Return images per second of both: threads decode the next batch while one runs."""
        with ThreadPoolExecutor(self._cpus) as pool:

            def decode_batch() -> list[Any]:
                return [pool.submit(self._decode, mode) for _ in range(best.batch)]

            coming = decode_batch()
            done, started_at = 0, time.perf_counter()
            while (spent := time.perf_counter() - started_at) < seconds:
                batch = np.stack([future.result() for future in coming])
                coming = decode_batch()
                self._sessions[best.threads].run(None, {"images": batch})
                done += best.batch
            for future in coming:
                future.cancel()
        return done / spent

    def _session(self, threads: int) -> Any:
        if self._load.backend == "fake":
            return _Averages(self._load)
        ort = import_onnxruntime()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        path = str(self._load.package.model_path)
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def _decode(self, mode: str) -> Pixels:
        return read_image(
            self._load.image,
            self._load.package.manifest.input,
            max_pixels=64_000_000,
            exif_orientation=True,
            decode=cast(Literal["exact", "scaled"], mode),
        )

    def _run(self, threads: int, batch: int) -> None:
        images = np.broadcast_to(self._pixels, (batch, *self._pixels.shape))
        self._sessions[threads].run(None, {"images": np.ascontiguousarray(images)})


class _Averages:
    """Runs the fake backend as a session would be run."""

    def __init__(self, load: Load) -> None:
        manifest = load.package.manifest
        self._backend = FakeBackend(manifest.input.size, manifest.classes, manifest.embedding_dim)

    def run(self, _: None, feeds: dict[str, Batch]) -> Rows:
        return self._backend.run(feeds["images"])


def _rate(work: Callable[[], object], threads: int, seconds: float) -> float:
    """Return calls per second of some threads together, after one call of each."""
    done = itertools.count()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: work(), range(threads)))
        started_at = time.perf_counter()

        def repeat(_: int) -> None:
            while time.perf_counter() - started_at < seconds:
                work()
                next(done)

        list(pool.map(repeat, range(threads)))
        return next(done) / (time.perf_counter() - started_at)


def _median_ms(work: Callable[[], object], times: int, seconds: float) -> float:
    work()
    durations: list[float] = []
    until = time.perf_counter() + seconds
    while len(durations) < times and time.perf_counter() < until:
        started_at = time.perf_counter()
        work()
        durations.append(1000 * (time.perf_counter() - started_at))
    return float(np.median(durations))
