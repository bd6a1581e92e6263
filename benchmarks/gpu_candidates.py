"""Every way to run a network here, each opened behind the same small interface."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from app.backends.base import threads_in_words
from app.errors import StartupError, first_line
from app.types import Batch, Rows
from benchmarks.gpu_models import Subject
from models.tolerances import Precision

Sizes = tuple[int, ...]
Replay = Callable[[int, int], None]
"""Runs a size so many times on the device alone, and waits."""


@dataclass(frozen=True)
class Opened:
    """A runner that is ready.

    Attributes:
        words: library, version and path in use.
        run: answers a batch of host memory with rows of host memory.
        replay: where the work on the device can be run without the copies.
        close: frees what it holds.
    """

    words: str
    run: Callable[[Batch], Rows]
    replay: Replay | None
    close: Callable[[], None] = lambda: None


class Missing(Exception):
    """A candidate that does not run here; the message says why."""


@dataclass(frozen=True)
class Candidate:
    """A backend in one precision.

    Attributes:
        name: of the backend and its path.
        precision: of the weights.
        open: prepares batch sizes, rising; raises Missing where it cannot.
        largest: the largest batch worth its time.
        one_by_one: whether sizes are opened one at a time, as each takes a minute to compile.
    """

    name: str
    precision: Precision
    open: Callable[[Subject, Sizes, Path], Opened]
    largest: int | None = None
    one_by_one: bool = False


def candidates(device: Literal["cpu", "cuda"], threads: int, mode: str | None) -> list[Candidate]:
    """Return what is worth running on a device, the quick ones first.

    Args:
        device: `cuda` runs the CPU too, to compare with, in small batches.
        threads: on the CPU.
        mode: of torch.compile; the backend's own when None.
    """
    largest = None if device == "cpu" else 8
    found = [
        Candidate("torch cpu eager", "fp32", _torch("cpu", "fp32", False, threads, mode), largest),
        Candidate("onnxruntime cpu", "fp32", _onnxruntime("cpu", "fp32", threads), largest),
    ]
    on_gpu: tuple[Precision, ...] = ("fp32", "fp16")
    found += [
        Candidate(f"onnxruntime {provider}", precision, _onnxruntime(provider, precision, threads))
        for provider in ("cuda", "tensorrt")
        for precision in on_gpu
    ]
    found.append(Candidate("tensorrt", "fp16", _tensorrt("fp16")))
    eager: tuple[Precision, ...] = ("fp32", "bf16")
    found += [
        Candidate("torch cuda eager", precision, _torch("cuda", precision, False, threads, mode))
        for precision in eager
    ]
    compiled: tuple[Precision, ...] = ("bf16", "fp16")
    found += [
        Candidate(
            "torch cuda compiled",
            precision,
            _torch("cuda", precision, True, threads, mode),
            one_by_one=True,
        )
        for precision in compiled
    ]
    return found


def _torch(
    device: Literal["cpu", "cuda"],
    precision: Precision,
    compiled: bool,
    threads: int,
    mode: str | None,
) -> Callable[[Subject, Sizes, Path], Opened]:
    def open_torch(subject: Subject, sizes: Sizes, folder: Path) -> Opened:
        import torch

        from app.backends.pytorch_buckets import TorchBuckets
        from app.backends.pytorch_compile import what_keeps_from_compiling
        from app.backends.pytorch_paths import TorchPath, open_path

        if device == "cuda" and not torch.cuda.is_available():
            raise Missing("torch sees no GPU")
        missing = what_keeps_from_compiling(device) if compiled else None
        if missing:
            raise Missing(missing)
        torch.set_num_threads(threads)
        path = TorchPath(device, precision, compiled, cuda_graphs=True)
        try:
            network = open_path(
                subject.served(), path, sizes, subject.input_size, subject.widths, mode
            )
        except StartupError as error:
            raise Missing(str(error)) from error
        replay = network.replay if isinstance(network, TorchBuckets) else None
        words = f"torch {torch.__version__} {path.words(threads)}"
        # What was compiled holds on to the network and its memory.
        return Opened(words, network.run, replay, torch._dynamo.reset)

    return open_torch


def _onnxruntime(
    provider: str, precision: Precision, threads: int
) -> Callable[[Subject, Sizes, Path], Opened]:
    def open_onnxruntime(subject: Subject, sizes: Sizes, folder: Path) -> Opened:
        from app.backends.ort_device import BoundBuckets
        from app.backends.ort_session import CPU, CUDA, TENSORRT, SessionPlan, open_session
        from models.onnx_runtime import import_onnxruntime

        try:
            ort = import_onnxruntime()
        except ImportError as error:
            raise Missing("onnxruntime is not installed") from error
        chosen = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}[provider]
        available = ort.get_available_providers()
        if chosen not in available:
            raise Missing(f"onnxruntime {ort.__version__} has no {chosen}")
        graph = _graph(subject, precision, folder)
        plan = SessionPlan(
            graph,
            chosen,
            threads,
            subject.input_size,
            sizes,
            exact_float32=precision == "fp32",
            cuda_graphs=chosen == CUDA,
            graph_hash=hashlib.sha256(graph.read_bytes()).hexdigest(),
            cache_dir=folder,
        )
        try:
            session, plan = open_session(ort, plan)
        except StartupError as error:
            raise Missing(str(error)) from error
        words = f"onnxruntime {ort.__version__} {chosen}"
        if chosen == CPU:

            def run(batch: Batch) -> Rows:
                logits, embedding = session.run(["logits", "embedding"], {"images": batch})
                return Rows(logits, embedding)

            return Opened(f"{words}, {threads_in_words(threads)}", run, None)
        bound = BoundBuckets(
            ort,
            session,
            "cuda",
            sizes,
            subject.input_size,
            subject.widths,
            graphs=plan.cuda_graphs,
        )
        words += ", CUDA graphs" if plan.cuda_graphs else ", no CUDA graphs"
        return Opened(words, bound.run, bound.replay, bound.close)

    return open_onnxruntime


def _tensorrt(precision: Precision) -> Callable[[Subject, Sizes, Path], Opened]:
    def open_tensorrt(subject: Subject, sizes: Sizes, folder: Path) -> Opened:
        import torch

        if not torch.cuda.is_available():  # a runtime without a driver ends the process
            raise Missing("torch, which holds TensorRT's buffers, sees no GPU")
        try:
            import tensorrt as trt
        except (ImportError, OSError) as error:
            raise Missing(f"tensorrt is not installed ({first_line(error)})") from error
        return _open_plan(trt, subject, precision, sizes, folder)

    return open_tensorrt


def _open_plan(
    trt: Any, subject: Subject, precision: Precision, sizes: Sizes, folder: Path
) -> Opened:
    from app.backends.pytorch_cuda import EngineCuda
    from app.backends.tensorrt_buckets import PlanBuckets
    from app.backends.tensorrt_runtime import LoadedPlan
    from export.tensorrt import Profile, build_plan

    side, (classes, dim) = subject.input_size, subject.widths
    profile = Profile(max_batch_size=sizes[-1], opt_batch_size=sizes[-1])
    graph = _graph(subject, precision, folder)
    plan = build_plan(graph, trt=trt, input_size=side, profile=profile, precision=precision)
    cuda = EngineCuda()
    loaded = LoadedPlan(trt, cuda, plan, input_size=side, classes=classes, embedding_dim=dim)
    buckets = PlanBuckets(loaded, cuda, sizes)
    words = f"tensorrt {trt.__version__}, CUDA graphs"
    return Opened(words, buckets.run, buckets.replay, buckets.close)


def _graph(subject: Subject, precision: Precision, folder: Path) -> Path:
    try:
        return subject.export(precision, folder)
    except ImportError as error:
        raise Missing(f"no graph can be exported: {first_line(error)}") from error


def in_order(sizes: Sequence[int], one_by_one: bool) -> list[Sizes]:
    """Return the sizes as they are to be opened.

    All at once; or one by one, largest, smallest, second largest ..., so that the ends are there
    when time runs out.
    """
    rising = tuple(sorted(sizes))
    if not one_by_one:
        return [rising]
    ends = [rising[-1 - n // 2] if n % 2 == 0 else rising[n // 2] for n in range(len(rising))]
    return [(size,) for size in ends]
