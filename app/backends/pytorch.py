"""torch: the network itself, from the package's `weights.safetensors`."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Literal

from app.backends.base import BackendInfo
from app.errors import StartupError
from app.types import Batch, Rows
from models.buckets import bucket_sizes
from models.package import Package, PackageError
from models.tolerances import Precision

if TYPE_CHECKING:
    from app.backends.pytorch_buckets import TorchBuckets
    from app.backends.pytorch_paths import EagerNetwork

Device = Literal["auto", "cpu", "cuda"]


class TorchBackend:
    """Runs `ServedModel`, eagerly on the CPU; compiled, from CUDA graphs, on a GPU.

    Where it is compiled or on a GPU, a batch is padded to the next of the sizes 1, 2, 4 ...
    `max_batch_size`, which are prepared one by one.

    Args:
        package: the model; it must hold weights.
        device: where to run; `auto` takes CUDA where there is a GPU.
        threads: that one run may use on the CPU.
        max_batch_size: images a batch may hold where sizes are prepared.
        precision: of the weights; `auto` is bf16 on a GPU and fp32 on the CPU.
        compiling: `auto` compiles on a GPU where the compilers are there.
        cuda_graphs: whether a GPU replays a CUDA graph for each size.

    Raises:
        StartupError: torch, the device or the compiler asked for is missing or fails.
        PackageError: the package holds no weights, or others than its manifest describes.
    """

    def __init__(
        self,
        package: Package,
        device: Device,
        threads: int,
        max_batch_size: int = 32,
        *,
        precision: Literal["auto"] | Precision = "auto",
        compiling: Literal["auto", "on", "off"] = "auto",
        cuda_graphs: bool = True,
    ) -> None:
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
        from app.backends.pytorch_paths import choose_path, open_path
        from models.build import load_served_model
        from models.checkpoints import CheckpointError

        if device == "cuda" and not torch.cuda.is_available():
            raise StartupError(
                "METASERVE_DEVICE=cuda was asked for, but torch sees no GPU; "
                "check the driver and that torch is a CUDA build, or set METASERVE_DEVICE=cpu"
            )
        use_cuda = device != "cpu" and torch.cuda.is_available()
        path = choose_path(use_cuda, precision, compiling, cuda_graphs)
        torch.set_num_threads(threads)
        try:
            model = load_served_model(package)
        except CheckpointError as error:
            raise PackageError(f"{package.path}: {error}; export the package again") from error
        manifest = package.manifest
        widths = manifest.classes, manifest.embedding_dim
        sizes, side = bucket_sizes(max_batch_size), manifest.input.size
        self._network: TorchBuckets | EagerNetwork | None = open_path(
            model, path, sizes, side, widths
        )
        self.info = BackendInfo(
            name="torch",
            device="cuda:0" if use_cuda else "cpu",
            precision=path.precision,
            runtime=f"torch {torch.__version__} {path.words(threads)}",
            input_size=side,
            classes=manifest.classes,
            embedding_dim=manifest.embedding_dim,
            max_batch_size=max_batch_size if path.prepares_sizes else None,
            prepared_sizes=sizes if path.prepares_sizes else None,
        )

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        """Run the network once."""
        assert self._network is not None, "no run comes after close"
        return self._network.run(batch)

    def close(self) -> None:
        """Drop the network and its buffers."""
        self._network = None
