"""torch's memory, stream and graphs as the GPU of an engine; the thin real half of `Cuda`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike

_DTYPES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float32): torch.float32}


class TorchBuffer:
    """A device tensor and a page-locked one; see `Buffer`."""

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, stream: torch.cuda.Stream) -> None:
        kind = _DTYPES[np.dtype(dtype)]
        self._stream = stream
        self._host = torch.zeros(shape, dtype=kind, pin_memory=True)
        self._device = torch.zeros(shape, dtype=kind, device=stream.device)
        self.host = self._host.numpy()
        self.address = self._device.data_ptr()

    def upload(self) -> None:
        """Copy host to device, without waiting."""
        with torch.cuda.stream(self._stream):
            self._device.copy_(self._host, non_blocking=True)

    def download(self) -> None:
        """Copy device to host, without waiting."""
        with torch.cuda.stream(self._stream):
            self._host.copy_(self._device, non_blocking=True)


class TorchCuda:
    """The first GPU, one stream; see `Cuda`.

    The current stream belongs to the thread in torch, and batches come from several: each call
    names the stream itself.
    """

    def __init__(self) -> None:
        # Says in words what `set_device` stumbles over in a CPU build.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        # The libraries beside torch work on the device that is current when they are called.
        torch.cuda.set_device(0)
        self.device = "cuda:0"
        self._stream = torch.cuda.Stream(device=0)  # type: ignore[no-untyped-call]
        self.stream: int = self._stream.cuda_stream
        self._scratch: list[torch.Tensor] = []

    def buffer(self, shape: tuple[int, ...], dtype: DTypeLike) -> TorchBuffer:
        """Return memory on the device and its page-locked twin."""
        created = TorchBuffer(shape, dtype, self._stream)
        torch.cuda.synchronize()  # it was cleared on another stream
        return created

    def scratch(self, size_bytes: int) -> int:
        """Return the address of device memory, aligned to 512 bytes as torch aligns it."""
        self._scratch.append(torch.empty(size_bytes, dtype=torch.uint8, device="cuda:0"))
        return self._scratch[-1].data_ptr()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work` as a CUDA graph and return what replays it."""
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            work()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay

    def synchronize(self) -> None:
        """Wait for the stream; other threads of Python run meanwhile."""
        self._stream.synchronize()

    def close(self) -> None:
        """Drop the scratch memory; buffers go with those who hold them."""
        self._stream.synchronize()
        self._scratch.clear()
