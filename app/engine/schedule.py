"""Schedule: which way a batch runs, and how long one that is asked for now would wait.

    wide     one batch that has the machine to itself
    narrow   a batch a lane, side by side; only where lanes pay (see `lanes`)

The two never run at once. Pure: what waits, what runs and the clock are arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from app.engine.timing import ServiceTimes


@dataclass(frozen=True, eq=False)
class Way:
    """A way to run batches: wide or narrow.

    Attributes:
        times: of its batches.
        max_batch_size: images a batch may hold at most.
        lanes: batches that run at once.
    """

    times: ServiceTimes
    max_batch_size: int
    lanes: int


@dataclass(frozen=True, eq=False)
class Running:
    """A batch in the backend.

    Attributes:
        way: that it runs.
        size: in images.
        started_at: absolute seconds.
    """

    way: Way
    size: int
    started_at: float


@dataclass(frozen=True)
class Schedule:
    """The ways of a core, and which of them is next.

    Attributes:
        wide: for a few images in an idle core.
        narrow: for more; None where lanes do not pay.
        wide_up_to: most waiting images that leave wide.
    """

    wide: Way
    narrow: Way | None = None
    wide_up_to: int = 0

    def next_way(self, waiting: int, running: Sequence[Running]) -> Way:
        """Return how a batch would run if the running ones left room for it."""
        if self.narrow is None:
            return self.wide
        are_narrow = bool(running) and running[0].way is self.narrow
        return self.narrow if are_narrow or waiting > self.wide_up_to else self.wide

    def free_way(self, waiting: int, running: Sequence[Running]) -> Way | None:
        """Return how the next batch runs, None where it has to wait for what runs.

        There are as many threads as lanes, so whoever asks is free for one of them.
        """
        way = self.next_way(waiting, running)
        if self.narrow is None or not running:
            return way
        return way if way is self.narrow and running[0].way is way else None

    def wait_seconds(self, waiting: int, running: Sequence[Running], now: float) -> float:
        """Return how long an image that came now would wait until its batch starts."""
        way = self.next_way(waiting + 1, running)
        remaining = [
            one.way.times.remaining_seconds(one.size, now - one.started_at) for one in running
        ]
        if running and running[0].way is not way:
            remaining = [max(remaining)] * way.lanes  # wide and narrow never run at once
        return way.times.wait_seconds(waiting, remaining, way.max_batch_size, way.lanes)

    def own_seconds(self, waiting: int, running: Sequence[Running]) -> float:
        """Return how long the batch should take that an image which came now would be in."""
        way = self.next_way(waiting + 1, running)
        return way.times.batch_seconds(waiting % way.max_batch_size + 1)
