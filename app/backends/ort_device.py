"""ONNX Runtime on a device: buffers at fixed addresses, bound for each batch size."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from app.backends.buckets import bucket_for, pad_batch
from app.types import Batch, Rows


@dataclass(frozen=True)
class _Bound:
    """A batch size: its buffers on the device, and how a session runs on them."""

    images: Any
    logits: Any
    embedding: Any
    binding: Any
    options: Any


class BoundBuckets:
    """Runs a session in batches of prepared sizes, on buffers that never move.

    All runs happen in one thread of its own: a session with CUDA graphs may be run by one thread
    only, and the engine's threads are others than the one that loads and warms the model.

    A size is prepared when it is first run; a CUDA graph is captured then, under the size as its
    id. The copies from and to the host are the library's own, from memory that is not pinned: its
    Python interface allocates no other.

    Args:
        ort: the library.
        session: to be run by nobody else.
        device: `cuda`, or `cpu` in tests.
        sizes: of the batches that are prepared.
        input_size: S.
        widths: classes and embedding dim.
        graphs: whether the session captures CUDA graphs.
    """

    def __init__(
        self,
        ort: ModuleType,
        session: Any,
        device: str,
        sizes: tuple[int, ...],
        input_size: int,
        widths: tuple[int, int],
        *,
        graphs: bool,
    ) -> None:
        self._ort = ort
        self._session = session
        self._device = device
        self._sizes = sizes
        self._input_size = input_size
        self._widths = widths
        self._graphs = graphs
        self._bound: dict[int, _Bound] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="onnxruntime")

    def run(self, batch: Batch) -> Rows:
        """Pad a batch to the next size, run it, return its own rows."""
        size = bucket_for(len(batch), self._sizes)
        return self._thread.submit(self._run, batch, size).result()

    def replay(self, size: int, times: int) -> None:
        """Run the graph alone, on what the buffers hold, and wait: for measurements."""
        self._thread.submit(self._replay, size, times).result()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()

    def _replay(self, size: int, times: int) -> _Bound:
        if size not in self._bound:
            self._bound[size] = self._bind(size)
        bound = self._bound[size]
        for _ in range(times):
            self._session.run_with_iobinding(bound.binding, bound.options)
        bound.binding.synchronize_outputs()
        return bound

    def _run(self, batch: Batch, size: int) -> Rows:
        self._replay(size, 0).images.update_inplace(pad_batch(batch, size))
        bound = self._replay(size, 1)
        # On the CPU `numpy()` is a view of the buffer that the next run writes to.
        logits, embedding = (
            value.numpy()[: len(batch)].copy() for value in (bound.logits, bound.embedding)
        )
        return Rows(logits, embedding)

    def _bind(self, size: int) -> _Bound:
        side, (classes, dim) = self._input_size, self._widths
        images = self._buffer((size, side, side, 3), np.uint8)
        logits = self._buffer((size, classes), np.float32)
        embedding = self._buffer((size, dim), np.float32)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("images", images)
        binding.bind_ortvalue_output("logits", logits)
        binding.bind_ortvalue_output("embedding", embedding)
        options = self._ort.RunOptions()
        if self._graphs:
            options.add_run_config_entry("gpu_graph_id", str(size))
        return _Bound(images, logits, embedding, binding, options)

    def _buffer(self, shape: tuple[int, ...], dtype: type[np.generic]) -> Any:
        return self._ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, self._device, 0)
