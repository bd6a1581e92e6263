"""What every backend promises: a batch of pixels in, rows of numbers out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from app.types import Batch, Rows
from models.tolerances import Precision


@dataclass(frozen=True)
class BackendInfo:
    """What a backend runs and where.

    Attributes:
        name: as in `METASERVE_BACKEND`.
        device: for example `cpu` or `cuda:0`.
        precision: that the network is computed in.
        runtime: library, version and path in use, in words.
        input_size: S of the uint8 (N, S, S, 3) batches it takes.
        classes: length of a logits row.
        embedding_dim: length of an embedding row.
        batches_in_flight: how many batches may run at once, each in a thread of its own.
        max_batch_size: images a batch may hold at most; None where only memory sets a limit.
        threads: CPU threads that one `run` uses, where that is this backend's own to choose and
            several of its kind can run side by side; None elsewhere.
        prepared_sizes: rising; a batch is padded to the next of them. None where it runs as large
            as it is.
        runs_package: whether the answers are the package's network's; those of a fake are not,
            and its golden outputs say nothing about them.
    """

    name: str
    device: str
    precision: Precision
    runtime: str
    input_size: int
    classes: int
    embedding_dim: int
    batches_in_flight: int = 1
    max_batch_size: int | None = None
    threads: int | None = None
    prepared_sizes: tuple[int, ...] | None = None
    runs_package: bool = True


def threads_in_words(threads: int) -> str:
    """Say how many threads a runtime may use."""
    return "1 thread" if threads == 1 else f"{threads} threads"


class Backend(Protocol):
    """Runs the network; called from the threads of `EngineCore` only."""

    info: BackendInfo

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        """Answer a batch; blocks.

        Args:
            batch: uint8 (N, S, S, 3), RGB, C-contiguous, at most `info.max_batch_size` images.
            deadline: absolute `time.monotonic()` seconds after which nobody waits for the answer;
                for backends that can give up or pass it on, others run to the end.

        Returns:
            Rows in the order of the batch, in arrays that no later call touches.

        Raises:
            ServiceError: to be handed to every caller of the batch as it is.
            Exception: anything else; the engine looks for the image that caused it.
        """
        ...

    def close(self) -> None:
        """Free what the backend holds; no `run` comes afterwards."""
        ...
