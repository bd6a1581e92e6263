"""CpuPool: threads for work that would hold up the event loop, and the waits for what runs it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

from app.errors import DeadlineExceeded, Overloaded, retry_after_seconds

P = ParamSpec("P")
T = TypeVar("T")

LATE = "the deadline passed before the image was decoded"
# Weight of a new duration: follows a change of traffic within a few images a thread.
SMOOTHING = 0.1
# What a turn of the event loop may spend on jobs of its own; others wait for the next turn.
HERE_SECONDS = 0.005


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
        # Of a job. Two threads may overwrite each other's: it is an estimate.
        self._mean_seconds = 0.0
        # What waits for a turn of the loop, oldest first.
        self._waiting_here: deque[_Waiting[Any]] = deque()
        self._turn_began_at = 0.0
        self._turn_jobs = 0
        self._turn_seconds = 0.0  # that these took
        # What a turn takes for each job in it, with all else that it does for their requests.
        self._mean_share_seconds = 0.0

    @property
    def threads(self) -> int:
        """How many jobs run at once."""
        return self._threads

    def wait_seconds(self) -> float:
        """Return how long a job that came now would wait, for a thread or a turn of the loop."""
        ahead = max(self._pending - self._threads + 1, 0)
        for_thread = ahead * self._mean_seconds / self._threads
        return max(for_thread, len(self._waiting_here) * self._mean_share_seconds)

    def ahead_seconds(self) -> float:
        """Return how long a job that came now would take with its wait."""
        return self.wait_seconds() + self._mean_seconds

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs or waits."""
        return not self._pending and not self._waiting_here

    def check_admission(self, deadline: float) -> None:
        """Refuse a job that would wait too long.

        Args:
            deadline: absolute `time.monotonic()` seconds.

        Raises:
            Overloaded: the predicted wait is over the budget, or beyond the deadline.
            DeadlineExceeded: the deadline has passed.
        """
        time_left = deadline - time.monotonic()
        if time_left <= 0:
            raise DeadlineExceeded(LATE)
        excess = self.wait_seconds() - min(self._budget_seconds, time_left)
        if excess > 0 and not self.is_idle:
            raise _overloaded(excess)

    async def run_here(
        self, deadline: float, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Run a job that is smaller than the way to a thread and back, on the event loop.

        A turn of the loop does so many and no more; the others wait in the order they came.

        Raises:
            Overloaded: it would wait, or has waited, longer than the budget.
            DeadlineExceeded: the deadline passed before its turn came.
        """
        self.check_admission(deadline)
        if not self._waiting_here and self._turn_seconds < HERE_SECONDS:
            return self._do_here(partial(job, *args, **kwargs))
        waiting = _Waiting(partial(job, *args, **kwargs))
        self._waiting_here.append(waiting)
        try:
            async with asyncio.timeout(deadline - waiting.since):
                return await waiting.answer
        except TimeoutError:
            raise DeadlineExceeded(LATE) from None
        finally:
            if not waiting.is_begun:
                self._waiting_here.remove(waiting)

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
            started_at = time.monotonic()
            if started_at - submitted_at > self._budget_seconds:
                raise _overloaded(self._budget_seconds)
            try:
                return job(*args, **kwargs)
            finally:
                seconds = time.monotonic() - started_at
                self._mean_seconds += SMOOTHING * (seconds - self._mean_seconds)

        try:
            async with asyncio.timeout(deadline - submitted_at):
                return await self.run(unless_late)
        except TimeoutError:
            raise DeadlineExceeded(LATE) from None

    async def run(self, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a job when a thread is free; one that is cancelled before never begins."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            result: T | BaseException
            try:
                result = job(*args, **kwargs)
            except BaseException as error:  # whoever awaits it hears of it
                result = error
            with contextlib.suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(self._end, answer, result)

        self._pending += 1
        submitted = self._executor.submit(work)
        try:
            return await answer
        except asyncio.CancelledError:
            # A job that runs keeps its thread, and its place, to the end.
            if submitted.cancel():
                self._pending -= 1
            raise

    def close(self, timeout_seconds: float = 1.0) -> None:
        """End the threads; what has not begun never will, what runs is given some time."""
        closing = threading.Thread(
            target=self._executor.shutdown, kwargs={"cancel_futures": True}, daemon=True
        )
        closing.start()
        closing.join(timeout_seconds)

    def _end(self, answer: asyncio.Future[T], result: T | BaseException) -> None:
        self._pending -= 1
        if answer.done():  # the caller left
            return
        if isinstance(result, BaseException):
            answer.set_exception(result)
        else:
            answer.set_result(result)

    def _do_here(self, job: Callable[[], T]) -> T:
        started_at = time.monotonic()
        if not self._turn_jobs:
            self._turn_began_at = started_at
            asyncio.get_running_loop().call_soon(self._begin_turn)
        try:
            return job()
        finally:
            seconds = time.monotonic() - started_at
            self._turn_jobs += 1
            self._turn_seconds += seconds
            self._mean_share_seconds = self._mean_share_seconds or seconds

    def _begin_turn(self) -> None:
        """Do what waits for a turn of the loop, as far as this one goes; the last is over."""
        share = (time.monotonic() - self._turn_began_at) / self._turn_jobs
        self._mean_share_seconds += SMOOTHING * (share - self._mean_share_seconds)
        self._turn_jobs, self._turn_seconds = 0, 0.0
        while self._waiting_here and self._turn_seconds < HERE_SECONDS:
            waiting = self._waiting_here.popleft()
            waiting.is_begun = True
            if waiting.answer.done():  # the caller is about to leave
                continue
            try:
                if time.monotonic() - waiting.since > self._budget_seconds:
                    raise _overloaded(self._budget_seconds)
                waiting.answer.set_result(self._do_here(waiting.job))
            except Exception as error:  # whoever awaits it hears of it
                waiting.answer.set_exception(error)


class _Waiting(Generic[T]):
    """A job that waits for a turn of the event loop, and who waits for its answer."""

    __slots__ = ("answer", "is_begun", "job", "since")

    def __init__(self, job: Callable[[], T]) -> None:
        self.job = job
        self.answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self.since = time.monotonic()
        self.is_begun = False


def _overloaded(excess_seconds: float) -> Overloaded:
    return Overloaded(
        "more images wait to be decoded than can be in time; send the request again later",
        retry_after_seconds=retry_after_seconds(excess_seconds),
    )
