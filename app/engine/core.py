"""EngineCore: a window, a backend, a thread per batch in flight; requests in, replies out.

    submit --> BatchWindow --> thread --> Answering --> one reply a request
                   |
          late, gone: leave here unseen

Where lanes of one thread pay (see `lanes`), an idle core answers a few images in one wide batch
that has the machine to itself, and more in narrow ones side by side. The two never run at once;
neither waits for the other longer than what runs already.

No asyncio here: the same core serves a process of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np

from app.backends.base import Backend
from app.engine.admission import check_deadline, check_wait
from app.engine.answering import Answering
from app.engine.base import EngineStatus
from app.engine.lanes import NarrowLanes
from app.engine.schedule import Running, Schedule, Way
from app.engine.timing import ServiceTimes
from app.engine.window import BatchWindow, Request, answer_together
from app.errors import DRAINING, DeadlineExceeded, Draining, ServiceError

log = logging.getLogger("metaserve.engine")

# The queue is bounded by time; this bounds its memory where images are answered in microseconds.
QUEUE_BYTES = 256 * 1024 * 1024


class BatchObserver(Protocol):
    """Hears of every batch; called from engine threads."""

    def batch_done(self, size: int) -> None:
        """A batch of `size` images was answered."""
        ...

    def batch_failed(self) -> None:
        """The backend failed on a batch."""
        ...


class EngineCore:
    """Batches requests and answers each exactly once.

    Args:
        backend: runs the batches; closed with the core.
        window: forms them.
        times: durations known so far.
        queue_budget_seconds: longest predicted wait at which a request is admitted.
        observer: hears of batches.
        clock: absolute seconds; the clock of deadlines.
        narrow: lanes of one thread, where they pay; closed with the core.
    """

    def __init__(
        self,
        backend: Backend,
        window: BatchWindow,
        times: ServiceTimes,
        queue_budget_seconds: float,
        observer: BatchObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
        narrow: NarrowLanes | None = None,
    ) -> None:
        self._window = window
        self._queue_budget_seconds = queue_budget_seconds
        self._observer = observer
        self._clock = clock
        info = backend.info
        self._image_shape = (info.input_size, info.input_size, 3)
        self._max_waiting = max(QUEUE_BYTES // (3 * info.input_size**2), window.max_batch_size)
        in_flight = info.batches_in_flight
        wide = Way(times, window.max_batch_size, in_flight)
        self._schedule = Schedule(wide)
        self._answering = {wide: self._answering_on(backend, times)}
        # Of each a backend once, also where wide and narrow share it.
        self._backends = {id(backend): backend}
        if narrow is not None:
            in_flight = narrow.lanes
            lanes = Way(narrow.times, narrow.max_batch_size, in_flight)
            self._schedule = Schedule(wide, lanes, narrow.wide_up_to)
            self._answering[lanes] = self._answering_on(narrow.backend, narrow.times)
            self._backends[id(narrow.backend)] = narrow.backend
        self._changed = threading.Condition()  # guards everything below
        self._closing = False
        self._running: list[Running] = []
        self._idle_threads = 0
        self._progress_at = clock()
        self._last_error: str | None = None
        self._threads = [
            threading.Thread(target=self._serve, name=f"engine-{lane}", daemon=True)
            for lane in range(in_flight)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request, *, announce: bool = True) -> None:
        """Let a request wait for its batch; returns at once.

        Args:
            request: with pixels as the backend takes them.
            announce: wake an idle core now. Whoever has several requests says so with the last,
                or calls `announce` after it, and they leave in one batch.

        Raises:
            ValueError: the pixels have another shape or type than the backend takes.
            Refused: the core is closing, or the predicted wait is too long.
            DeadlineExceeded: the deadline has passed already.
        """
        pixels = request.pixels
        if pixels.shape != self._image_shape or pixels.dtype != np.uint8:
            raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}, not {self._image_shape}")
        with self._changed:
            self._admit(request.deadline)
            if not self._pending():
                self._progress_at = self._clock()
            self._window.add(request)
        if announce:
            self.announce()

    def announce(self) -> None:
        """Wake an idle core for what was submitted."""
        # A thread that is not idle looks at the window before it becomes so.
        if self._idle_threads:
            with self._changed:
                self._changed.notify()

    def check_admission(self, deadline: float, *, ahead_seconds: float = 0.0) -> None:
        """Raise what `submit` would raise now for a request with this deadline.

        Args:
            deadline: absolute, of the core's clock.
            ahead_seconds: until the request could be submitted.

        Raises:
            Refused: the core is closing, or the predicted wait is too long.
            DeadlineExceeded: the deadline has passed already.
        """
        with self._changed:
            self._admit(deadline, ahead_seconds)

    def cancel(self, request: Request) -> None:
        """Forget a request whose caller left; its place is free at once."""
        with self._changed:
            request.gone = True
            self._window.remove(request)

    def withdraw(self, request: Request) -> bool:
        """Take back a request that still waits; False when it is answered, or about to be."""
        with self._changed:
            return self._window.remove(request)

    def status(self) -> EngineStatus:
        """Return how the core fares."""
        with self._changed:
            now = self._clock()
            return EngineStatus(
                queue_depth=len(self._window),
                in_flight=sum(running.size for running in self._running),
                running_batches=len(self._running),
                predicted_wait_seconds=self._predicted_wait(now),
                stalled_seconds=now - self._progress_at if self._pending() else 0.0,
                last_error=self._last_error,
            )

    def close(self, timeout_seconds: float | None = None) -> None:
        """Refuse new requests, answer the admitted ones, end the threads, close the backend.

        After the timeout everything that still waits is refused as draining; a batch that hangs
        in the backend is left behind in its daemon thread.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        until = None if timeout_seconds is None else time.monotonic() + timeout_seconds
        for thread in self._threads:
            thread.join(None if until is None else max(until - time.monotonic(), 0.0))
        if any(thread.is_alive() for thread in self._threads):
            self.refuse_waiting()
            log.warning("a batch still runs after the drain timeout; it is left behind")
            return
        for backend in self._backends.values():
            backend.close()

    def refuse_waiting(self) -> None:
        """Answer everything that waits with Draining."""
        with self._changed:
            waiting = self._window.take_all()
        answer_together((request, Draining(DRAINING)) for request in waiting)

    def _answering_on(self, backend: Backend, times: ServiceTimes) -> Answering:
        return Answering(backend, self._clock, partial(self._done, times), self._failed)

    def _admit(self, deadline: float, ahead_seconds: float = 0.0) -> None:
        if self._closing:
            raise Draining(DRAINING)
        now = self._clock()
        time_left = deadline - now
        check_deadline(time_left)
        waiting, own_seconds = len(self._window), 0.0
        if self._pending():
            own_seconds = self._schedule.own_seconds(waiting, self._running)
        check_wait(
            ahead_seconds + self._predicted_wait(now),
            budget_seconds=self._queue_budget_seconds,
            time_left_seconds=time_left,
            own_seconds=own_seconds,
            waiting=waiting,
            is_full=waiting >= self._max_waiting,
        )

    def _predicted_wait(self, now: float) -> float:
        return self._schedule.wait_seconds(len(self._window), self._running, now)

    def _pending(self) -> bool:
        return bool(len(self._window) or self._running)

    def _serve(self) -> None:
        while True:
            late, batch, running = self._next()
            answer_together(
                (request, DeadlineExceeded("the deadline passed while the image waited"))
                for request in late
            )
            if running is not None:
                self._work(batch, running)
            elif not late:
                return

    def _next(self) -> tuple[list[Request], list[Request], Running | None]:
        """Wait for something to do; all is empty when the core closes and all is done."""
        with self._changed:
            while True:
                now = self._clock()
                way = self._schedule.free_way(len(self._window), self._running)
                seconds = self._next_seconds(way)
                late = self._window.take_late(now, seconds)
                batch = self._take(way, now, seconds)
                if batch and way is not None:
                    running = Running(way, len(batch), now)
                    self._running.append(running)
                    if len(self._window):  # for another lane
                        self._changed.notify()
                    return late, batch, running
                if late:
                    return late, [], None
                if self._closing and not len(self._window):
                    self._changed.notify_all()  # who waits for a wide batch waits in vain
                    return [], [], None
                self._wait(way, now)

    def _next_seconds(self, way: Way | None) -> float:
        if way is None:
            return 0.0
        return way.times.batch_seconds(min(len(self._window), way.max_batch_size))

    def _take(self, way: Way | None, now: float, seconds: float) -> list[Request]:
        if way is None:
            return []
        return self._window.take_batch(
            now, hurry=self._closing, most=way.max_batch_size, batch_seconds=seconds
        )

    def _wait(self, way: Way | None, now: float) -> None:
        due_at = self._window.due_at() if way is not None else None
        self._idle_threads += 1
        try:
            self._changed.wait(None if due_at is None else max(due_at - now, 0.0))
        finally:
            self._idle_threads -= 1

    def _work(self, batch: list[Request], running: Running) -> None:
        try:
            self._answering[running.way].answer(batch)
        finally:
            with self._changed:
                self._running.remove(running)
                self._progress_at = self._clock()

    def _done(self, times: ServiceTimes, size: int, seconds: float) -> None:
        with self._changed:
            times.observe(size, seconds)
            self._last_error = None
            self._progress_at = self._clock()
        if self._observer is not None:
            self._observer.batch_done(size)

    def _failed(self, error: Exception) -> None:
        # A refusal is no fault of the code: where it came from in it is no news.
        trace = None if isinstance(error, ServiceError) else error
        log.error("the backend failed on a batch: %s", error, exc_info=trace)
        with self._changed:
            self._last_error = f"{type(error).__name__}: {error}"
            self._progress_at = self._clock()
        if self._observer is not None:
            self._observer.batch_failed()
