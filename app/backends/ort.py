"""ONNX Runtime: the package's graph on the CPU, CUDA or TensorRT execution provider."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Literal

from app.backends.base import BackendInfo, threads_in_words
from app.backends.ort_device import BoundBuckets
from app.backends.ort_session import CPU, CUDA, TENSORRT, SessionPlan, open_session
from app.errors import StartupError
from app.types import Batch, Rows
from models.buckets import bucket_sizes
from models.gpu import NoGpuError, find_gpu
from models.onnx_runtime import import_onnxruntime
from models.package import MODEL, Package

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]

_PROVIDERS = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}


class OnnxRuntimeBackend:
    """One session over the package's `model.onnx`.

    On the CPU a batch is one run of the session, as large as it is. On a GPU it is padded to the
    next of the sizes 1, 2, 4 ... `max_batch_size`, each with buffers of its own on the device.

    Args:
        package: the model.
        provider: what runs the graph; `auto` takes CUDA where the library and a GPU are there.
        threads: that one run may use on the CPU.
        max_batch_size: images a batch may hold on a GPU.
        cuda_graphs: whether the CUDA provider captures a CUDA graph for each size.
        cache_dir: where the TensorRT provider keeps its engines; in the user's cache when None.

    Raises:
        StartupError: the library or the provider asked for is missing or does not start, or
            cannot run the package's precision.
    """

    def __init__(
        self,
        package: Package,
        provider: Provider,
        threads: int,
        max_batch_size: int = 32,
        *,
        cuda_graphs: bool = True,
        cache_dir: Path | None = None,
    ) -> None:
        _refuse_two_distributions()
        try:
            ort = import_onnxruntime()
        except ModuleNotFoundError as error:
            raise StartupError(
                "the onnxruntime backend needs the package onnxruntime; "
                "install metaserve[cpu] or metaserve[gpu]"
            ) from error
        chosen = _choose(provider, ort.get_available_providers())
        manifest, size = package.manifest, package.manifest.input.size
        if manifest.precision == "bf16" and chosen == CPU:
            raise StartupError(
                f"{package.path} is a bf16 package, which onnxruntime does not run on a CPU; "
                "export it with --precision fp32, or set METASERVE_BACKEND=torch"
            )
        plan = SessionPlan(
            package.model_path,
            chosen,
            threads,
            size,
            bucket_sizes(max_batch_size),
            exact_float32=manifest.precision == "fp32",
            cuda_graphs=cuda_graphs and chosen == CUDA,
            cache_dir=cache_dir,
            graph_hash=manifest.files[MODEL],
        )
        session, plan = open_session(ort, plan)
        widths = manifest.classes, manifest.embedding_dim
        self._session: Any = session
        self._bound: BoundBuckets | None = None
        path = threads_in_words(threads)
        if chosen != CPU:
            graphs = plan.cuda_graphs
            self._bound = BoundBuckets(
                ort, session, "cuda", plan.sizes, size, widths, graphs=graphs
            )
            path = "CUDA graphs" if graphs else "no CUDA graphs"
        self.info = BackendInfo(
            name="onnxruntime",
            device="cpu" if chosen == CPU else "cuda:0",
            precision=manifest.precision,
            runtime=f"onnxruntime {ort.__version__} {chosen}, {path}",
            input_size=size,
            classes=manifest.classes,
            embedding_dim=manifest.embedding_dim,
            max_batch_size=None if chosen == CPU else max_batch_size,
            threads=threads if chosen == CPU else None,
            prepared_sizes=None if chosen == CPU else plan.sizes,
        )

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        """Run the graph once."""
        if self._bound is not None:
            return self._bound.run(batch)
        logits, embedding = self._session.run(["logits", "embedding"], {"images": batch})
        return Rows(logits, embedding)

    def close(self) -> None:
        """Drop the session and its buffers."""
        if self._bound is not None:
            self._bound.close()
        self._bound = self._session = None


def _choose(provider: Provider, available: list[str]) -> str:
    """Return the execution provider's name, or refuse in one sentence."""
    if provider == "auto":
        provider = "cuda" if _PROVIDERS["cuda"] in available and _has_gpu() else "cpu"
    chosen = _PROVIDERS[provider]
    if chosen not in available:
        raise StartupError(
            f"this onnxruntime has no {chosen}, it has {', '.join(available)}; "
            "install metaserve[gpu] in place of metaserve[cpu], or set METASERVE_DEVICE=cpu "
            "and METASERVE_ORT_PROVIDER=auto"
        )
    return chosen


def _has_gpu() -> bool:
    try:
        find_gpu()
    except NoGpuError:
        return False
    return True


def _refuse_two_distributions() -> None:
    """Refuse to run where both builds are installed: they share files, and CUDA is lost."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            distribution(name)
        except PackageNotFoundError:
            continue
        found.append(name)
    if len(found) == 2:
        raise StartupError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other; "
            "uninstall both, then install one"
        )
