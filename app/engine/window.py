"""BatchWindow: which requests form the next batch, and when; pure, the clock is an argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice

from app.errors import ServiceError
from app.types import Pixels, Row

Reply = Callable[[Row | ServiceError], None]
"""Takes a request's one answer; called from an engine thread, must neither block nor raise."""


@dataclass(eq=False, slots=True)
class Request:
    """One image on its way to the backend.

    Attributes:
        pixels: uint8 (S, S, 3).
        deadline: absolute seconds of the engine's clock.
        enqueued_at: likewise.
        reply: receives the answer, exactly once; never for a caller that left while it waited.
        gone: the caller left; nobody waits for the answer.
        answered: the answer was given.
    """

    pixels: Pixels
    deadline: float
    enqueued_at: float
    reply: Reply = field(repr=False)
    gone: bool = False
    answered: bool = False

    def answer(self, outcome: Row | ServiceError) -> None:
        """Give the answer; a second one is dropped."""
        if not self.answered:
            self.answered = True
            self.reply(outcome)


class BatchWindow:
    """Waiting requests in the order they came.

    Work-conserving: with `max_wait_seconds` 0 a free backend takes what is there. A longer wait
    counts from the arrival of the oldest request and ends early when a batch is full.
    """

    def __init__(self, max_batch_size: int, max_wait_seconds: float = 0.0) -> None:
        self.max_batch_size = max_batch_size
        self.max_wait_seconds = max_wait_seconds
        # A dict keeps the order of arrival and lets a caller leave from the middle at once.
        self._waiting: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Let a request wait."""
        self._waiting[id(request)] = request

    def remove(self, request: Request) -> bool:
        """Take a request out again; False when it does not wait any more."""
        return self._waiting.pop(id(request), None) is not None

    def take_late(self, now: float) -> list[Request]:
        """Take out every request whose deadline has passed."""
        late = [request for request in self._waiting.values() if request.deadline <= now]
        for request in late:
            self.remove(request)
        return late

    def due_at(self) -> float | None:
        """Return the moment from which a batch may leave; None while nothing waits."""
        if not self._waiting:
            return None
        oldest = next(iter(self._waiting.values()))
        if len(self._waiting) >= self.max_batch_size:
            return oldest.enqueued_at
        return oldest.enqueued_at + self.max_wait_seconds

    def take_batch(self, now: float, *, hurry: bool = False) -> list[Request]:
        """Take the oldest requests, at most `max_batch_size`.

        Args:
            now: the clock.
            hurry: take them even before they are due.
        """
        due_at = self.due_at()
        if due_at is None or (now < due_at and not hurry):
            return []
        return self._take(self.max_batch_size)

    def take_all(self) -> list[Request]:
        """Take out everything, due or not."""
        return self._take(len(self._waiting))

    def _take(self, count: int) -> list[Request]:
        taken = list(islice(self._waiting.values(), count))
        for request in taken:
            self.remove(request)
        return taken
