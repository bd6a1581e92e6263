"""What the engine is tested with: callers that remember, backends that can be held and spoilt."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from app.backends.fake import FakeBackend
from app.engine.core import BatchObserver, EngineCore
from app.engine.lanes import NarrowLanes
from app.engine.timing import ServiceTimes
from app.engine.window import BatchWindow, Request
from app.errors import ServiceError
from app.types import Batch, Pixels, Row, Rows

SIDE = 4
PATIENCE_SECONDS = 10.0
FAR_AHEAD = 1e12

T = TypeVar("T")

Spoil = Callable[[list[int], Rows], Rows]
"""Takes a batch's values and its right answers; returns what the backend answers, or raises."""


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a scenario in a loop of its own; what goes wrong in the loop's callbacks counts."""
    faults: list[dict[str, Any]] = []

    async def within_patience() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
        async with asyncio.timeout(3 * PATIENCE_SECONDS):
            return await scenario

    result = asyncio.run(within_patience())
    assert faults == []
    return result


def pixels_of(value: int) -> Pixels:
    """Return an image that is known by its value, 0..255."""
    return np.full((SIDE, SIDE, 3), value, np.uint8)


class ManualClock:
    """A clock that moves when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Caller:
    """One caller with its request; remembers every answer it gets."""

    def __init__(
        self, value: int, *, deadline: float = FAR_AHEAD, enqueued_at: float = 0.0
    ) -> None:
        self.value = value
        self.answers: list[Row | ServiceError] = []
        self._answered = threading.Event()
        self.request = Request(pixels_of(value), deadline, enqueued_at, self._take)

    def _take(self, answer: Row | ServiceError) -> None:
        self.answers.append(answer)
        self._answered.set()

    def answer(self) -> Row | ServiceError:
        """Wait for the first answer."""
        assert self._answered.wait(PATIENCE_SECONDS), f"no answer to the caller of {self.value}"
        return self.answers[0]

    def error(self) -> ServiceError:
        """Wait for an answer that is an error."""
        answer = self.answer()
        assert isinstance(answer, ServiceError), f"{self.value} got a row, not an error"
        return answer

    def assert_got_its_row(self) -> None:
        answer = self.answer()
        assert isinstance(answer, Row), f"{self.value} got {answer!r}, not a row"
        assert_row_of(self.value, answer)
        assert len(self.answers) == 1, f"{self.value} got {len(self.answers)} answers"


def assert_row_of(value: int, row: Row) -> None:
    expected = FakeBackend(SIDE).run(pixels_of(value)[np.newaxis])
    assert row.logits.tobytes() == expected.logits[0].tobytes(), f"{value} got another's logits"
    assert row.embedding.tobytes() == expected.embedding[0].tobytes()


class WatchedBackend(FakeBackend):
    """The fake backend: remembers its batches, waits at a gate, and can be made to fail.

    Args:
        shut: whether batches wait until `gate` is set.
        spoil: makes the answer wrong, or raises.
        lanes: batches in flight.
    """

    def __init__(self, *, shut: bool = False, spoil: Spoil | None = None, lanes: int = 1) -> None:
        self.gate = threading.Event()
        super().__init__(SIDE, gate=self.gate)
        self.info = dataclasses.replace(self.info, batches_in_flight=lanes)
        if not shut:
            self.gate.set()
        self.spoil = spoil
        self.batches: list[list[int]] = []
        self.closed = 0
        self._entered = threading.Semaphore(0)

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        values = [int(image[0, 0, 0]) for image in batch]
        self.batches.append(values)
        self._entered.release()
        rows = super().run(batch)
        return rows if self.spoil is None else self.spoil(values, rows)

    def close(self) -> None:
        self.closed += 1

    @property
    def seen(self) -> set[int]:
        return {value for batch in self.batches for value in batch}

    def wait_for_batch(self) -> None:
        """Wait until one more batch is inside the backend."""
        assert self._entered.acquire(timeout=PATIENCE_SECONDS), "no batch reached the backend"


class CountingObserver:
    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.failures = 0

    def batch_done(self, size: int) -> None:
        self.sizes.append(size)

    def batch_failed(self) -> None:
        self.failures += 1


@contextmanager
def running(
    backend: WatchedBackend,
    *,
    max_batch_size: int = 4,
    max_wait_seconds: float = 0.0,
    times: ServiceTimes | None = None,
    queue_budget_seconds: float = FAR_AHEAD,
    observer: BatchObserver | None = None,
    clock: Callable[[], float] | None = None,
    narrow: NarrowLanes | None = None,
) -> Iterator[EngineCore]:
    """A core at work; closed at the end, when its threads must be gone."""
    before = set(threading.enumerate())
    core = EngineCore(
        backend,
        BatchWindow(max_batch_size, max_wait_seconds, budget_seconds=queue_budget_seconds),
        times or ServiceTimes(),
        queue_budget_seconds,
        observer,
        clock or ManualClock(),
        narrow,
    )
    own = set(threading.enumerate()) - before
    assert len(own) == (narrow.lanes if narrow else backend.info.batches_in_flight)
    try:
        yield core
    finally:
        backend.gate.set()
        if narrow is not None and isinstance(narrow.backend, WatchedBackend):
            narrow.backend.gate.set()
        core.close(PATIENCE_SECONDS)
    for thread in own:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), f"{thread.name} outlived its core"


def submit(core: EngineCore, *values: int, deadline: float = FAR_AHEAD) -> list[Caller]:
    """Submit one caller a value."""
    callers = [Caller(value, deadline=deadline) for value in values]
    for caller in callers:
        core.submit(caller.request)
    return callers


def hold_one(core: EngineCore, backend: WatchedBackend, value: int = 0) -> Caller:
    """Submit one request and wait until it keeps the backend busy."""
    (plug,) = submit(core, value)
    backend.wait_for_batch()
    return plug


def raise_for(*culprits: int, error: type[Exception] = RuntimeError) -> Spoil:
    """A backend that fails on every batch with one of these images in it."""

    def spoil(values: list[int], rows: Rows) -> Rows:
        if set(values) & set(culprits):
            raise error(f"cannot run {values}")
        return rows

    return spoil


def not_finite_for(*culprits: int, wrong: float = float("nan"), which: str = "logits") -> Spoil:
    """A backend whose rows for these images hold one value that is not finite."""

    def spoil(values: list[int], rows: Rows) -> Rows:
        for index, value in enumerate(values):
            if value in culprits:
                getattr(rows, which)[index, -1] = wrong
        return rows

    return spoil


def too_few(values: list[int], rows: Rows) -> Rows:
    """A backend that answers a batch with a 2 in it with a row less."""
    return Rows(rows.logits[:-1], rows.embedding[:-1]) if 2 in values else rows


def nothing(values: list[int], rows: Rows) -> Rows:
    """A backend that answers a batch with a 2 in it with None."""
    return None if 2 in values else rows  # type: ignore[return-value]
