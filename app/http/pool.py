"""CpuPool: the threads for work that would hold up the event loop, and the wait for one of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from app.errors import DeadlineExceeded, Overloaded

P = ParamSpec("P")
T = TypeVar("T")

LATE = "the deadline passed before the image was decoded"
# Weight of a new duration: follows a change of traffic within a few images a thread.
SMOOTHING = 0.1


class CpuPool:
    """As many threads as there are CPUs; Pillow lets go of the interpreter while it works.

    Like the engine's queue, the one in front of these threads is bounded by time: an image is
    refused while the predicted wait is over the budget or beyond its deadline.

    Args:
        threads: how many.
        budget_seconds: longest wait at which a job is admitted.
    """

    def __init__(self, threads: int, budget_seconds: float) -> None:
        self._threads = threads
        self._budget_seconds = budget_seconds
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="cpu")
        self._pending = 0  # touched by the event loop alone
        self._mean_seconds = (
            0.0  # of a job; two threads may overwrite each other, it is an estimate
        )

    def wait_seconds(self) -> float:
        """Return how long a job that came now would wait for a thread."""
        ahead = max(self._pending - self._threads + 1, 0)
        return ahead * self._mean_seconds / self._threads

    def check_admission(self, deadline: float) -> None:
        """Refuse a job that would wait too long.

        Args:
            deadline: absolute `time.monotonic()` seconds.

        Raises:
            Overloaded: the predicted wait is over the budget, or beyond the deadline.
        """
        wait = self.wait_seconds()
        allowed = min(self._budget_seconds, deadline - time.monotonic())
        if self._pending and wait > allowed:
            raise _overloaded(wait - allowed)

    async def run_admitted(
        self, deadline: float, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a job that may be refused, before it waits and once more when its turn has come.

        Raises:
            Overloaded: it would wait, or has waited, longer than the budget.
            DeadlineExceeded: the deadline passed before the job was done.
        """
        self.check_admission(deadline)
        submitted_at = time.monotonic()

        def unless_late() -> T:
            now = time.monotonic()
            if now >= deadline:
                raise DeadlineExceeded(LATE)
            if now - submitted_at > self._budget_seconds:
                raise _overloaded(self._budget_seconds)
            try:
                return job(*args, **kwargs)
            finally:
                self._mean_seconds += SMOOTHING * (time.monotonic() - now - self._mean_seconds)

        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self.run(unless_late)
        except TimeoutError:
            raise DeadlineExceeded(LATE) from None

    async def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a job when a thread is free."""
        loop = asyncio.get_running_loop()
        self._pending += 1
        try:
            return await loop.run_in_executor(self._executor, lambda: job(*args, **kwargs))
        finally:
            self._pending -= 1

    def close(self) -> None:
        """Wait for running jobs and end the threads; what has not begun never will."""
        self._executor.shutdown(cancel_futures=True)


def _overloaded(excess_seconds: float) -> Overloaded:
    return Overloaded(
        "more images wait to be decoded than can be in time; send the request again later",
        retry_after_seconds=max(excess_seconds, 1.0),
    )
