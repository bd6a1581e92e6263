"""ONNX file -> TensorRT engine: one profile over all batch sizes, strongly typed.

Which library builds is passed in: `tensorrt`, or `tensorrt_rtx`, which needs no GPU for it.
"""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.staging import write_whole
from export.tensorrt_network import INPUT, PlanError, parse_network, precision_of
from models.tensorrt import error_log, first_error

Share = Callable[[float], None]
"""Told how much of the build is done, 0..1, from threads of the library."""


@dataclass(frozen=True)
class BuildOptions:
    """What may change an engine of the same graph.

    Attributes:
        tf32: round the factors of float32 products to 10 bits of mantissa: faster, and not within
            the tolerance that fp32 packages keep.
        optimization_level: 0 to 5, how long to search for fast kernels; 3 is the library's own.
        workspace_bytes: device memory that kernels may use for themselves; all of it when None.
    """

    tf32: bool = False
    optimization_level: int = 3
    workspace_bytes: int | None = None

    def as_dict(self) -> dict[str, bool | int]:
        """Return what was chosen, for the manifest."""
        stated = {"tf32": self.tf32, "optimization_level": self.optimization_level}
        workspace = self.workspace_bytes
        return stated | ({} if workspace is None else {"workspace_bytes": workspace})


@dataclass(frozen=True)
class Profile:
    """The batch sizes an engine takes and the one it is tuned for."""

    max_batch_size: int
    opt_batch_size: int
    min_batch_size: int = 1


def build_plan(
    path: Path,
    *,
    trt: Any,
    input_size: int,
    profile: Profile,
    precision: str,
    options: BuildOptions | None = None,
    timing_cache: Path | None = None,
    share: Share = lambda done: None,
) -> bytes:
    """Build an engine and return it serialised.

    Args:
        path: the ONNX file.
        trt: the library, `tensorrt` or `tensorrt_rtx`.
        input_size: S of the graph's input.
        profile: the batch sizes.
        precision: what the caller will call the engine; the graph must be of it.
        options: for the builder.
        timing_cache: a file of kernel timings; read where it is there, written afterwards.
        share: told of progress; what it raises ends the build and comes out here.

    Raises:
        PlanError: the graph is not the served one, is misread, is of another precision, or the
            builder fails.
    """
    log = error_log(trt)
    builder = trt.Builder(log)
    network = parse_network(trt, builder, log, path, input_size)
    # A strongly typed engine computes in the graph's types, so they can be told before a build of
    # minutes. There is no flag that would make a float32 graph an fp16 engine.
    found = precision_of(network)
    if found != precision:
        raise PlanError(
            f"{path} computes in {found}, so an engine of it is not {precision}; "
            f"export the package with --precision {precision} first"
        )
    config = _configure(trt, builder, options or BuildOptions())
    _add_profile(builder, config, log, input_size, profile)
    monitor = _monitor(trt, share)
    config.progress_monitor = monitor
    with _timings(config, timing_cache), _interrupts_to(monitor):
        serialised = builder.build_serialized_network(network, config)
    if monitor.failure is not None:
        raise monitor.failure
    if serialised is None:
        raise PlanError(f"{trt.__name__} cannot build an engine of {path}: {first_error(log)}")
    share(1.0)
    return bytes(serialised)


def _configure(trt: Any, builder: Any, options: BuildOptions) -> Any:
    if not 0 <= options.optimization_level <= 5:  # the library clamps it and says nothing
        raise PlanError(f"optimization level {options.optimization_level} is not within 0 to 5")
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    flags = trt.BuilderFlag
    if not options.tf32:
        config.clear_flag(flags.TF32)  # on by default
    if hasattr(flags, "REQUIRE_USER_ALLOCATION"):
        # `tensorrt_rtx` wants it for engines that are captured in a CUDA graph.
        config.set_flag(flags.REQUIRE_USER_ALLOCATION)
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    return config


def _add_profile(builder: Any, config: Any, log: Any, input_size: int, profile: Profile) -> None:
    sizes = profile.min_batch_size, profile.opt_batch_size, profile.max_batch_size
    ranges = builder.create_optimization_profile()
    ranges.set_shape(INPUT, *((size, input_size, input_size, 3) for size in sizes))
    if config.add_optimization_profile(ranges) < 0:
        raise PlanError(
            f"batches of {sizes[0]} to {sizes[2]} images, tuned for {sizes[1]}, are no profile: "
            f"{first_error(log)}"
        )


@contextmanager
def _timings(config: Any, path: Path | None) -> Iterator[None]:
    """Let a build use the timings of earlier ones, and keep them with its own for the next."""
    if path is None:
        yield
        return
    with warnings.catch_warnings():
        # `tensorrt_rtx` takes the calls, does nothing in them and says that they are deprecated.
        warnings.simplefilter("ignore", DeprecationWarning)
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        # False: timings of another GPU or version are not taken.
        config.set_timing_cache(cache, False)
        yield
        write_whole(path, bytes(cache.serialize()))


@contextmanager
def _interrupts_to(monitor: Any) -> Iterator[None]:
    """Have Ctrl-C and what ends a process end a build through its monitor.

    Raised in a callback, of which there are thousands, it would go through frames of C++ that let
    no exception pass, and end the process with a core dump.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: object) -> None:
        is_ctrl_c = number == signal.SIGINT
        monitor.failure = KeyboardInterrupt() if is_ctrl_c else SystemExit(128 + number)

    numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
    previous = {
        number: signal.signal(number, interrupt)
        for number in numbers
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _monitor(trt: Any, share: Share) -> Any:
    """Return a progress monitor of the library that adds its nested phases up to one share."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # a class of the module passed in
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.failure: BaseException | None = None
            self._phases = Phases()
            self._lock = threading.Lock()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._phases.start(name, parent, steps)

        def phase_finish(self, name: str) -> None:
            with self._lock:
                self._phases.finish(name)

        def step_complete(self, name: str, step: int) -> bool:
            try:
                with self._lock:
                    self._phases.step(name, step)
                    share(self._phases.share)
            except BaseException as error:  # see `_interrupts_to`
                self.failure = error
            return self.failure is None

    return Monitor()


class Phases:
    """Nested phases, each with a number of steps -> one share that never falls.

    Attributes:
        share: of the whole, 0..1.
    """

    def __init__(self) -> None:
        self.share = 0.0
        # name -> where it begins in the whole, how much of the whole one step is, steps done
        self._open: dict[str, tuple[float, float, int]] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase within the current step of its parent; the first one is the whole."""
        begin, width = 0.0, 1.0
        if parent in self._open:
            outer, width, done = self._open[parent]
            begin = outer + width * done
        self._open[name] = begin, width / max(steps, 1), 0

    def step(self, name: str, step: int) -> None:
        """Count a step as done; steps count from 0."""
        if name in self._open:
            begin, width, _ = self._open[name]
            self._open[name] = begin, width, step + 1
            self.share = max(self.share, min(begin + width * (step + 1), 1.0))

    def finish(self, name: str) -> None:
        """End a phase."""
        self._open.pop(name, None)
