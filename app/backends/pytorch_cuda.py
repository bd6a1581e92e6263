"""One CUDA stream of torch's: as the `Device` of prepared batches and as the `Cuda` of engines.

The current stream belongs to the thread in torch, and batches come from several: each call names
the stream itself.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import DTypeLike
from torch import Tensor

# The first run of a shape compiles and tunes, the second may still allocate; PyTorch's notes on
# CUDA graphs warm up with three.
WARM_UP_RUNS = 3

_DTYPES = {np.dtype(np.uint8): torch.uint8, np.dtype(np.float32): torch.float32}


class CudaDevice:
    """The first GPU, through one stream; see `Device`.

    Args:
        graphs: whether prepared work is captured in a CUDA graph and replayed.
    """

    name = "cuda:0"

    def __init__(self, *, graphs: bool = True) -> None:
        self._graphs = graphs
        self._stream = torch.cuda.Stream(self.name)  # type: ignore[no-untyped-call]
        self.stream: int = self._stream.cuda_stream
        # One pool for all graphs: they never run at the same time, and nothing that one leaves in
        # it is read after its run, since outputs are copied to buffers outside.
        self._pool = torch.cuda.graph_pool_handle() if graphs else None

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return pinned memory; copies from and to it do not hold up the caller."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory of the GPU, cleared on the stream that will use it."""
        with torch.cuda.stream(self._stream):
            return torch.zeros(shape, dtype=dtype, device=self.name)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy on the stream."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def prepare(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run it until it neither compiles nor allocates, then capture it."""
        # Weights were written on the default stream.
        self._stream.wait_stream(torch.cuda.default_stream(self.name))
        for _ in range(WARM_UP_RUNS):
            self._on_stream(work)
        self._stream.synchronize()
        return self.capture(work) if self._graphs else lambda: self._on_stream(work)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what work puts on the stream as a CUDA graph; return what replays it."""
        graph = torch.cuda.CUDAGraph()
        # Captured on the stream that was warmed, whose workspaces exist already. Other threads
        # may use the GPU meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        return lambda: self._on_stream(graph.replay)

    def finish(self) -> None:
        """Wait for the stream; other threads of Python run meanwhile."""
        self._stream.synchronize()

    def _on_stream(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()


class EngineBuffer:
    """A device tensor and a page-locked one; see `Buffer`."""

    def __init__(self, device: CudaDevice, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        kind = _DTYPES[np.dtype(dtype)]
        self._cuda = device
        self._host, self._device = device.host_buffer(shape, kind), device.buffer(shape, kind)
        self.host = self._host.numpy()
        self.address = self._device.data_ptr()

    def upload(self) -> None:
        """Copy host to device, without waiting."""
        self._cuda.copy(self._device, self._host)

    def download(self) -> None:
        """Copy device to host, without waiting."""
        self._cuda.copy(self._host, self._device)


class EngineCuda:
    """The first GPU as a library beside torch uses it, by addresses; see `Cuda`."""

    device = CudaDevice.name

    def __init__(self) -> None:
        # Says in words what `set_device` stumbles over in a CPU build.
        torch.cuda.init()  # type: ignore[no-untyped-call]
        # The libraries beside torch work on the device that is current when they are called.
        torch.cuda.set_device(0)
        self._cuda = CudaDevice()
        self.stream = self._cuda.stream
        self.capture, self.synchronize = self._cuda.capture, self._cuda.finish
        self._scratch: list[Tensor] = []

    def buffer(self, shape: tuple[int, ...], dtype: DTypeLike) -> EngineBuffer:
        """Return memory on the device and its page-locked twin."""
        return EngineBuffer(self._cuda, shape, dtype)

    def scratch(self, size_bytes: int) -> int:
        """Return the address of device memory, aligned to 512 bytes as torch aligns it."""
        self._scratch.append(self._cuda.buffer((size_bytes,), torch.uint8))
        return self._scratch[-1].data_ptr()

    def close(self) -> None:
        """Drop the scratch memory; buffers go with those who hold them."""
        self.synchronize()
        self._scratch.clear()
