"""The engine's promise to HTTP code, whoever keeps it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from app.backends.base import threads_in_words
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
        lanes: batches in flight that pay: as large as any, or those of `lane_batch_seconds`.
        threads: CPU threads of a batch that has the machine to itself; None where the backend
            decides.
        lane_batch_seconds: batch size -> seconds of a batch of one thread while every lane runs
            one; empty where such lanes do not pay.
        lane_batch_size: the largest useful batch of a lane.
        wide_up_to: most waiting images that an idle engine answers in one batch which has the
            machine to itself; more go to the lanes. Of no meaning without lanes.
        pads_from: size the device prepared -> images from which padding up to it pays; empty where
            a batch runs as large as it is.
    """

    batch_seconds: dict[int, float]
    max_batch_size: int
    lanes: int = 1
    threads: int | None = None
    lane_batch_seconds: dict[int, float] = field(default_factory=dict)
    lane_batch_size: int = 0
    wide_up_to: int = 0
    pads_from: dict[int, int] = field(default_factory=dict)

    @property
    def images_per_second(self) -> float:
        """What the backend can do at most, 0 where nothing was measured."""
        at_once = 1 if self.lane_batch_seconds else self.lanes
        wide = [at_once * size / seconds for size, seconds in self.batch_seconds.items() if seconds]
        narrow = [
            self.lanes * size / seconds
            for size, seconds in self.lane_batch_seconds.items()
            if seconds
        ]
        return max(wide + narrow, default=0.0)

    @property
    def images_at_once(self) -> int:
        """How many images one round of batches holds, in all lanes together."""
        return max(self.max_batch_size, self.lanes * (self.lane_batch_size or self.max_batch_size))

    def __str__(self) -> str:
        """Say in one line what was learned."""
        parts = [
            f"batches of {_milliseconds(self.batch_seconds)}"
            + (f" on {threads_in_words(self.threads)}" if self.threads else ""),
            f"{self.max_batch_size} is the largest useful",
        ]
        if self.lane_batch_seconds:
            parts.append(
                f"{self.lanes} lanes of 1 thread with batches of "
                f"{_milliseconds(self.lane_batch_seconds)} for more than {self.wide_up_to} waiting"
            )
        elif self.lanes > 1:
            parts.append(f"{self.lanes} in flight")
        parts += [f"padded to {size} from {least}" for size, least in self.pads_from.items()]
        return f"{'; '.join(parts)}; {self.images_per_second:.4g} images/s"


def _milliseconds(batch_seconds: dict[int, float]) -> str:
    return ", ".join(f"{size} ({one * 1e3:.2f} ms)" for size, one in batch_seconds.items())


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
