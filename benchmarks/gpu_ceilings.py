"""What the machine can do at best: arithmetic, memory, the way to the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from models.precision import DTYPES
from models.tolerances import Precision

ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run as the rows that are compared with them.

    Attributes:
        flops: precision -> operations a second in a square matrix product; none on the CPU,
            where torch's product is no ceiling: MKL leaves AVX-512 of AMD processors alone and
            reached 106 GFLOP/s on a core that did 240 in oneDNN.
        memory: bytes a second, read and written, in a copy on the device.
        upload: bytes a second from pinned memory to the device; None on the CPU.
    """

    flops: dict[Precision, float]
    memory: float
    upload: float | None


def measure_ceilings(device: str) -> Ceilings:
    """Measure on `cuda` or `cpu`; seconds on either."""
    on_gpu = device == "cuda"
    megabytes = 1024 if on_gpu else 64
    precisions: tuple[Precision, ...] = ("fp32", "fp16", "bf16") if on_gpu else ()
    # TF32 would pass for float32 otherwise; the paths that are measured do without it too.
    torch.backends.cuda.matmul.allow_tf32 = False
    flops = {name: _matmul(device, DTYPES[name]) for name in precisions}
    source = torch.zeros(megabytes << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    memory = 2 * source.numel() / _seconds(device, lambda: target.copy_(source))
    upload = None
    if on_gpu:
        pinned = torch.zeros(256 << 20, dtype=torch.uint8, pin_memory=True)
        part = target[: pinned.numel()]
        upload = pinned.numel() / _seconds(device, lambda: part.copy_(pinned, non_blocking=True))
    return Ceilings(flops, memory, upload)


def _matmul(device: str, dtype: torch.dtype) -> float:
    side = 8192
    # Random: a product of zeros runs faster than one of data.
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return 2 * side**3 / _seconds(device, lambda: torch.mm(left, right, out=out))


def _seconds(device: str, work: Callable[[], object]) -> float:
    """Return how long work takes at best, of several rounds of several runs."""
    runs = 10 if device == "cuda" else 3

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        work()
    durations = []
    for _ in range(ROUNDS):
        wait()
        started_at = time.perf_counter()
        for _ in range(runs):
            work()
        wait()
        durations.append((time.perf_counter() - started_at) / runs)
    return min(durations)
