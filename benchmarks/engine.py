"""What the engine itself costs: `LocalEngine.infer` round trips, without HTTP and decoding.

    python -m benchmarks.engine

Closed loops of 1 and 32 callers on the fake backend and on the embedded model: images a second,
CPU seconds per 1000 images, and the mean batch. `busy` lets each caller keep the event loop for
0.1 ms between two images, as decoding in place does.
"""

from __future__ import annotations

import asyncio
import time

import numpy as np

from app.assemble import open_core
from app.engine.local import LocalEngine
from app.settings import load_settings
from models.package import find_package, open_package

SECONDS = 2.0
BUSY_SECONDS = 0.0001


class Counted:
    """Counts batches and their images."""

    def __init__(self) -> None:
        self.batches = self.images = 0

    def batch_done(self, size: int) -> None:
        """Count a batch."""
        self.batches += 1
        self.images += size

    def batch_failed(self) -> None:
        """Stop: a figure with failures in it is none."""
        raise RuntimeError("the backend failed on a batch")


def measure(backend: str, callers: int, *, busy: bool) -> str:
    """Return one row of the table."""
    settings = load_settings({"backend": backend})
    package, counted = open_package(find_package("caformer_digits")), Counted()
    warm = open_core(settings, package, counted)
    engine, side = LocalEngine(warm.core), package.manifest.input.size
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)

    async def call(until: float) -> None:
        while (now := time.monotonic()) < until:
            await engine.infer(pixels, deadline=now + 30)
            started = time.monotonic()
            while busy and time.monotonic() < started + BUSY_SECONDS:
                pass

    async def load(seconds: float) -> None:
        until = time.monotonic() + seconds
        await asyncio.gather(*(call(until) for _ in range(callers)))

    async def both() -> tuple[float, float]:
        await load(SECONDS / 4)
        counted.batches = counted.images = 0
        cpu, wall = time.process_time(), time.monotonic()
        await load(SECONDS)
        return time.process_time() - cpu, time.monotonic() - wall

    cpu, wall = asyncio.run(both())
    warm.core.close()
    images = counted.images
    return (
        f"| {backend} | {callers} | {'busy' if busy else ''} | {images / wall:.0f} | "
        f"{cpu / images * 1e3:.3f} | {images / counted.batches:.1f} |"
    )


def main() -> None:
    """Print the table."""
    print("| backend | callers | loop | images/s | CPU s per 1000 | mean batch |")
    print("| --- | ---: | --- | ---: | ---: | ---: |")
    for backend in ("fake", "onnxruntime"):
        for callers in (1, 32):
            for busy in (False, True):
                print(measure(backend, callers, busy=busy), flush=True)


if __name__ == "__main__":
    main()
