"""A name from the settings becomes a backend; imports only the one asked for."""

from __future__ import annotations

from app.backends.base import Backend
from app.errors import StartupError
from app.settings import Settings
from models.package import Package


def select_backend(settings: Settings, package: Package, threads: int) -> Backend:
    """Start the backend that the settings name, with its weights loaded.

    Raises:
        StartupError: it cannot run here; the sentence says what is missing.
        PackageError: the package lacks what the backend needs.
    """
    match settings.backend:
        case "onnxruntime":
            from app.backends.ort import OnnxRuntimeBackend

            provider = settings.ort_provider
            if provider == "auto":
                provider = settings.device
            elif (provider == "cpu") != (settings.device == "cpu") and settings.device != "auto":
                raise StartupError(
                    f"METASERVE_ORT_PROVIDER={provider} contradicts "
                    f"METASERVE_DEVICE={settings.device}; set one of them"
                )
            return OnnxRuntimeBackend(
                package,
                provider,
                threads,
                settings.max_batch_size,
                cuda_graphs=settings.cuda_graphs,
                cache_dir=settings.ort_cache_dir,
            )
        case "torch":
            from app.backends.pytorch import TorchBackend

            return TorchBackend(
                package,
                settings.device,
                threads,
                settings.max_batch_size,
                precision=settings.torch_precision,
                compiling=settings.torch_compile,
                cuda_graphs=settings.cuda_graphs,
            )
        case "tensorrt":
            from app.backends.tensorrt import open_tensorrt

            return open_tensorrt(package, settings.max_batch_size, settings.device)
        case "triton":
            from app.backends.triton import TritonBackend

            return TritonBackend(
                package,
                settings.triton_url,
                settings.triton_model,
                settings.device,
                settings.triton_wait_s,
            )
        case "fake":
            from app.backends.fake import FakeBackend

            manifest = package.manifest
            return FakeBackend(
                manifest.input.size,
                manifest.classes,
                manifest.embedding_dim,
                seconds=settings.fake_batch_ms / 1000,
            )
