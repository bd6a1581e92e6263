"""EngineCore: whatever the backend and the callers do, every request gets one answer, its own."""

from __future__ import annotations

import threading
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from app.engine.core import EngineCore
from app.engine.timing import ServiceTimes
from app.engine.window import BatchWindow, Request
from app.errors import (
    DeadlineExceeded,
    Draining,
    InferenceFailed,
    ServiceError,
)
from app.types import Batch, Row, Rows
from tests.engine.doubles import (
    FAR_AHEAD,
    PATIENCE_SECONDS,
    SIDE,
    Caller,
    CountingObserver,
    ManualClock,
    WatchedBackend,
    hold_one,
    not_finite_for,
    nothing,
    raise_for,
    running,
    submit,
    too_few,
)

# --- batches


def test_a_lone_request_does_not_wait_for_company() -> None:
    backend = WatchedBackend()
    with running(backend, max_batch_size=64) as core:
        (caller,) = submit(core, 7)
        caller.assert_got_its_row()
    assert backend.batches == [[7]]


def test_batches_form_while_the_backend_is_busy_in_order_and_never_over_the_limit() -> None:
    backend = WatchedBackend(shut=True)
    with running(backend, max_batch_size=3) as core:
        callers = [hold_one(core, backend), *submit(core, *range(1, 9))]
        assert core.status().queue_depth == 8
        assert core.status().in_flight == 1
        assert core.status().running_batches == 1
        backend.gate.set()
        for caller in callers:
            caller.assert_got_its_row()
    assert backend.batches == [[0], [1, 2, 3], [4, 5, 6], [7, 8]]


def test_a_full_batch_leaves_before_its_wait_is_over_and_a_part_does_not() -> None:
    clock = ManualClock()
    backend = WatchedBackend()
    with running(backend, max_batch_size=3, max_wait_seconds=3600, clock=clock) as core:
        callers = [Caller(value, enqueued_at=clock.now) for value in range(4)]
        for caller in callers:
            core.submit(caller.request)
        for caller in callers[:3]:
            caller.assert_got_its_row()
        assert core.status().queue_depth == 1
        assert callers[3].answers == []
    assert backend.batches == [[0, 1, 2], [3]], "closing does not sit out the wait"
    callers[3].assert_got_its_row()


def test_two_lanes_run_two_batches_at_once() -> None:
    backend = WatchedBackend(shut=True, lanes=2)
    with running(backend, max_batch_size=1) as core:
        callers = submit(core, 1, 2, 3)
        backend.wait_for_batch()
        backend.wait_for_batch()
        assert core.status().running_batches == 2
        assert core.status().in_flight == 2
        assert core.status().queue_depth == 1
        backend.gate.set()
        for caller in callers:
            caller.assert_got_its_row()


def test_a_row_tells_how_long_it_waited_and_how_long_its_batch_ran() -> None:
    clock = ManualClock()
    backend = WatchedBackend(shut=True)

    def take_three_seconds(values: list[int], rows: Rows) -> Rows:
        clock.advance(3.0)
        return rows

    with running(backend, clock=clock) as core:
        hold_one(core, backend)
        backend.spoil = take_three_seconds
        caller = Caller(1, enqueued_at=clock.now)
        core.submit(caller.request)
        clock.advance(2.0)
        backend.gate.set()
        answer = caller.answer()
    assert isinstance(answer, Row)
    assert answer.queue_seconds == 5.0, "two waiting, three behind the first batch"
    assert answer.inference_seconds == 3.0


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((SIDE, SIDE, 4), np.uint8),
        np.zeros((SIDE + 1, SIDE, 3), np.uint8),
        np.zeros((SIDE, SIDE, 3), np.float32),
    ],
    ids=["channels", "size", "type"],
)
def test_pixels_the_backend_does_not_take_are_a_fault_of_ours(pixels: Batch) -> None:
    backend = WatchedBackend()
    with running(backend) as core, pytest.raises(ValueError, match="pixels are"):
        core.submit(Request(pixels, FAR_AHEAD, 0.0, lambda answer: None))
    assert backend.batches == []


def test_requests_that_are_announced_together_leave_in_one_batch() -> None:
    backend = WatchedBackend()
    with running(backend, max_batch_size=8) as core:
        callers = [Caller(value) for value in range(5)]
        for caller in callers:
            core.submit(caller.request, announce=False)
        assert core.status().queue_depth == 5
        assert backend.batches == [], "an idle core sleeps until it is told"
        core.announce()
        for caller in callers:
            caller.assert_got_its_row()
    assert backend.batches == [[0, 1, 2, 3, 4]]


def test_a_busy_core_takes_what_waits_announced_or_not() -> None:
    backend = WatchedBackend(shut=True)
    with running(backend) as core:
        hold_one(core, backend)
        late = Caller(1)
        core.submit(late.request, announce=False)
        backend.gate.set()
        late.assert_got_its_row()


def test_the_callers_of_one_batch_are_woken_once() -> None:
    backend = WatchedBackend(shut=True)
    woken: list[int] = []
    callers = [Caller(value) for value in (1, 2, 3)]

    def wake() -> None:
        woken.append(sum(len(caller.answers) for caller in callers))

    with running(backend) as core:
        hold_one(core, backend)
        for caller in callers:
            caller.request.wake = wake
            core.submit(caller.request)
        backend.gate.set()
        for caller in callers:
            caller.assert_got_its_row()
    assert woken == [3], "once, when all three have their answers"


# --- callers leave


def test_a_caller_gone_before_its_batch_never_reaches_the_backend() -> None:
    backend = WatchedBackend(shut=True)
    with running(backend) as core:
        plug = hold_one(core, backend)
        first, gone, last = submit(core, 1, 2, 3)
        core.cancel(gone.request)
        assert core.status().queue_depth == 2
        backend.gate.set()
        for caller in (plug, first, last):
            caller.assert_got_its_row()
    assert backend.batches == [[0], [1, 3]]
    assert gone.answers == []


def test_a_caller_gone_during_its_batch_leaves_its_neighbours_theirs() -> None:
    backend = WatchedBackend(shut=True)
    with running(backend) as core:
        plug = hold_one(core, backend)
        first, gone, last = submit(core, 1, 2, 3)

        def leave(values: list[int], rows: Rows) -> Rows:
            if 2 in values:
                core.cancel(gone.request)
            return rows

        backend.spoil = leave
        backend.gate.set()
        for caller in (plug, first, last):
            caller.assert_got_its_row()
    assert backend.batches == [[0], [1, 2, 3]]
    assert len(gone.answers) <= 1


def test_a_caller_gone_while_its_batch_fails_is_not_run_again() -> None:
    backend = WatchedBackend(shut=True)
    with running(backend) as core:
        plug = hold_one(core, backend)
        first, gone, last = submit(core, 1, 2, 3)

        def leave_and_fail(values: list[int], rows: Rows) -> Rows:
            if 2 in values:
                core.cancel(gone.request)
                raise RuntimeError
            return rows

        backend.spoil = leave_and_fail
        backend.gate.set()
        for caller in (plug, first, last):
            caller.assert_got_its_row()
    assert backend.batches == [[0], [1, 2, 3], [1], [3]]
    assert gone.answers == []


def test_a_caller_gone_after_its_batch_changes_nothing() -> None:
    backend = WatchedBackend()
    with running(backend) as core:
        (first,) = submit(core, 1)
        first.assert_got_its_row()
        core.cancel(first.request)
        (second,) = submit(core, 2)
        second.assert_got_its_row()
    first.assert_got_its_row()


# --- the end


def test_closing_refuses_new_ones_and_answers_the_admitted() -> None:
    backend = WatchedBackend(shut=True)
    with running(backend, max_batch_size=2) as core:
        callers = [hold_one(core, backend), *submit(core, 1, 2, 3)]
        closer = threading.Thread(target=core.close, args=(PATIENCE_SECONDS,))
        closer.start()
        refusal = refusal_of(core)
        assert type(refusal) is Draining
        assert refusal.retry_after_seconds > 0
        with pytest.raises(Draining):
            submit(core, 9)
        assert backend.closed == 0
        backend.gate.set()
        for caller in callers:
            caller.assert_got_its_row()
        closer.join(PATIENCE_SECONDS)
        assert not closer.is_alive()
        assert backend.closed == 1
    assert 9 not in backend.seen


def refusal_of(core: EngineCore) -> ServiceError | None:
    """Ask until the core refuses; `close` sets that before it waits for anything."""
    for _ in range(1_000_000):
        try:
            core.check_admission(FAR_AHEAD)
        except ServiceError as error:
            return error
    return None


def test_a_backend_that_hangs_does_not_keep_close_beyond_its_timeout(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = WatchedBackend(shut=True)
    with running(backend, max_batch_size=2) as core:
        hanging = hold_one(core, backend)
        waiting = submit(core, 1, 2, 3)
        core.close(0.01)
        assert all(type(caller.error()) is Draining for caller in waiting)
        assert hanging.answers == []
        assert backend.closed == 0, "a backend in use is not taken away"
        assert "left behind" in caplog.text
        backend.gate.set()
        hanging.assert_got_its_row()
    assert backend.seen == {0}
    assert all(len(caller.answers) == 1 for caller in waiting)


def test_refuse_waiting_answers_those_who_wait_and_leaves_the_running() -> None:
    backend = WatchedBackend(shut=True)
    with running(backend) as core:
        plug = hold_one(core, backend)
        waiting = submit(core, 1, 2)
        core.refuse_waiting()
        assert all(type(caller.error()) is Draining for caller in waiting)
        assert core.status().queue_depth == 0
        backend.gate.set()
        plug.assert_got_its_row()


def test_an_idle_core_closes_at_once_and_nothing_is_pending() -> None:
    backend = WatchedBackend(lanes=3)
    with running(backend) as core:
        core.close()
        status = core.status()
    assert (status.queue_depth, status.in_flight, status.running_batches) == (0, 0, 0)
    assert backend.closed >= 1


# --- liveness


def test_a_wedged_backend_is_seen_by_the_clock() -> None:
    clock = ManualClock()
    backend = WatchedBackend(shut=True)
    with running(backend, clock=clock) as core:
        clock.advance(500.0)
        assert core.status().stalled_seconds == 0.0, "idle is not stalled"
        hold_one(core, backend)
        assert core.status().stalled_seconds == 0.0, "the count starts when work comes"
        clock.advance(61.0)
        assert core.status().stalled_seconds == 61.0
        submit(core, 1)
        assert core.status().stalled_seconds == 61.0, "more work is no progress"
    clock.advance(100.0)
    assert core.status().stalled_seconds == 0.0


def test_every_batch_that_ends_is_progress_failed_ones_too() -> None:
    clock = ManualClock()
    backend = WatchedBackend(lanes=2, spoil=raise_for(1))
    backend.gate.clear()
    with running(backend, max_batch_size=1, clock=clock) as core:
        hanging = threading.Event()

        def hang_on_zero(values: list[int], rows: Rows) -> Rows:
            if values == [0]:
                assert hanging.wait(PATIENCE_SECONDS), "the hanging batch was never let go"
            return raise_for(1)(values, rows)

        backend.spoil = hang_on_zero
        backend.gate.set()
        (wedged,) = submit(core, 0)
        backend.wait_for_batch()
        clock.advance(50.0)
        submit(core, 1)[0].error()
        assert core.status().stalled_seconds == 0.0
        assert wedged.answers == []
        hanging.set()
        wedged.assert_got_its_row()


def test_the_search_for_a_culprit_is_progress() -> None:
    clock = ManualClock()
    backend = WatchedBackend(shut=True)
    stalled = []
    with running(backend, clock=clock) as core:
        hold_one(core, backend)

        def slowly(values: list[int], rows: Rows) -> Rows:
            stalled.append(core.status().stalled_seconds)
            clock.advance(50.0)
            return raise_for(3)(values, rows)

        backend.spoil = slowly
        callers = submit(core, 1, 2, 3, 4)
        backend.gate.set()
        for caller in callers:
            caller.answer()
    assert stalled == [0.0] * 6, "the first batch, all four, and their halves"


def test_an_engine_thread_survives_what_it_is_given() -> None:
    backend = WatchedBackend()
    with running(backend) as core:
        for round_, spoil in enumerate([raise_for(1), too_few, not_finite_for(1), nothing]):
            backend.spoil = spoil
            for caller in submit(core, 1, 2):
                caller.answer()
            backend.spoil = None
            (after,) = submit(core, 10 + round_)
            after.assert_got_its_row()


# --- any stream of requests


FATES = st.sampled_from(["fine", "fine", "fine", "raises", "not finite", "gone", "late"])


@settings(deadline=None, max_examples=150)
@given(
    fates=st.lists(FATES, max_size=24),
    max_batch_size=st.integers(1, 6),
    lanes=st.integers(1, 3),
)
def test_every_request_gets_exactly_one_answer_its_own(
    fates: list[str], max_batch_size: int, lanes: int
) -> None:
    of_fate = {
        fate: {value for value, one in enumerate(fates, start=lanes) if one == fate}
        for fate in ("fine", "raises", "not finite", "gone", "late")
    }

    def spoil(values: list[int], rows: Rows) -> Rows:
        rows = raise_for(*of_fate["raises"])(values, rows)
        return not_finite_for(*of_fate["not finite"])(values, rows)

    clock = ManualClock()
    backend = WatchedBackend(shut=True, lanes=lanes, spoil=spoil)
    with running(backend, max_batch_size=max_batch_size, clock=clock) as core:
        plugs = [hold_one(core, backend, value) for value in range(lanes)]
        callers = [
            Caller(value, deadline=clock.now + (1 if fate == "late" else 100))
            for value, fate in enumerate(fates, start=lanes)
        ]
        for caller in callers:
            core.submit(caller.request)
        for caller in callers:
            if caller.value in of_fate["gone"]:
                core.cancel(caller.request)
        clock.advance(1.0)
        backend.gate.set()
    for caller in callers:
        if caller.value in of_fate["gone"]:
            assert caller.answers == []
        elif caller.value in of_fate["late"]:
            assert [type(answer) for answer in caller.answers] == [DeadlineExceeded]
        elif caller.value in of_fate["fine"]:
            caller.assert_got_its_row()
        else:
            assert [type(answer) for answer in caller.answers] == [InferenceFailed]
    for plug in plugs:
        plug.assert_got_its_row()
    assert backend.seen.isdisjoint(of_fate["gone"] | of_fate["late"])
    assert all(len(batch) <= max_batch_size for batch in backend.batches)
    if lanes == 1:
        first_seen = list(dict.fromkeys(value for batch in backend.batches for value in batch))
        assert first_seen == sorted(first_seen)


@settings(deadline=None, max_examples=40)
@given(
    streams=st.lists(st.lists(st.integers(0, 255), max_size=12), min_size=2, max_size=5),
    max_batch_size=st.integers(1, 8),
    lanes=st.integers(1, 3),
)
def test_callers_in_many_threads_each_get_their_own(
    streams: list[list[int]], max_batch_size: int, lanes: int
) -> None:
    backend = WatchedBackend(lanes=lanes)
    together = threading.Barrier(len(streams), timeout=PATIENCE_SECONDS)
    callers: list[list[Caller]] = [[] for _ in streams]

    def send(index: int, core: EngineCore) -> None:
        together.wait()
        callers[index] = submit(core, *streams[index])

    with running(backend, max_batch_size=max_batch_size) as core:
        senders = [
            threading.Thread(target=send, args=(index, core)) for index in range(len(streams))
        ]
        for sender in senders:
            sender.start()
        for sender in senders:
            sender.join(PATIENCE_SECONDS)
            assert not sender.is_alive()
    assert [[caller.value for caller in own] for own in callers] == streams
    for own in callers:
        for caller in own:
            caller.assert_got_its_row()
    assert all(len(batch) <= max_batch_size for batch in backend.batches)
    assert sorted(value for batch in backend.batches for value in batch) == sorted(
        value for stream in streams for value in stream
    )


def test_the_default_clock_is_the_one_deadlines_are_given_in() -> None:
    backend = WatchedBackend()
    core = EngineCore(backend, BatchWindow(1), ServiceTimes(), 1.0)
    try:
        with pytest.raises(DeadlineExceeded):
            core.check_admission(time.monotonic() - 1)
        core.check_admission(time.monotonic() + 60)
    finally:
        core.close(PATIENCE_SECONDS)


def test_a_fault_while_answering_costs_neither_the_thread_nor_an_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class FaultyObserver(CountingObserver):
        def batch_done(self, size: int) -> None:
            super().batch_done(size)
            if len(self.sizes) == 1:
                raise RuntimeError("the observer is broken")

    with running(WatchedBackend(), observer=FaultyObserver()) as core:
        (first,) = submit(core, 1)
        assert isinstance(first.error(), InferenceFailed)
        (second,) = submit(core, 2)
        second.assert_got_its_row()
        assert core.status().stalled_seconds == 0
    assert "the observer is broken" in caplog.text
