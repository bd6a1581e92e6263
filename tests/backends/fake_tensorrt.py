"""A TensorRT library and a GPU without either; they refuse, wait and lie as the real ones do.

What counts: nothing raises, calls return False or None and log a line. The stream runs when it is
waited for and not before. A capture records and runs nothing. Kernels read and write the addresses
that the context was told, whatever is there by then.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from app.backends.fake import FakeBackend
from app.backends.tensorrt import TensorRTBackend
from models.package import MODEL, PLAN, Package, PlanSpec
from models.tensorrt import operating_system

VERSION = "11.4.0.1"
STREAM = 7001


@dataclass
class Faults:
    """What goes wrong, and when.

    Attributes:
        shapes_refused: batch sizes that `set_input_shape` refuses.
        addresses_refused: tensors whose address is refused.
        runs_refused: batch sizes that `execute_async_v3` refuses.
        no_context: whether contexts cannot be made.
        uncapturable: whether a context says that it cannot be captured.
        empty_graph: whether a capture records nothing.
    """

    shapes_refused: set[int] = field(default_factory=set)
    addresses_refused: set[str] = field(default_factory=set)
    runs_refused: set[int] = field(default_factory=set)
    no_context: bool = False
    uncapturable: bool = False
    empty_graph: bool = False


class FakeCuda:
    """One stream over numpy arrays; see `app.backends.tensorrt_runtime.Cuda`."""

    device = "cuda:0"
    stream = STREAM

    def __init__(self, faults: Faults | None = None) -> None:
        self.faults = faults or Faults()
        self.replays: list[int] = []
        self.closed = False
        self._queue: list[Callable[[], None]] = []
        self._recording: list[Callable[[], None]] | None = None
        self._memory: list[NDArray[Any]] = []

    @property
    def is_idle(self) -> bool:
        return not self._queue

    def enqueue(self, work: Callable[[], None]) -> None:
        (self._queue if self._recording is None else self._recording).append(work)

    def buffer(self, shape: tuple[int, ...], dtype: DTypeLike) -> FakeBuffer:
        assert self._recording is None, "memory was asked for in a capture"
        return FakeBuffer(self, shape, dtype)

    def scratch(self, size_bytes: int) -> int:
        self._memory.append(np.zeros(size_bytes, np.uint8))
        return self._memory[-1].ctypes.data

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph: list[Callable[[], None]] = []
        self._recording = graph
        try:
            work()
        finally:
            self._recording = None
        if self.faults.empty_graph:
            graph.clear()

        def replay() -> None:
            self.replays.append(len(graph))
            for step in graph:
                self.enqueue(step)

        return replay

    def synchronize(self) -> None:
        assert self._recording is None, "a capture was waited for"
        work, self._queue = self._queue, []
        for step in work:
            step()

    def close(self) -> None:
        self.closed = True


class FakeBuffer:
    """Two arrays; what is copied between them is there once the stream was waited for."""

    def __init__(self, cuda: FakeCuda, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.host: NDArray[Any] = np.zeros(shape, dtype)
        self._device = np.zeros(shape, dtype)
        self._cuda = cuda
        self.address = self._device.ctypes.data

    def upload(self) -> None:
        self._cuda.enqueue(lambda: np.copyto(self._device, self.host))

    def download(self) -> None:
        self._cuda.enqueue(lambda: np.copyto(self.host, self._device))


class Severity(Enum):
    ERROR = 1
    VERBOSE = 4


class Named(Enum):
    UINT8 = 0
    FLOAT = 1
    HALF = 2


class ExecutionContextAllocationStrategy(Enum):
    USER_MANAGED = 2


class Logger:
    """The library's own, made to be derived from: whoever forgets `log` is told."""

    def log(self, severity: Severity, message: str) -> None:
        raise NotImplementedError


class FakeTensorRT:
    """The library; its engines are JSON texts and answer as `FakeBackend` does."""

    __name__ = "tensorrt"
    ILogger = Logger
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy

    def __init__(self, cuda: FakeCuda, version: str = VERSION) -> None:
        self.__version__ = version
        self.cuda = cuda
        self.log: Callable[[str], None] = lambda message: None

    def Runtime(self, logger: Logger) -> FakeRuntime:
        logger.log(Severity.VERBOSE, "a line that nobody wants to read")
        self.log = lambda message: logger.log(Severity.ERROR, message)
        return FakeRuntime(self)


class FakeRuntime:
    def __init__(self, trt: FakeTensorRT) -> None:
        self._trt = trt

    def deserialize_cuda_engine(self, plan: bytes) -> FakeEngine | None:
        try:
            described = json.loads(plan)
        except ValueError:
            self._trt.log("the magic tag does not match\nand more lines follow")
            return None
        return FakeEngine(self._trt, described)


class FakeEngine:
    """Tensors by name: their type and shape, -1 for the batch."""

    device_memory_size_v2 = 4096

    def __init__(self, trt: FakeTensorRT, described: dict[str, Any]) -> None:
        self.trt = trt
        self.max_batch_size: int = described["max_batch_size"]
        self.tensors: dict[str, tuple[str, list[int]]] = described["tensors"]
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Named:
        return Named[self.tensors[name][0]]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name][1])

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        assert profile == 0
        row = self.get_tensor_shape(name)[1:]
        return [(size, *row) for size in (1, self.max_batch_size, self.max_batch_size)]

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> FakeContext | None:
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if self.trt.cuda.faults.no_context:
            self.trt.log("out of memory")
            return None
        return FakeContext(self)


class FakeContext:
    """One shape and one address a tensor at a time, read when a run is put on the stream."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine, self._faults = engine, engine.trt.cuda.faults
        self._size: int | None = None
        self._memory_bytes = 0
        self._addresses: dict[str, int] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory
        self._memory_bytes = size

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        fits = list(shape[1:]) == self._engine.tensors[name][1][1:]
        in_profile = 1 <= shape[0] <= self._engine.max_batch_size
        if not fits or not in_profile or shape[0] in self._faults.shapes_refused:
            self._engine.trt.log(f"{shape} is outside the profile")
            return False
        self._size = shape[0]
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.tensors or name in self._faults.addresses_refused:
            self._engine.trt.log(f"{name} is no tensor of this engine")
            return False
        self._addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        row = self._engine.get_tensor_shape(name)[1:]
        return (-1 if self._size is None else self._size, *row)

    def is_stream_capturable(self, stream: int) -> bool:
        assert stream == STREAM
        return not self._faults.uncapturable

    def execute_async_v3(self, stream: int) -> bool:
        size = self._size
        is_ready = set(self._addresses) == set(self._engine.tensors) and stream == STREAM
        has_memory = self._memory_bytes >= self._engine.device_memory_size_v2
        if size is None or not (is_ready and has_memory) or size in self._faults.runs_refused:
            self._engine.trt.log("the run was refused")
            return False
        arrays = [self._array(name, size) for name in ("images", "logits", "embedding")]
        self._engine.trt.cuda.enqueue(lambda: compute(*arrays))
        return True

    def _array(self, name: str, size: int) -> NDArray[Any]:
        """Return the memory at a tensor's address, as the kernel will see it."""
        kind, (_, *row) = self._engine.tensors[name]
        dtype = np.dtype(np.uint8 if kind == "UINT8" else np.float32)
        size_bytes = size * int(np.prod(row)) * dtype.itemsize
        memory = (ctypes.c_char * size_bytes).from_address(self._addresses[name])
        return np.ndarray((size, *row), dtype, buffer=memoryview(memory))


def compute(images: NDArray[Any], logits: NDArray[Any], embedding: NDArray[Any]) -> None:
    """Answer a batch as `FakeBackend` does: an image's rows are functions of its mean."""
    rows = FakeBackend(images.shape[1], logits.shape[1], embedding.shape[1]).run(images)
    logits[:], embedding[:] = rows.logits, rows.embedding


def fake_plan(package: Package, max_batch_size: int = 8, **changes: Any) -> bytes:
    """Return an engine of a package's shapes; changes are tensors that differ."""
    manifest = package.manifest
    size = manifest.input.size
    tensors = {
        "images": ("UINT8", [-1, size, size, 3]),
        "logits": ("FLOAT", [-1, manifest.classes]),
        "embedding": ("FLOAT", [-1, manifest.embedding_dim]),
    }
    described = {"max_batch_size": max_batch_size, "tensors": tensors | changes}
    return json.dumps(described).encode()


def with_plan(package: Package, folder: Path, plan: bytes | None = None, **changes: Any) -> Package:
    """Return the package with an engine in a folder of its own; changes are of its PlanSpec."""
    stated: dict[str, Any] = {
        "module": "tensorrt",
        "version": VERSION,
        "compute_capability": "9.0",
        "operating_system": operating_system(),
        "min_batch_size": 1,
        "opt_batch_size": 8,
        "max_batch_size": 8,
        "precision": package.manifest.precision,
        "onnx_sha256": package.manifest.files[MODEL],
    }
    (folder / PLAN).write_bytes(fake_plan(package) if plan is None else plan)
    files = package.manifest.files | {PLAN: "0" * 64}
    described = {"plan": PlanSpec(**(stated | changes)), "files": files}
    return Package(folder, package.manifest.model_copy(update=described))


def open_fake_tensorrt(
    package: Package,
    max_batch_size: int = 8,
    *,
    plan: bytes | None = None,
    cuda: FakeCuda | None = None,
) -> TensorRTBackend:
    """Return the real backend over the fake library and the fake GPU."""
    cuda = cuda or FakeCuda()
    with tempfile.TemporaryDirectory() as folder:
        planned = with_plan(package, Path(folder), plan)
        return TensorRTBackend(planned, max_batch_size, FakeTensorRT(cuda), cuda)
