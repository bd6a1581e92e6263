"""ONNX Runtime: the package's graph on the CPU, CUDA or TensorRT execution provider."""

from __future__ import annotations

import math
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Literal

from app.backends.base import BackendInfo
from app.errors import StartupError, first_line
from app.types import Batch, Rows
from models.onnx_runtime import import_onnxruntime
from models.package import Package

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class OnnxRuntimeBackend:
    """One session over the package's `model.onnx`.

    Args:
        package: the model.
        provider: what runs the graph; `auto` takes CUDA where the library and a GPU are there.
        threads: that one run may use on the CPU.

    Raises:
        StartupError: the library or the provider asked for is missing or does not start.
    """

    def __init__(self, package: Package, provider: Provider, threads: int) -> None:
        _refuse_two_distributions()
        try:
            ort = import_onnxruntime()
        except ModuleNotFoundError as error:
            raise StartupError(
                "the onnxruntime backend needs the package onnxruntime; "
                "install metaserve[cpu] or metaserve[gpu]"
            ) from error

        available = ort.get_available_providers()
        chosen = _choose(provider, available)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Idle threads that spin take the cores that decode images.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        if chosen != _PROVIDERS["cpu"]:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            ort.preload_dlls()
        try:
            self._session = ort.InferenceSession(
                str(package.model_path), options, providers=[chosen]
            )
        except Exception as error:  # the library raises bare RuntimeErrors of its own making
            raise StartupError(
                f"onnxruntime cannot load {package.model_path} on {chosen}: {first_line(error)}"
            ) from error
        running = self._session.get_providers()[0]
        if running != chosen:
            raise StartupError(
                f"onnxruntime fell back to {running} where {chosen} was asked for; "
                "check the driver and the CUDA libraries, or set METASERVE_DEVICE=cpu"
            )
        on_cpu = chosen == _PROVIDERS["cpu"]
        manifest = package.manifest
        self.info = BackendInfo(
            name="onnxruntime",
            device="cpu" if on_cpu else "cuda:0",
            precision=manifest.precision,
            runtime=f"onnxruntime {ort.__version__} {chosen}"
            + (f", {threads} threads" if on_cpu else ""),
            input_size=manifest.input.size,
            classes=manifest.classes,
            embedding_dim=manifest.embedding_dim,
        )

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        """Run the graph once."""
        logits, embedding = self._session.run(["logits", "embedding"], {"images": batch})
        return Rows(logits, embedding)

    def close(self) -> None:
        """Drop the session."""
        self._session = None


def _choose(provider: Provider, available: list[str]) -> str:
    """Return the execution provider's name, or refuse in one sentence."""
    if provider == "auto":
        has_gpu = Path("/dev/nvidiactl").exists()
        provider = "cuda" if has_gpu and _PROVIDERS["cuda"] in available else "cpu"
    chosen = _PROVIDERS[provider]
    if chosen not in available:
        raise StartupError(
            f"this onnxruntime has no {chosen}, it has {', '.join(available)}; "
            "install metaserve[gpu] in place of metaserve[cpu], or set METASERVE_DEVICE=cpu "
            "and METASERVE_ORT_PROVIDER=auto"
        )
    return chosen


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
