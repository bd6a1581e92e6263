"""BatchWindow: which requests form the next batch, and when; pure, the clock is an argument."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice

from app.errors import ServiceError
from app.types import Pixels, Row

Reply = Callable[[Row | ServiceError], None]
"""Takes a request's one answer; called from an engine thread, must neither block nor raise."""

Outcome = tuple["Request", Row | ServiceError]


@dataclass(eq=False, slots=True)
class Request:
    """One image on its way to the backend.

    Attributes:
        pixels: uint8 (S, S, 3).
        deadline: absolute seconds of the engine's clock.
        enqueued_at: likewise.
        reply: receives the answer, exactly once; never for a caller that left while it waited.
        wake: called after replies, once for all that share it and are answered together.
        gone: the caller left; nobody waits for the answer.
        answered: the answer was given.
    """

    pixels: Pixels
    deadline: float
    enqueued_at: float
    reply: Reply = field(repr=False)
    wake: Callable[[], None] | None = field(default=None, repr=False)
    gone: bool = False
    answered: bool = False

    def answer(self, outcome: Row | ServiceError) -> None:
        """Give the answer; a second one is dropped."""
        if not self.answered:
            self.answered = True
            self.reply(outcome)


def answer_together(outcomes: Iterable[Outcome]) -> None:
    """Give every request its answer, then wake whoever waits for them, once."""
    wakes = set()
    for request, outcome in outcomes:
        request.answer(outcome)
        wakes.add(request.wake)
    for wake in wakes:
        if wake is not None:
            wake()


class BatchWindow:
    """Waiting requests in the order they came.

    Work-conserving: with `max_wait_seconds` 0 a free backend takes what is there. A longer wait
    counts from the arrival of the oldest request and ends early when a batch is full.

    The oldest leave first, as long as the oldest waits no longer than the budget and one batch.
    Beyond, the newest leave first: in a queue that is too long to be answered in time it is better
    to answer some in time than everybody late.

    Args:
        max_batch_size: images a batch may hold at most.
        max_wait_seconds: how long the oldest may wait for company.
        budget_seconds: how long the oldest may wait for its batch in the order of arrival.
        pads_from: size a device prepared -> images from which a batch padded up to it does more
            images a second than a full one of the size below.
    """

    def __init__(
        self,
        max_batch_size: int,
        max_wait_seconds: float = 0.0,
        *,
        budget_seconds: float = math.inf,
        pads_from: Mapping[int, int] | None = None,
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_wait_seconds = max_wait_seconds
        self.budget_seconds = budget_seconds
        self._pads_from = sorted((pads_from or {}).items())
        # A dict keeps the order of arrival and lets a caller leave from the middle at once.
        self._waiting: dict[int, Request] = {}
        # No deadline of those that wait is before this: a long queue is not searched in vain.
        self._earliest = math.inf

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Let a request wait."""
        self._waiting[id(request)] = request
        self._earliest = min(self._earliest, request.deadline)

    def remove(self, request: Request) -> bool:
        """Take a request out again; False when it does not wait any more."""
        return self._waiting.pop(id(request), None) is not None

    def take_late(self, now: float, batch_seconds: float = 0.0) -> list[Request]:
        """Take out every request whose deadline has passed.

        Args:
            now: the clock.
            batch_seconds: how long the next batch would take. While the oldest is over budget,
                those whose deadline comes before the end of that batch are taken out as well. At
                other times they have their chance: an estimate that is too high must not keep
                everybody away from the backend, or nothing would ever correct it.
        """
        end = math.nextafter(now, math.inf)
        if self.is_over_budget(now, batch_seconds):
            end = max(end, now + batch_seconds)
        if self._earliest >= end:
            return []
        late = [request for request in self._waiting.values() if request.deadline < end]
        for request in late:
            self.remove(request)
        self._earliest = min((one.deadline for one in self._waiting.values()), default=math.inf)
        return late

    def is_over_budget(self, now: float, batch_seconds: float = 0.0) -> bool:
        """Tell whether the oldest has waited longer than the budget and one batch."""
        if not self._waiting:
            return False
        oldest = next(iter(self._waiting.values()))
        return now - oldest.enqueued_at > self.budget_seconds + batch_seconds

    def due_at(self) -> float | None:
        """Return the moment from which a batch may leave; None while nothing waits."""
        if not self._waiting:
            return None
        oldest = next(iter(self._waiting.values()))
        if len(self._waiting) >= self.max_batch_size:
            return oldest.enqueued_at
        return oldest.enqueued_at + self.max_wait_seconds

    def take_batch(
        self,
        now: float,
        *,
        hurry: bool = False,
        most: int | None = None,
        batch_seconds: float = 0.0,
    ) -> list[Request]:
        """Take the oldest requests, or the newest while the oldest is over budget.

        Args:
            now: the clock.
            hurry: take them even before they are due.
            most: how many; `max_batch_size` when None.
            batch_seconds: how long the batch would take; none is taken whose deadline comes before
                its end while the oldest is over budget.
        """
        due_at = self.due_at()
        if due_at is None or (now < due_at and not hurry):
            return []
        size = self._useful_size(min(most or self.max_batch_size, len(self._waiting)))
        if not self.is_over_budget(now, batch_seconds):
            return self._take(size)
        newest = (
            request
            for request in reversed(self._waiting.values())
            if request.deadline >= now + batch_seconds
        )
        return self._take_these(list(islice(newest, size)))

    def take_all(self) -> list[Request]:
        """Take out everything, due or not."""
        return self._take(len(self._waiting))

    def _useful_size(self, size: int) -> int:
        """Return `size`, or the full prepared size below it where padding does not pay."""
        below = 0
        for prepared, pays_from in self._pads_from:
            if size <= prepared:
                return below if below and size < pays_from else size
            below = prepared
        return size

    def _take(self, count: int) -> list[Request]:
        return self._take_these(list(islice(self._waiting.values(), count)))

    def _take_these(self, requests: list[Request]) -> list[Request]:
        for request in requests:
            self.remove(request)
        return requests
