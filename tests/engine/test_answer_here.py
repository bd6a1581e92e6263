"""A decoding thread that answers its own image in an idle core: when, and what must not break."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from app.engine.lanes import HAND_OVER_SECONDS
from app.engine.local import LocalEngine
from app.engine.timing import ServiceTimes
from app.errors import DeadlineExceeded, Draining, InferenceFailed
from app.types import Batch, Rows
from tests.engine.doubles import (
    FAR_AHEAD,
    PATIENCE_SECONDS,
    Caller,
    WatchedBackend,
    assert_row_of,
    pixels_of,
    raise_for,
    running,
    submit,
)

BRIEF = HAND_OVER_SECONDS / 2


def times(seconds: float = BRIEF) -> ServiceTimes:
    return ServiceTimes({1: seconds, 4: 4 * seconds})


class OneThread(WatchedBackend):
    """A backend that says how many threads a run takes, and knows which thread it ran on."""

    def __init__(self, threads: int | None = 1, *, shut: bool = False) -> None:
        super().__init__(shut=shut)
        self.info = dataclasses.replace(self.info, threads=threads)
        self.ran_on: list[int] = []
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()

    def run(self, batch: Batch, deadline: float = FAR_AHEAD) -> Rows:
        with self._lock:
            self.ran_on.append(threading.get_ident())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return super().run(batch, deadline)
        finally:
            with self._lock:
                self.at_once -= 1


def test_an_idle_core_answers_on_the_calling_thread() -> None:
    backend = OneThread()
    with running(backend, times=times(), clock=time.monotonic) as core:
        row = LocalEngine(core).infer_here(pixels_of(7), deadline=time.monotonic() + 60)
    assert row is not None
    assert_row_of(7, row)
    assert backend.ran_on == [threading.get_ident()]


@pytest.mark.parametrize(
    ("threads", "known"),
    [
        (1, times(2 * HAND_OVER_SECONDS)),
        (1, ServiceTimes()),
        (2, times()),
        (None, times()),
    ],
    ids=["takes longer", "was never timed", "takes more threads", "is not on this CPU"],
)
def test_what_is_not_brief_is_left_to_the_engine(threads: int | None, known: ServiceTimes) -> None:
    backend = OneThread(threads)
    with running(backend, times=known) as core:
        caller = Caller(1)
        assert not core.answer_here(caller.request)
        assert caller.answers == []
        assert core.status().queue_depth == 0
    assert backend.batches == []


def test_a_core_that_has_something_to_do_forms_batches_instead() -> None:
    backend = OneThread(shut=True)
    with running(backend, times=times()) as core:
        first = submit(core, 1)
        backend.wait_for_batch()
        assert not core.answer_here(Caller(2).request)
        rest = submit(core, 2, 3)
        backend.gate.set()
        for caller in (*first, *rest):
            caller.assert_got_its_row()
    assert backend.batches == [[1], [2, 3]]


def test_what_comes_meanwhile_waits_and_leaves_in_one_batch() -> None:
    backend = OneThread(shut=True)
    with running(backend, times=times()) as core, ThreadPoolExecutor(1) as pool:
        here = Caller(1)
        answered = pool.submit(core.answer_here, here.request)
        backend.wait_for_batch()
        others = submit(core, 2, 3, 4)
        assert core.status().queue_depth == 3
        backend.gate.set()
        assert answered.result(PATIENCE_SECONDS)
        for caller in (here, *others):
            caller.assert_got_its_row()
    assert backend.batches == [[1], [2, 3, 4]]
    assert backend.most_at_once == 1


def test_a_thread_that_answers_here_is_seen_to_be_stuck() -> None:
    backend = OneThread(shut=True)
    with (
        running(backend, times=times(), clock=time.monotonic) as core,
        ThreadPoolExecutor(1) as pool,
    ):
        answered = pool.submit(core.answer_here, Caller(1, deadline=time.monotonic() + 60).request)
        backend.wait_for_batch()
        assert core.status().in_flight == 1
        assert core.status().stalled_seconds > 0
        backend.gate.set()
        assert answered.result(PATIENCE_SECONDS)
        assert core.status().stalled_seconds == 0


def test_an_image_that_the_backend_fails_on_fails_alone() -> None:
    backend = OneThread()
    backend.spoil = raise_for(1)
    with running(backend, times=times(), clock=time.monotonic) as core:
        engine, later = LocalEngine(core), time.monotonic() + 60
        with pytest.raises(InferenceFailed):
            engine.infer_here(pixels_of(1), deadline=later)
        row = engine.infer_here(pixels_of(2), deadline=later)
        assert row is not None
        assert_row_of(2, row)


def test_a_deadline_that_has_passed_is_refused() -> None:
    backend = OneThread()
    with (
        running(backend, times=times(), clock=time.monotonic) as core,
        pytest.raises(DeadlineExceeded),
    ):
        LocalEngine(core).infer_here(pixels_of(1), deadline=time.monotonic() - 1)
    assert backend.batches == []


def test_closing_waits_for_it_before_the_backend_is_closed_and_refuses_others() -> None:
    backend = OneThread(shut=True)
    with running(backend, times=times()) as core, ThreadPoolExecutor(2) as pool:
        here = Caller(1)
        answered = pool.submit(core.answer_here, here.request)
        backend.wait_for_batch()
        closing = pool.submit(core.close, PATIENCE_SECONDS)
        for thread in core._threads:
            thread.join(PATIENCE_SECONDS)  # close has come as far as what runs here
        assert backend.closed == 0
        backend.gate.set()
        assert answered.result(PATIENCE_SECONDS)
        closing.result(PATIENCE_SECONDS)
        assert backend.closed == 1
        here.assert_got_its_row()
        with pytest.raises(Draining):
            core.answer_here(Caller(2).request)


def test_many_threads_each_get_their_own_and_no_two_batches_run_at_once() -> None:
    backend = OneThread()

    def ask(first: int) -> None:
        for value in range(first, first + 30):
            caller = Caller(value)
            if not core.answer_here(caller.request):
                core.submit(caller.request)
            caller.assert_got_its_row()

    with running(backend, times=times()) as core, ThreadPoolExecutor(8) as pool:
        for asked in [pool.submit(ask, 30 * index) for index in range(8)]:
            asked.result(PATIENCE_SECONDS)
    assert backend.most_at_once == 1
    assert sorted(value for batch in backend.batches for value in batch) == list(range(240))
