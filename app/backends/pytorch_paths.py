"""The ways torch runs a network: eager or compiled, on the CPU or from CUDA graphs on a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from app.backends.base import threads_in_words
from app.backends.pytorch_buckets import Device, HostDevice, TorchBuckets
from app.backends.pytorch_compile import MODES, compile_network, what_keeps_from_compiling
from app.backends.pytorch_cuda import CudaDevice
from app.errors import StartupError, first_line
from app.types import Batch, Rows
from models.precision import cast_network
from models.serving import ServedModel
from models.tolerances import Precision


@dataclass(frozen=True)
class TorchPath:
    """How a network is run.

    Attributes:
        device: `cpu` or `cuda`.
        precision: of the weights.
        compiled: by torch.compile, for each batch size.
        cuda_graphs: one for each batch size; `cuda` only.
        note: why it is not compiled where it would be, or empty.
    """

    device: Literal["cpu", "cuda"]
    precision: Precision
    compiled: bool
    cuda_graphs: bool
    note: str = ""

    @property
    def prepares_sizes(self) -> bool:
        """Whether batches are padded to sizes prepared in advance."""
        return self.compiled or self.device == "cuda"

    @property
    def captures(self) -> bool:
        """Whether each size is captured in a CUDA graph."""
        return self.device == "cuda" and self.cuda_graphs

    @property
    def how(self) -> str:
        """Which path it is, in words."""
        how = "compiled" if self.compiled else "eager"
        if self.note:
            how += f" ({self.note})"
        if self.device == "cuda":
            how += ", CUDA graphs" if self.captures else ", no CUDA graphs"
        return how

    def words(self, threads: int) -> str:
        """Say which path it is, and with how many threads where they do the work."""
        return self.how if self.device == "cuda" else f"{self.how}, {threads_in_words(threads)}"


def choose_path(
    use_cuda: bool,
    precision: Literal["auto"] | Precision,
    compiling: Literal["auto", "on", "off"],
    cuda_graphs: bool,
) -> TorchPath:
    """Turn what the settings ask for into a path.

    Raises:
        StartupError: compiling was asked for, and a compiler is missing.
    """
    device: Literal["cpu", "cuda"] = "cuda" if use_cuda else "cpu"
    if precision == "auto":
        precision = "bf16" if use_cuda else "fp32"
    wanted = compiling == "on" or (compiling == "auto" and use_cuda)
    missing = what_keeps_from_compiling(device) if wanted else None
    if missing and compiling == "on":
        raise StartupError(
            f"METASERVE_TORCH_COMPILE=on cannot be met: {missing}; install it, or set "
            "METASERVE_TORCH_COMPILE=off"
        )
    return TorchPath(device, precision, wanted and not missing, cuda_graphs, missing or "")


def open_path(
    model: ServedModel,
    path: TorchPath,
    sizes: tuple[int, ...],
    input_size: int,
    widths: tuple[int, int],
    mode: str | None = None,
) -> TorchBuckets | EagerNetwork:
    """Bring a network onto its path.

    Args:
        model: in float32 on the CPU; used up.
        path: how to run it.
        sizes: of the batches to prepare; the first is prepared now, others when they first run.
        input_size: S.
        widths: classes and embedding dim.
        mode: of torch.compile; the device's own when None.

    Raises:
        StartupError: the network does not fit, or cannot be compiled or captured here.
    """
    model.network = cast_network(model.network, path.precision)
    if not path.prepares_sizes:
        return EagerNetwork(model)
    try:
        return _open_buckets(model, path, sizes, input_size, widths, mode)
    except Exception as error:  # compilers, drivers and torch raise what they like
        raise StartupError(
            f"torch cannot prepare the network on {path.device} ({path.how}): "
            f"{_what_was_said(error)}; {_what_may_help(path, error)}"
        ) from error


def _open_buckets(
    model: ServedModel,
    path: TorchPath,
    sizes: tuple[int, ...],
    input_size: int,
    widths: tuple[int, int],
    mode: str | None,
) -> TorchBuckets:
    device: Device = HostDevice()
    if path.device == "cuda":
        if path.precision == "fp32":
            # cuDNN rounds the inputs of float32 convolutions to TF32 unless told not to.
            torch.backends.cudnn.allow_tf32 = False
        device = CudaDevice(graphs=path.cuda_graphs)
        model.to(device.name, memory_format=torch.channels_last)  # type: ignore[call-overload]
    forward = (
        compile_network(model, mode=mode or MODES[path.device]) if path.compiled else model.forward
    )
    buckets = TorchBuckets(forward, device, sizes, input_size, widths)
    buckets.prepare(sizes[0])
    return buckets


def _what_was_said(error: Exception) -> str:
    """Return the first line, and the second where the first only announces it."""
    said = first_line(error)
    return " ".join(str(error).splitlines()[:2]) if said.endswith(":") else said


def _what_may_help(path: TorchPath, error: Exception) -> str:
    """Return what to do next: about memory, or without the part that is easiest to go without."""
    if "out of memory" in str(error):
        return "lower METASERVE_MAX_BATCH_SIZE, or free memory there"
    if path.compiled:
        return "set METASERVE_TORCH_COMPILE=off"
    if path.captures:
        return "set METASERVE_CUDA_GRAPHS=false"
    return "check the driver, or set METASERVE_DEVICE=cpu"


class EagerNetwork:
    """Runs batches of any size as they come, on the CPU."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def run(self, batch: Batch) -> Rows:
        """Run the network once."""
        with torch.inference_mode():
            logits, embedding = self._model(torch.from_numpy(batch))
        return Rows(logits.numpy(), embedding.numpy())
