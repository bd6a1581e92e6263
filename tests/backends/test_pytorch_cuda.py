"""CUDA's calls in their order: streams, graphs and copies, by a double that notes them."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.backends import tensorrt_runtime as protocol
from app.backends.pytorch_cuda import WARM_UP_RUNS, CudaDevice, EngineCuda


class Cuda:
    """A double of torch.cuda that notes streams, captures and replays in the order they come."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self._streams: list[str] = []
        cuda = self

        class Stream:
            cuda_stream = 7001

            def __init__(self, name: str) -> None:
                self.name = name

            def synchronize(self) -> None:
                cuda.calls.append(f"synchronize {self.name}")

            def wait_stream(self, other: str) -> None:
                cuda.calls.append(f"{self.name} waits for {other}")

        class CUDAGraph:
            def replay(self) -> None:
                cuda.note("replay")

        self.Stream, self.CUDAGraph = Stream, CUDAGraph

    def note(self, what: str) -> None:
        self.calls.append(f"{what} on {self._streams[-1] if self._streams else 'no stream'}")

    def init(self) -> None:
        self.calls.append("init")

    def set_device(self, index: int) -> None:
        self.calls.append(f"device {index}")

    def zeros(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: str = "cpu",
        pin_memory: bool = False,
    ) -> Tensor:
        self.note("pinned zeros" if pin_memory else f"zeros of {device}")
        return torch.full(shape, 0, dtype=dtype)

    def default_stream(self, device: str) -> str:
        return "the default stream"

    def graph_pool_handle(self) -> str:
        return "pool"

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self._streams.append(stream.name)
        yield
        self._streams.pop()

    @contextmanager
    def graph(
        self, graph: object, pool: str, stream: Any, capture_error_mode: str
    ) -> Iterator[None]:
        self.calls.append(f"capture into {pool}, {capture_error_mode}")
        with self.stream(stream):
            yield
        self.calls.append("captured")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    double = Cuda()
    for name in (
        *("Stream", "CUDAGraph", "default_stream", "graph_pool_handle", "stream", "graph"),
        *("init", "set_device"),
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(double, name))
    monkeypatch.setattr(torch, "zeros", double.zeros)
    return double


def test_work_is_warmed_then_captured_on_one_stream_and_replayed(cuda: Cuda) -> None:
    device = CudaDevice(graphs=True)
    queue = device.prepare(lambda: cuda.note("work"))
    assert cuda.calls == [
        "cuda:0 waits for the default stream",
        *["work on cuda:0"] * WARM_UP_RUNS,
        "synchronize cuda:0",
        "capture into pool, thread_local",
        "work on cuda:0",
        "captured",
    ]
    cuda.calls.clear()
    queue()
    device.finish()
    assert cuda.calls == ["replay on cuda:0", "synchronize cuda:0"]


def test_without_graphs_the_work_itself_is_queued(cuda: Cuda) -> None:
    queue = CudaDevice(graphs=False).prepare(lambda: cuda.note("work"))
    cuda.calls.clear()
    queue()
    assert cuda.calls == ["work on cuda:0"]


def test_copies_are_queued_on_the_stream_and_do_not_wait(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Target:
        def copy_(self, source: object, non_blocking: bool) -> None:
            cuda.note(f"copy {source}, {'queued' if non_blocking else 'awaited'}")

    target: Any = Target()
    source: Any = "pixels"
    CudaDevice(graphs=True).copy(target, source)
    assert cuda.calls == ["copy pixels, queued on cuda:0"]


def test_buffers_are_cleared_on_the_stream_that_uses_them(cuda: Cuda) -> None:
    device = CudaDevice(graphs=True)
    device.buffer((2,), torch.uint8)
    device.host_buffer((2,), torch.uint8)
    assert cuda.calls == ["zeros of cuda:0 on cuda:0", "pinned zeros on no stream"]


def test_an_engine_gets_the_same_stream_capture_and_wait(cuda: Cuda) -> None:
    ours: protocol.Cuda = EngineCuda()
    assert cuda.calls == ["init", "device 0"], "a CPU build of torch is told in words first"
    assert (ours.device, ours.stream) == ("cuda:0", 7001)
    cuda.calls.clear()
    replay = ours.capture(lambda: cuda.note("work"))
    replay()
    ours.synchronize()
    assert cuda.calls == [
        *("capture into pool, thread_local", "work on cuda:0", "captured"),
        *("replay on cuda:0", "synchronize cuda:0"),
    ]


def test_an_engines_buffer_is_read_and_written_at_its_address(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        cuda.note("copy queued" if non_blocking else "copy awaited")
        return real_copy(target, source)

    real_copy = Tensor.copy_
    buffer: protocol.Buffer = EngineCuda().buffer((2, 3), np.float32)
    monkeypatch.setattr(Tensor, "copy_", copy)
    cuda.calls.clear()
    memory = (ctypes.c_char * 24).from_address(buffer.address)
    device = np.frombuffer(memoryview(memory), np.float32)
    buffer.host[:] = [[1, 2, 3], [4, 5, 6]]
    assert not device.any(), "nothing is there before it is uploaded"
    buffer.upload()
    assert device.tolist() == [1, 2, 3, 4, 5, 6]
    device[:] = 7
    buffer.download()
    assert (buffer.host == 7).all()
    assert cuda.calls == ["copy queued on cuda:0"] * 2


def test_an_engines_scratch_memory_is_the_devices_and_is_let_go_after_a_wait(cuda: Cuda) -> None:
    ours = EngineCuda()
    cuda.calls.clear()
    address = ours.scratch(16)
    ctypes.memset(address, 1, 16)
    (held,) = ours._scratch
    assert (held.data_ptr(), int(held.sum())) == (address, 16)
    kept = weakref.ref(held)
    del held
    ours.close()
    assert kept() is None
    assert cuda.calls == ["zeros of cuda:0 on cuda:0", "synchronize cuda:0"]
