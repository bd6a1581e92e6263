"""torch: the network itself, from the package's `weights.safetensors`."""

from __future__ import annotations

import math
import os
from typing import Any, Literal

from app.backends.base import BackendInfo
from app.errors import StartupError
from app.types import Batch, Rows
from models.package import Package, PackageError

Device = Literal["auto", "cpu", "cuda"]


class TorchBackend:
    """Runs `ServedModel` eagerly in float32.

    Args:
        package: the model; it must hold weights.
        device: where to run; `auto` takes CUDA where there is a GPU.
        threads: that one run may use on the CPU.

    Raises:
        StartupError: torch or the device asked for is missing.
        PackageError: the package holds no weights, or others than its manifest describes.
    """

    def __init__(self, package: Package, device: Device, threads: int) -> None:
        # OpenMP's threads spin between two layers and take the cores that decode images. Measured
        # with caformer_s18 on two cores: beside one busy process 110 ms instead of 280, alone 85
        # instead of 68.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            import safetensors  # noqa: F401
            import torch
        except ModuleNotFoundError as error:
            raise StartupError(
                "the torch backend needs torch and safetensors; install metaserve[torch]"
            ) from error
        from models.build import load_served_model
        from models.checkpoints import CheckpointError

        if device == "cuda" and not torch.cuda.is_available():
            raise StartupError(
                "METASERVE_DEVICE=cuda was asked for, but torch sees no GPU; "
                "check the driver and that torch is a CUDA build, or set METASERVE_DEVICE=cpu"
            )
        use_cuda = device != "cpu" and torch.cuda.is_available()
        self._device = torch.device("cuda:0" if use_cuda else "cpu")
        self._torch = torch
        torch.set_num_threads(threads)
        try:
            self._model: Any = load_served_model(package).to(self._device)
        except CheckpointError as error:
            raise PackageError(f"{package.path}: {error}; export the package again") from error
        manifest = package.manifest
        self.info = BackendInfo(
            name="torch",
            device=str(self._device),
            precision="fp32",
            runtime=f"torch {torch.__version__} eager"
            + ("" if use_cuda else f", {threads} threads"),
            input_size=manifest.input.size,
            classes=manifest.classes,
            embedding_dim=manifest.embedding_dim,
        )

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        """Run the network once."""
        with self._torch.inference_mode():
            logits, embedding = self._model(self._torch.from_numpy(batch).to(self._device))
        return Rows(logits.cpu().numpy(), embedding.cpu().numpy())

    def close(self) -> None:
        """Drop the network."""
        self._model = None
