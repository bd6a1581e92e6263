"""Opens a session of ONNX Runtime on one execution provider, or says in one sentence why not."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from app.errors import StartupError, first_line
from models.cache import user_cache

log = logging.getLogger("metaserve.backends")

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"


@dataclass(frozen=True)
class SessionPlan:
    """What to open, and how.

    Attributes:
        path: the ONNX file.
        provider: the execution provider's name.
        threads: that one run may use on the CPU.
        input_size: S of the images.
        sizes: of the batches that will be run on a GPU, rising.
        exact_float32: the graph computes in float32 and nothing may be rounded to TF32.
        cuda_graphs: capture a CUDA graph for each size; the CUDA provider only.
        graph_hash: SHA-256 of the file.
        cache_dir: where the TensorRT provider keeps its engines and timings; in the user's
            cache when None.
    """

    path: Path
    provider: str
    threads: int
    input_size: int
    sizes: tuple[int, ...]
    exact_float32: bool
    cuda_graphs: bool
    graph_hash: str
    cache_dir: Path | None = None


def open_session(ort: ModuleType, plan: SessionPlan) -> tuple[Any, SessionPlan]:
    """Open a session that runs where the plan says and nowhere else.

    Returns:
        The session, and the plan that it kept: without CUDA graphs where onnxruntime refuses to
        capture this model.

    Raises:
        StartupError: the provider does not start, or took no part of the graph.
    """
    if plan.provider != CPU:
        ort.preload_dlls()
    if plan.provider == TENSORRT and plan.exact_float32:
        # The provider has no option for it; TensorRT reads this when it builds.
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    try:
        session = _open(ort, plan)
    except StartupError:
        raise
    except Exception as error:  # the library raises bare RuntimeErrors of its own making
        if plan.cuda_graphs and "graph capture" in str(error):
            log.warning("onnxruntime captures no CUDA graphs here: %s", first_line(error))
            return open_session(ort, replace(plan, cuda_graphs=False))
        raise StartupError(_explain(error, ort, plan)) from error
    running = session.get_providers()[0]
    if running != plan.provider:
        raise StartupError(
            f"onnxruntime fell back to {running} where {plan.provider} was asked for; "
            "check the driver and the CUDA libraries, or set METASERVE_DEVICE=cpu"
        )
    return session, plan


def _open(ort: ModuleType, plan: SessionPlan) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = plan.threads
    # Within a run threads spin for their next piece of work: caformer_s18 on two threads takes
    # 26 ms instead of 30. Between runs they must not: that is the time that decodes images.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    if plan.provider == CPU:
        return ort.InferenceSession(str(plan.path), options, providers=[CPU])
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # Without `enable_fallback=0` the Python wrapper prints an error and tries again on the CPU.
    return ort.InferenceSession(
        str(plan.path), options, providers=gpu_providers(plan), enable_fallback=0
    )


def gpu_providers(plan: SessionPlan) -> list[tuple[str, dict[str, str]]]:
    """Return the providers with their options; what TensorRT leaves over runs on CUDA."""
    cuda = {
        "device_id": "0",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0" if plan.exact_float32 else "1",
        "enable_cuda_graph": "1" if plan.cuda_graphs and plan.provider == CUDA else "0",
    }
    if plan.provider == CUDA:
        return [(CUDA, cuda)]
    side, folder = plan.input_size, str(_cache_folder(plan))
    shapes = [f"images:{size}x{side}x{side}x3" for size in (plan.sizes[0], plan.sizes[-1])]
    # No precision flags: without them the network is strongly typed and the graph decides.
    tensorrt = {
        "device_id": "0",
        "trt_profile_min_shapes": shapes[0],
        "trt_profile_opt_shapes": shapes[1],
        "trt_profile_max_shapes": shapes[1],
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": folder,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": folder,
    }
    return [(TENSORRT, tensorrt), (CUDA, cuda)]


def _cache_folder(plan: SessionPlan) -> Path:
    """Return a folder of this graph's own: an engine fits no other."""
    root = plan.cache_dir or user_cache("onnxruntime")
    try:
        if root is None:
            raise FileNotFoundError("there is no home directory")
        folder = root / plan.graph_hash[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"the TensorRT provider finds no place for its engines ({error}); set "
            "METASERVE_ORT_CACHE_DIR to a folder that can be written"
        ) from error
    return folder


_DRIVER_TOO_OLD = re.compile(
    r"driver version is insufficient|CUDA failure 35\b|unsupported display driver", re.IGNORECASE
)
_NO_GPU = re.compile(r"no CUDA-capable device|CUDA failure 100\b", re.IGNORECASE)


def _explain(error: Exception, ort: ModuleType, plan: SessionPlan) -> str:
    """Return one sentence for what the library said."""
    version = f"onnxruntime {ort.__version__}"
    if plan.provider != CPU and _DRIVER_TOO_OLD.search(str(error)):
        return (
            f"the NVIDIA driver is too old for the CUDA libraries of {version}; update the driver "
            "(CUDA 13 needs 580 or newer), or set METASERVE_DEVICE=cpu"
        )
    if plan.provider != CPU and _NO_GPU.search(str(error)):
        return (
            f"{version} sees no GPU for {plan.provider}; give this machine or container one, "
            "or set METASERVE_DEVICE=cpu"
        )
    return f"onnxruntime cannot load {plan.path} on {plan.provider}: {first_line(error)}"
