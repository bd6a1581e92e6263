"""torch in batches of prepared sizes, on buffers that never move.

    batch -> staging -> pixels -> network -> logits, embedding -> answers -> rows
             pinned     device    device     device               pinned     the caller's own
             |------------------ one queue of work on the device -----------|

What queues and waits is behind `Device`: CUDA streams and graphs in `pytorch_cuda`, plain calls on
the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from app.backends.buckets import bucket_for
from app.types import Batch, Rows

Forward = Callable[[Tensor], tuple[Tensor, Tensor]]
"""uint8 (N, S, S, 3) -> float32 logits (N, C) and embedding (N, D)."""


class Device(Protocol):
    """Where buffers live and work is queued, to be done in the order it came."""

    name: str

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory of the host that the device copies from and to."""
        ...

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory of the device."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy between host and device."""
        ...

    def prepare(self, work: Callable[[], None]) -> Callable[[], None]:
        """Warm work on buffers up; return what queues it again, as often as wanted."""
        ...

    def finish(self) -> None:
        """Wait until everything that was queued is done."""
        ...


class HostDevice:
    """The CPU: queued is done."""

    name = "cpu"

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return plain memory."""
        return torch.zeros(shape, dtype=dtype)

    buffer = host_buffer

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy."""
        target.copy_(source)

    def prepare(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run it once, which compiles it."""
        work()
        return work

    def finish(self) -> None:
        """Nothing is queued."""


class TorchBuckets:
    """Runs a network in batches of prepared sizes; a lock keeps runs apart.

    A size is prepared when it is first run. Smaller sizes use the front of the largest one's
    buffers.

    Args:
        forward: the network, compiled or not; called with one shape for each size.
        device: what it runs on.
        sizes: of the batches that are prepared.
        input_size: S.
        widths: classes and embedding dim.
    """

    def __init__(
        self,
        forward: Forward,
        device: Device,
        sizes: tuple[int, ...],
        input_size: int,
        widths: tuple[int, int],
    ) -> None:
        self._forward = forward
        self._device = device
        self._sizes = sizes
        largest = max(sizes)
        shape = (largest, input_size, input_size, 3)
        self._staging = device.host_buffer(shape, torch.uint8)
        self._pixels = device.buffer(shape, torch.uint8)
        self._outputs = [device.buffer((largest, width), torch.float32) for width in widths]
        self._answers = [device.host_buffer((largest, width), torch.float32) for width in widths]
        self._queue: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()

    def prepare(self, size: int) -> None:
        """Compile, warm up and capture one of the sizes, unless it is ready."""
        with self._lock, torch.inference_mode():
            self._prepare(size)

    def run(self, batch: Batch) -> Rows:
        """Pad a batch to the next size, run it, return its own rows."""
        count, size = len(batch), bucket_for(len(batch), self._sizes)
        with self._lock, torch.inference_mode():
            staging = self._staging.numpy()
            staging[:count] = batch
            staging[count:size] = batch[-1]  # not what another batch left there
            queue = self._prepare(size)
            self._device.copy(self._pixels[:size], self._staging[:size])
            queue()
            for answer, output in zip(self._answers, self._outputs, strict=True):
                self._device.copy(answer[:count], output[:count])
            self._device.finish()
            logits, embedding = (answer[:count].numpy().copy() for answer in self._answers)
        return Rows(logits, embedding)

    def replay(self, size: int, times: int) -> None:
        """Run the network alone, on what the buffers hold, and wait: for measurements."""
        with self._lock, torch.inference_mode():
            queue = self._prepare(size)
            for _ in range(times):
                queue()
            self._device.finish()

    def _prepare(self, size: int) -> Callable[[], None]:
        if size not in self._queue:
            pixels = self._pixels[:size]
            logits, embedding = (output[:size] for output in self._outputs)

            def work() -> None:
                found = self._forward(pixels)
                logits.copy_(found[0])
                embedding.copy_(found[1])

            self._queue[size] = self._device.prepare(work)
        return self._queue[size]
