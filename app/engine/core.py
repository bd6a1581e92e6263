"""EngineCore: a window, a backend, a thread per batch in flight; requests in, replies out.

    submit --> BatchWindow --> thread --> backend.run --> one reply a request
                   |                          |
                late, gone              failed: halves are run again, until the
             leave here unseen          one image that breaks them stands alone

No asyncio here: the same core serves a process of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from app.backends.base import Backend
from app.engine.base import EngineStatus
from app.engine.timing import ServiceTimes
from app.engine.window import BatchWindow, Request
from app.errors import (
    DRAINING,
    DeadlineExceeded,
    Draining,
    InferenceFailed,
    Overloaded,
    ServiceError,
)
from app.types import Row, Rows

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
    """

    def __init__(
        self,
        backend: Backend,
        window: BatchWindow,
        times: ServiceTimes,
        queue_budget_seconds: float,
        observer: BatchObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._window = window
        self._times = times
        self._queue_budget_seconds = queue_budget_seconds
        self._observer = observer
        self._clock = clock
        info = backend.info
        self._image_shape = (info.input_size, info.input_size, 3)
        self._max_waiting = max(QUEUE_BYTES // (3 * info.input_size**2), window.max_batch_size)
        self._lanes = info.batches_in_flight
        self._changed = threading.Condition()  # guards everything below
        self._closing = False
        self._in_flight = 0
        self._running_batches = 0
        self._progress_at = clock()
        self._last_error: str | None = None
        self._threads = [
            threading.Thread(target=self._serve, name=f"engine-{lane}", daemon=True)
            for lane in range(self._lanes)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, request: Request) -> None:
        """Let a request wait for its batch; returns at once.

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
            return EngineStatus(
                queue_depth=len(self._window),
                in_flight=self._in_flight,
                running_batches=self._running_batches,
                predicted_wait_seconds=self._predicted_wait(),
                stalled_seconds=self._clock() - self._progress_at if self._pending() else 0.0,
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
        self._backend.close()

    def refuse_waiting(self) -> None:
        """Answer everything that waits with Draining."""
        with self._changed:
            waiting = self._window.take_all()
        for request in waiting:
            request.answer(Draining(DRAINING))

    def _admit(self, deadline: float, ahead_seconds: float = 0.0) -> None:
        if self._closing:
            raise Draining(DRAINING)
        time_left = deadline - self._clock()
        if time_left <= 0:
            raise DeadlineExceeded("the deadline passed before the image reached the queue")
        wait = ahead_seconds + self._predicted_wait()
        full = len(self._window) >= self._max_waiting
        too_long = (
            wait > self._queue_budget_seconds or wait + self._times.batch_seconds(1) > time_left
        )
        # An idle engine admits everybody: after one slow batch nothing else could teach it that
        # the backend is fast again.
        if full or (too_long and self._pending()):
            excess = wait - min(self._queue_budget_seconds, time_left)
            raise Overloaded(
                f"{len(self._window)} images wait already, about {wait:.1f} s of work; "
                "send the request again later",
                retry_after_seconds=max(excess, 1.0),
            )

    def _predicted_wait(self) -> float:
        return self._times.wait_seconds(
            len(self._window), self._in_flight, self._window.max_batch_size, self._lanes
        )

    def _pending(self) -> bool:
        return bool(len(self._window) or self._in_flight)

    def _serve(self) -> None:
        while True:
            late, batch = self._next()
            for request in late:
                request.answer(DeadlineExceeded("the deadline passed while the image waited"))
            if batch:
                self._work(batch)
            elif not late:
                return

    def _next(self) -> tuple[list[Request], list[Request]]:
        """Wait for something to do; both lists are empty when the core closes and all is done."""
        with self._changed:
            while True:
                now = self._clock()
                late = self._window.take_late(now)
                batch = self._window.take_batch(now, hurry=self._closing)
                if late or batch:
                    self._in_flight += len(batch)
                    self._running_batches += bool(batch)
                    return late, batch
                if self._closing and not len(self._window):
                    return [], []
                due_at = self._window.due_at()
                self._changed.wait(None if due_at is None else max(due_at - now, 0.0))

    def _work(self, batch: list[Request]) -> None:
        try:
            self._answer(batch)
        except Exception:  # a fault of ours: it must cost neither the thread nor an answer
            log.exception("answering a batch failed")
            for request in batch:
                if not request.gone:
                    request.answer(InferenceFailed("the model failed on this image"))
        finally:
            with self._changed:
                self._in_flight -= len(batch)
                self._running_batches -= 1
                self._progress_at = self._clock()

    def _answer(self, requests: list[Request]) -> None:
        """Run a batch and answer it; what fails in company is run again in halves."""
        requests = [request for request in requests if not request.gone]
        if not requests:
            return
        started_at = self._clock()
        try:
            rows = self._run(requests)
        except ServiceError as error:  # the backend speaks for itself, to all
            self._failed(error)
            for request in requests:
                request.answer(error)
            return
        except Exception as error:
            self._failed(error)
            unanswered = requests
        else:
            seconds = self._clock() - started_at
            self._done(len(requests), seconds)
            unanswered = self._reply(requests, rows, started_at, seconds)
        if len(requests) == 1:
            for request in unanswered:
                request.answer(InferenceFailed("the model failed on this image"))
        elif unanswered:
            middle = (len(unanswered) + 1) // 2
            self._answer(unanswered[:middle])
            self._answer(unanswered[middle:])

    def _run(self, requests: list[Request]) -> Rows:
        # Of the latest: until then somebody waits for an answer of this batch.
        deadline = max(request.deadline for request in requests)
        rows = self._backend.run(np.stack([request.pixels for request in requests]), deadline)
        info = self._backend.info
        widths = {"logits": info.classes, "embedding": info.embedding_dim}
        for name, width in widths.items():
            array, expected = getattr(rows, name), (len(requests), width)
            if array.shape != expected or array.dtype != np.float32:
                raise RuntimeError(
                    f"the backend answered {name} {array.dtype} {array.shape}, "
                    f"not float32 {expected}"
                )
        return rows

    def _reply(
        self, requests: list[Request], rows: Rows, started_at: float, seconds: float
    ) -> list[Request]:
        """Give each request its row; return those whose row is no use."""
        finite = np.all(np.isfinite(rows.logits), 1) & np.all(np.isfinite(rows.embedding), 1)
        for index, request in enumerate(requests):
            if finite[index]:
                queued = started_at - request.enqueued_at
                request.answer(Row(rows.logits[index], rows.embedding[index], queued, seconds))
        unanswered = [request for request, ok in zip(requests, finite, strict=True) if not ok]
        if unanswered:
            self._failed(ArithmeticError(f"{len(unanswered)} rows hold values that are not finite"))
        return unanswered

    def _done(self, size: int, seconds: float) -> None:
        with self._changed:
            self._times.observe(size, seconds)
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
