"""TensorRT: the engine in the package's `model.plan`, on the GPU it was built for."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal

from app.backends.base import BackendInfo
from app.backends.tensorrt_buckets import PlanBuckets
from app.backends.tensorrt_runtime import Cuda, LoadedPlan
from app.errors import StartupError, first_line
from app.types import Batch, Rows
from models.buckets import bucket_sizes
from models.gpu import Gpu, NoGpuError, find_gpu
from models.package import MODEL, Package, PackageError, PlanSpec
from models.tensorrt import import_tensorrt, operating_system

BUILD_AGAIN = "build it again here: metaserve export with --format tensorrt"


class TensorRTBackend:
    """An engine with a CUDA graph for every batch size it rounds up to.

    Args:
        package: the model; its manifest describes the engine.
        max_batch_size: images a batch may hold at most; the engine may allow fewer.
        trt: the library that built the engine.
        cuda: the device.

    Raises:
        StartupError: the engine does not run here.
        PackageError: the package holds none.
    """

    def __init__(self, package: Package, max_batch_size: int, trt: Any, cuda: Cuda) -> None:
        manifest = package.manifest
        plan = LoadedPlan(
            trt,
            cuda,
            package.plan_path.read_bytes(),
            input_size=manifest.input.size,
            classes=manifest.classes,
            embedding_dim=manifest.embedding_dim,
        )
        sizes = bucket_sizes(min(max_batch_size, plan.max_batch_size))
        self._buckets = PlanBuckets(plan, cuda, sizes)
        self.info = BackendInfo(
            name="tensorrt",
            device=cuda.device,
            precision=manifest.precision,
            runtime=f"{trt.__name__} {trt.__version__}, CUDA graphs for batches of "
            + ", ".join(map(str, sizes)),
            input_size=manifest.input.size,
            classes=manifest.classes,
            embedding_dim=manifest.embedding_dim,
            max_batch_size=sizes[-1],
            prepared_sizes=sizes,
        )

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        """Run the engine once."""
        return self._buckets.run(batch)

    def close(self) -> None:
        """Drop the engine and its buffers."""
        self._buckets.close()


def open_tensorrt(
    package: Package, max_batch_size: int, device: Literal["auto", "cpu", "cuda"]
) -> TensorRTBackend:
    """Start the backend where its engine fits, and refuse in one sentence elsewhere.

    No TensorRT library is touched before a GPU has answered: without a driver loading an engine
    kills the process.

    Raises:
        StartupError: no GPU, another one, a library that is missing or another version.
        PackageError: the package holds no engine, or one of another graph.
    """
    if device == "cpu":
        raise StartupError(
            "METASERVE_BACKEND=tensorrt runs on a GPU and METASERVE_DEVICE=cpu contradicts it; "
            "set one of them"
        )
    try:
        gpu = find_gpu()
    except NoGpuError as error:
        raise StartupError(
            f"the tensorrt backend needs an NVIDIA GPU, and {error}; start the container with "
            "--gpus all, or set METASERVE_BACKEND=onnxruntime"
        ) from error
    plan = _fitting_plan(package, gpu)
    trt = _import_library(plan)
    try:
        from app.backends.pytorch_cuda import EngineCuda

        cuda = EngineCuda()
    except ImportError as error:
        raise StartupError(
            "the tensorrt backend keeps its buffers in torch; install metaserve[tensorrt]"
        ) from error
    except (AssertionError, RuntimeError) as error:  # torch raises both where it cannot use CUDA
        raise StartupError(
            f"torch cannot use the GPU {gpu.name}: {first_line(error)}; "
            "install a CUDA build of torch that fits the driver"
        ) from error
    return TensorRTBackend(package, max_batch_size, trt, cuda)


def _fitting_plan(package: Package, gpu: Gpu) -> PlanSpec:
    """Return what the package's engine was built with, if it is for this machine and graph."""
    plan = package.manifest.plan
    _ = package.plan_path  # a package without one is refused in its own words
    if plan is None:
        raise PackageError(f"the manifest of {package.path} does not describe its engine")
    if plan.onnx_sha256 != package.manifest.files.get(MODEL, plan.onnx_sha256):
        raise PackageError(
            f"the engine of {package.path} was built from another {MODEL} than it holds; "
            f"{BUILD_AGAIN}"
        )
    if plan.operating_system != operating_system():
        raise StartupError(
            f"the engine of {package.path} was built on {plan.operating_system} and this is "
            f"{operating_system()}; {BUILD_AGAIN}"
        )
    if plan.compute_capability not in (None, gpu.compute_capability):
        raise StartupError(
            f"the engine of {package.path} is for GPUs of compute capability "
            f"{plan.compute_capability} and {gpu.name} has {gpu.compute_capability}; {BUILD_AGAIN}"
        )
    return plan


def _import_library(plan: PlanSpec) -> ModuleType:
    try:
        trt = import_tensorrt(plan.module)
    except ImportError as error:
        raise StartupError(f"the tensorrt backend cannot start: {error}") from error
    if trt.__version__ != plan.version:
        raise StartupError(
            f"the engine was built by {plan.module} {plan.version} and {trt.__version__} is "
            f"installed; install that version, or {BUILD_AGAIN}"
        )
    return trt
