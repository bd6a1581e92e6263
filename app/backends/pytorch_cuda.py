"""A CUDA stream as the `Device` of prepared batches, with a CUDA graph for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The first run of a shape compiles and tunes, the second may still allocate; PyTorch's notes on
# CUDA graphs warm up with three.
WARM_UP_RUNS = 3


class CudaDevice:
    """The first GPU, through one stream.

    Args:
        graphs: whether prepared work is captured in a CUDA graph and replayed.
    """

    name = "cuda:0"

    def __init__(self, *, graphs: bool) -> None:
        self._graphs = graphs
        self._stream = torch.cuda.Stream(self.name)  # type: ignore[no-untyped-call]
        # One pool for all graphs: they never run at the same time, and nothing that one leaves in
        # it is read after its run, since outputs are copied to buffers outside.
        self._pool = torch.cuda.graph_pool_handle() if graphs else None

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return pinned memory; copies from and to it do not hold up the caller."""
        return torch.zeros(shape, dtype=dtype, pin_memory=True)

    def buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return memory of the GPU."""
        return torch.zeros(shape, dtype=dtype, device=self.name)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy on the stream."""
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def prepare(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run it until it neither compiles nor allocates, then capture it."""
        # Weights and buffers were written on the default stream.
        self._stream.wait_stream(torch.cuda.default_stream(self.name))
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP_RUNS):
                work()
        self._stream.synchronize()
        if not self._graphs:
            return lambda: self._on_stream(work)
        graph = torch.cuda.CUDAGraph()
        # Captured on the stream that was warmed, whose workspaces exist already. Other threads
        # may use the GPU meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        return lambda: self._on_stream(graph.replay)

    def finish(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def _on_stream(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()
