"""An engine in batches of prepared sizes, each with a CUDA graph and buffers of its own."""

from __future__ import annotations

import threading

import numpy as np

from app.backends.buckets import bucket_for, pad_batch
from app.backends.tensorrt_runtime import Cuda, LoadedPlan
from app.types import Batch, Rows


class PlanBuckets:
    """Runs an engine in batches of prepared sizes; a lock keeps runs apart.

    Args:
        plan: the engine; closed with this.
        cuda: the device that it was loaded on; closed with this.
        sizes: of the batches that are prepared, now.

    Raises:
        StartupError: the engine does not run, or cannot be captured.
    """

    def __init__(self, plan: LoadedPlan, cuda: Cuda, sizes: tuple[int, ...]) -> None:
        self._plan, self._cuda, self._sizes = plan, cuda, sizes
        self._lock = threading.Lock()
        self._prepared = plan.prepare(sizes)

    def run(self, batch: Batch) -> Rows:
        """Replay the graph of the next larger batch size; its other rows are dropped."""
        size = bucket_for(len(batch), self._sizes)
        padded, count = pad_batch(batch, size), len(batch)
        with self._lock:  # the buffers are one batch's at a time
            prepared = self._prepared[size]
            np.copyto(prepared.images.host, padded)
            prepared.run(self._cuda)
            return Rows(prepared.logits.host[:count].copy(), prepared.embedding.host[:count].copy())

    def replay(self, size: int, times: int) -> None:
        """Run the engine alone, on what the buffers hold, and wait: for measurements."""
        with self._lock:
            for _ in range(times):
                self._prepared[size].execute()
            self._cuda.synchronize()

    def close(self) -> None:
        """Free graphs and buffers, then the engine, then the device's memory."""
        self._prepared.clear()
        self._plan.close()
        self._cuda.close()
