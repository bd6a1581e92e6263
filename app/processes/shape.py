"""Which processes a service is made of, and what part of the machine each gets.

own       METASERVE_WORKERS=1: one process. More: a supervisor over HTTP processes, each with
          an engine and its share of the CPUs.
shared    a supervisor over HTTP processes that decode, and one engine process that they feed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from app.cpu import cpu_limit
from app.settings import Settings
from models.gpu import Gpu, NoGpuError, find_gpu


@dataclass(frozen=True)
class Shape:
    """The processes of a service.

    Attributes:
        workers: HTTP processes.
        shares_engine: whether they feed one engine process.
        worker_threads: CPU threads of each.
        engine_threads: CPU threads of the engine process.
    """

    workers: int
    shares_engine: bool
    worker_threads: int
    engine_threads: int

    @property
    def is_one_process(self) -> bool:
        """Whether there is nothing to supervise."""
        return self.workers == 1 and not self.shares_engine


def choose_shape(settings: Settings, find: Callable[[], Gpu] = find_gpu) -> Shape:
    """Return the processes that the settings ask for on this machine."""
    threads = settings.threads or cpu_limit()
    share = max(threads // settings.workers, 1)
    shares_engine = settings.engine == "shared" or (
        settings.engine == "auto" and settings.workers > 1 and _uses_device(settings, find)
    )
    return Shape(settings.workers, shares_engine, share, threads)


def _uses_device(settings: Settings, find: Callable[[], Gpu]) -> bool:
    match settings.backend:
        case "fake":
            return False
        case "triton" | "tensorrt":
            return True
        case "onnxruntime":
            on_cpu = "cpu" in (settings.ort_provider, settings.device)
            return not on_cpu and _installed("onnxruntime-gpu") is not None and _finds(find)
        case "torch":
            has_cuda = not (_installed("torch") or "+cpu").endswith("+cpu")
            return settings.device != "cpu" and has_cuda and _finds(find)


def _installed(distribution: str) -> str | None:
    """Return a library's version without loading it."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _finds(find: Callable[[], Gpu]) -> bool:
    try:
        find()
    except NoGpuError:
        return False
    return True
