"""A serialised engine -> one ready call per batch size, over a small view of CUDA.

    images.host -> upload -> [ CUDA graph: the engine at this batch size ] -> download -> rows.host

Every batch size has a context of its own, as a captured graph goes stale when its context changes
shape; they share their working memory, since one runs at a time, on one stream. Two graphs of one
engine at once would need memory twice, and NVIDIA reports illegal accesses with them
(NVIDIA/TensorRT issue 4061).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from app.errors import StartupError
from models.tensorrt import error_log, first_error

INPUT, LOGITS, EMBEDDING = "images", "logits", "embedding"
_TYPES = {INPUT: "UINT8", LOGITS: "FLOAT", EMBEDDING: "FLOAT"}
# A replayed graph runs the kernels that were captured, on the same input; the margin is for
# kernels that add in the order in which they finish.
_SAME = 1e-2


class Buffer(Protocol):
    """Device memory with a host twin that the device reads and writes directly.

    Attributes:
        host: the twin.
        address: of the device memory.
    """

    host: NDArray[Any]
    address: int

    def upload(self) -> None:
        """Copy host to device, in the stream's order, without waiting."""
        ...

    def download(self) -> None:
        """Copy device to host, likewise."""
        ...


class Cuda(Protocol):
    """What an engine needs of a GPU; everything runs on one stream.

    Attributes:
        device: its name in torch's words.
        stream: handle of the stream.
    """

    device: str
    stream: int

    def buffer(self, shape: tuple[int, ...], dtype: DTypeLike) -> Buffer:
        """Return memory of both kinds; it lives as long as the buffer."""
        ...

    def scratch(self, size_bytes: int) -> int:
        """Return the address of device memory that lives as long as this object."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` puts on the stream as a CUDA graph; return what replays it."""
        ...

    def synchronize(self) -> None:
        """Wait for all that is on the stream."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@dataclass(frozen=True)
class PreparedBatch:
    """The engine at one batch size N.

    Attributes:
        images: uint8 (N, S, S, 3).
        logits: float32 (N, C).
        embedding: float32 (N, D).
        execute: puts one run on the stream.
    """

    images: Buffer
    logits: Buffer
    embedding: Buffer
    execute: Callable[[], None]

    def run(self, cuda: Cuda) -> None:
        """Answer `images.host` in the hosts of the outputs; blocks."""
        self.images.upload()
        self.execute()
        self.logits.download()
        self.embedding.download()
        cuda.synchronize()


class LoadedPlan:
    """An engine on the device.

    Args:
        trt: the library that built it.
        cuda: the device.
        plan: the serialised engine.
        input_size: S that its input must have.
        classes: C of its logits.
        embedding_dim: D of its embeddings.

    Raises:
        StartupError: the engine cannot be loaded here, or is not of this network.
    """

    def __init__(
        self,
        trt: Any,
        cuda: Cuda,
        plan: bytes,
        *,
        input_size: int,
        classes: int,
        embedding_dim: int,
    ) -> None:
        self._trt, self._cuda = trt, cuda
        self._log = error_log(trt)
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._failed("load the engine")
        self._rows = {
            INPUT: (input_size, input_size, 3),
            LOGITS: (classes,),
            EMBEDDING: (embedding_dim,),
        }
        self._check_ends()
        self._memory_bytes = self._engine.device_memory_size_v2
        self._memory = cuda.scratch(max(self._memory_bytes, 1))
        self._contexts: list[Any] = []

    @property
    def max_batch_size(self) -> int:
        """The largest batch of the profile it was built with."""
        largest: int = self._engine.get_tensor_profile_shape(INPUT, 0)[2][0]
        return largest

    def prepare(self, sizes: Sequence[int]) -> dict[int, PreparedBatch]:
        """Run the engine once at each batch size and capture it.

        Raises:
            StartupError: it does not run, or cannot be captured.
        """
        return {size: self._prepare(size) for size in sizes}

    def close(self) -> None:
        """Free the engine; contexts go before it, and it before its runtime."""
        self._contexts.clear()
        self._engine = None
        self._runtime = None

    def _prepare(self, size: int) -> PreparedBatch:
        buffers = {
            name: self._cuda.buffer((size, *row), np.uint8 if name == INPUT else np.float32)
            for name, row in self._rows.items()
        }
        context = self._context(size, buffers)

        def execute() -> None:
            if not context.execute_async_v3(self._cuda.stream):
                raise self._failed(f"run the engine on {size} images")

        ends = buffers[INPUT], buffers[LOGITS], buffers[EMBEDDING]
        direct = PreparedBatch(*ends, execute)
        buffers[INPUT].host[:] = 128
        direct.run(self._cuda)  # outside a capture, as the first run may allocate
        expected = [buffer.host.copy() for buffer in ends[1:]]
        if hasattr(context, "is_stream_capturable") and not context.is_stream_capturable(
            self._cuda.stream
        ):
            raise self._failed(f"capture a run on {size} images in a CUDA graph")
        captured = PreparedBatch(*ends, self._cuda.capture(execute))
        self._check_replay(captured, expected, size)
        return captured

    def _context(self, size: int, buffers: dict[str, Buffer]) -> Any:
        """Return an execution context at one batch size, with all its addresses."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise self._failed("make an execution context")
        self._contexts.append(context)
        context.set_device_memory(self._memory, self._memory_bytes)
        if not context.set_input_shape(INPUT, (size, *self._rows[INPUT])):
            raise self._failed(f"take {size} images")
        for name, buffer in buffers.items():
            if not context.set_tensor_address(name, buffer.address):
                raise self._failed(f"take the address of {name}")
            if tuple(context.get_tensor_shape(name)) != buffer.host.shape:
                raise self._failed(f"answer {size} images with {name} of {buffer.host.shape}")
        return context

    def _check_replay(
        self, captured: PreparedBatch, expected: list[NDArray[Any]], size: int
    ) -> None:
        """Refuse a graph that captured nothing, which raises nowhere and answers with old rows."""
        outputs = captured.logits, captured.embedding
        for output in outputs:
            output.host.fill(np.nan)
            output.upload()
        captured.run(self._cuda)
        for output, rows in zip(outputs, expected, strict=True):
            allowed = _SAME * max(1.0, float(np.abs(rows).max()))
            if not np.abs(output.host - rows).max() <= allowed:  # also true for NaN
                raise self._failed(f"repeat a run on {size} images from its CUDA graph")

    def _check_ends(self) -> None:
        """Compare the engine's inputs and outputs with the network's."""
        engine = self._engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = {
            name: (engine.get_tensor_dtype(name).name, tuple(engine.get_tensor_shape(name)))
            for name in names
        }
        wanted = {name: (_TYPES[name], (-1, *row)) for name, row in self._rows.items()}
        if found != wanted:
            raise StartupError(
                f"the package's engine has {found}, the package's network {wanted}; "
                "build the engine again"
            )

    def _failed(self, what: str) -> StartupError:
        return StartupError(
            f"{self._trt.__name__} {self._trt.__version__} cannot {what}: "
            f"{first_error(self._log)}; build the engine again on this machine"
        )
