"""The engine's promise to HTTP code, whoever keeps it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from app.types import Pixels, Row


@dataclass(frozen=True)
class EngineStatus:
    """How an engine fares.

    Attributes:
        queue_depth: images waiting for a batch.
        in_flight: images in running batches.
        running_batches: how many those are.
        predicted_wait_seconds: what an image that came now would wait for its batch.
        stalled_seconds: how long work has been pending without anything completing.
        last_error: the backend's last failure in words, None after a batch that went well.
    """

    queue_depth: int
    in_flight: int
    running_batches: int
    predicted_wait_seconds: float
    stalled_seconds: float
    last_error: str | None


@dataclass(frozen=True)
class Profile:
    """What warm-up measured on this machine, and what follows from it.

    Attributes:
        batch_seconds: batch size -> seconds of a batch that has the machine to itself.
        max_batch_size: the largest useful batch.
        lanes: batches in flight that pay.
    """

    batch_seconds: dict[int, float]
    max_batch_size: int
    lanes: int = 1


@dataclass(frozen=True)
class GoldenCheck:
    """How this machine's answers to the golden images differ from torch in float32.

    Attributes:
        max_abs_logit_difference: over all golden images and both batch sizes.
        batch_dependence: largest difference of a logit between an image alone and in a batch.
    """

    max_abs_logit_difference: float
    batch_dependence: float


class Engine(Protocol):
    """Answers images with rows, batching them as it sees fit."""

    async def infer(self, pixels: Pixels, *, deadline: float) -> Row:
        """Answer one image.

        Args:
            pixels: uint8 (S, S, 3).
            deadline: absolute `time.monotonic()` seconds.

        Raises:
            Refused: at once, when the image cannot be answered in time or the engine closes.
            DeadlineExceeded: when the deadline passes first.
            InferenceFailed: the backend failed on this image.
        """
        ...

    def check_admission(self, deadline: float, *, ahead_seconds: float = 0.0) -> None:
        """Raise what `infer` would raise now, before any work is spent on an image.

        Args:
            deadline: absolute `time.monotonic()` seconds.
            ahead_seconds: until the image could be handed in: the wait for a decoding thread, and
                decoding. Part of the one estimate that is held against deadline and budget.

        Raises:
            Refused: too much waits already, or the engine closes.
            DeadlineExceeded: the deadline has passed.
        """
        ...

    def status(self) -> EngineStatus:
        """Return how the engine fares."""
        ...

    def refuse_waiting(self) -> None:
        """Answer everything that waits with Draining."""
        ...

    async def aclose(self) -> None:
        """Refuse new images, answer the admitted ones, stop."""
        ...
