"""EngineCore: whom it admits, whom it refuses, and who leaves first when too many wait."""

from __future__ import annotations

import pytest

from app.engine import core as core_module
from app.engine.timing import ServiceTimes
from app.errors import (
    DeadlineExceeded,
    Overloaded,
)
from app.types import Rows
from tests.engine.doubles import (
    FAR_AHEAD,
    Caller,
    ManualClock,
    WatchedBackend,
    hold_one,
    pixels_of,
    running,
    submit,
)


def test_a_request_whose_deadline_passes_while_it_waits_never_reaches_the_backend() -> None:
    clock = ManualClock()
    backend = WatchedBackend(shut=True)
    with running(backend, clock=clock) as core:
        plug = hold_one(core, backend)
        (late,) = submit(core, 1, deadline=clock.now + 1)
        (early,) = submit(core, 2, deadline=clock.now + 100)
        clock.advance(1.0)
        backend.gate.set()
        assert type(late.error()) is DeadlineExceeded
        plug.assert_got_its_row()
        early.assert_got_its_row()
    assert backend.batches == [[0], [2]]
    assert len(late.answers) == 1


def test_a_deadline_that_has_passed_already_is_refused_at_once() -> None:
    clock = ManualClock()
    backend = WatchedBackend()
    with running(backend, clock=clock) as core:
        with pytest.raises(DeadlineExceeded):
            submit(core, 1, deadline=clock.now)
        with pytest.raises(DeadlineExceeded):
            core.check_admission(clock.now - 1)
    assert backend.batches == []


def test_the_queue_is_bounded_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "QUEUE_BYTES", 3 * pixels_of(0).nbytes)
    backend = WatchedBackend(shut=True)
    with running(backend, max_batch_size=2) as core:
        callers = [hold_one(core, backend), *submit(core, 1, 2, 3)]
        with pytest.raises(Overloaded):
            submit(core, 4)
        core.cancel(callers[1].request)
        callers += submit(core, 5)
        backend.gate.set()
        for caller in callers[:1] + callers[2:]:
            caller.assert_got_its_row()
    assert 4 not in backend.seen


def test_a_whole_batch_may_wait_however_large_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_module, "QUEUE_BYTES", 1)
    backend = WatchedBackend(shut=True)
    with running(backend, max_batch_size=2) as core:
        hold_one(core, backend)
        submit(core, 1, 2)
        with pytest.raises(Overloaded):
            core.check_admission(FAR_AHEAD)


def test_a_predicted_wait_above_the_queue_budget_is_refused_with_when_to_come_back() -> None:
    backend = WatchedBackend(shut=True)
    times = ServiceTimes({1: 4.0})
    with running(backend, max_batch_size=1, times=times, queue_budget_seconds=5.0) as core:
        hold_one(core, backend)
        assert core.status().predicted_wait_seconds == 4.0
        core.check_admission(FAR_AHEAD)
        submit(core, 1)
        assert core.status().predicted_wait_seconds == 8.0
        with pytest.raises(Overloaded) as check:
            core.check_admission(FAR_AHEAD)
        with pytest.raises(Overloaded) as refused:
            submit(core, 2)
        for refusal in (check, refused):  # 3 s too long: by lot, not all at the same moment
            assert refusal.value.retry_after_seconds in (3, 4, 5, 6)
        assert core.status().queue_depth == 1
    assert backend.seen == {0, 1}


def test_retry_after_is_never_less_than_a_second() -> None:
    backend = WatchedBackend(shut=True)
    times = ServiceTimes({1: 4.0})
    with running(backend, times=times, queue_budget_seconds=3.9) as core:
        hold_one(core, backend)
        with pytest.raises(Overloaded) as refused:
            core.check_admission(FAR_AHEAD)
    assert refused.value.retry_after_seconds in (1, 2)


def test_an_answer_predicted_after_the_callers_deadline_is_refused_at_once() -> None:
    clock = ManualClock()
    backend = WatchedBackend(shut=True)
    with running(backend, times=ServiceTimes({1: 4.0}), clock=clock) as core:
        hold_one(core, backend)
        core.check_admission(clock.now + 8.0)  # four until its batch starts, four for its batch
        with pytest.raises(Overloaded):
            core.check_admission(clock.now + 7.9)


def test_of_a_running_batch_only_the_rest_is_waited_for() -> None:
    clock = ManualClock()
    backend = WatchedBackend(shut=True)
    with running(backend, times=ServiceTimes({1: 4.0}), clock=clock) as core:
        hold_one(core, backend)
        clock.advance(3.0)
        assert core.status().predicted_wait_seconds == pytest.approx(1.0)
        core.check_admission(clock.now + 5.1)
        with pytest.raises(Overloaded):
            core.check_admission(clock.now + 4.9)


def test_a_backend_that_hangs_is_refused_more_and_more_before_a_batch_has_ended() -> None:
    clock = ManualClock()
    backend = WatchedBackend(shut=True)
    times = ServiceTimes({1: 0.1})
    with running(backend, times=times, queue_budget_seconds=5.0, clock=clock) as core:
        hold_one(core, backend)
        clock.advance(1.0)
        core.check_admission(FAR_AHEAD)
        clock.advance(10.0)
        with pytest.raises(Overloaded):
            core.check_admission(FAR_AHEAD)


def test_the_predicted_wait_follows_a_backend_that_becomes_three_times_slower_and_back() -> None:
    clock = ManualClock()
    backend = WatchedBackend()
    took = 1.0

    def take_its_time(values: list[int], rows: Rows) -> Rows:
        clock.advance(took)
        return rows

    def predicted() -> float:
        """Return what an image would wait behind one that has just begun."""
        backend.gate.clear()
        plug = hold_one(core, backend)
        wait = core.status().predicted_wait_seconds
        backend.gate.set()
        plug.assert_got_its_row()
        return wait

    backend.spoil = take_its_time
    with running(backend, times=ServiceTimes({1: 1.0}), clock=clock) as core:
        for took in (3.0, 1.0):
            for value in range(12):
                submit(core, value)[0].assert_got_its_row()
                backend.wait_for_batch()
            assert predicted() == pytest.approx(took, rel=0.15)


def test_an_estimate_over_the_budget_does_not_outlive_the_slowness_that_made_it() -> None:
    clock = ManualClock()
    backend = WatchedBackend()
    took = 3.0

    def take_its_time(values: list[int], rows: Rows) -> Rows:
        clock.advance(took)
        return rows

    backend.spoil = take_its_time
    times = ServiceTimes({1: 1.0})
    with running(backend, times=times, queue_budget_seconds=2.0, clock=clock) as core:
        for took in (3.0, 1.0):
            for value in range(12):  # each finds an idle core, which refuses nobody
                submit(core, value)[0].assert_got_its_row()
                backend.wait_for_batch()
            backend.gate.clear()
            plug = hold_one(core, backend)
            if took > 2.0:
                with pytest.raises(Overloaded):
                    core.check_admission(FAR_AHEAD)
            else:
                core.check_admission(FAR_AHEAD)
            backend.gate.set()
            plug.assert_got_its_row()


def test_the_wait_for_decoding_counts_towards_the_budget_and_the_deadline() -> None:
    clock = ManualClock()
    backend = WatchedBackend(shut=True)
    times = ServiceTimes({1: 4.0})
    with running(backend, times=times, queue_budget_seconds=5.0, clock=clock) as core:
        with pytest.raises(Overloaded):  # an idle engine is no help to who waits for decoding
            core.check_admission(FAR_AHEAD, ahead_seconds=5.1)
        core.check_admission(FAR_AHEAD, ahead_seconds=4.9)
        hold_one(core, backend)
        core.check_admission(FAR_AHEAD, ahead_seconds=1.0)
        with pytest.raises(Overloaded):
            core.check_admission(FAR_AHEAD, ahead_seconds=1.1)
        with pytest.raises(Overloaded):
            core.check_admission(clock.now + 8.5, ahead_seconds=1.0)


def test_after_a_slow_batch_the_newest_that_can_be_met_leave_first_and_the_rest_at_once() -> None:
    clock = ManualClock()
    backend = WatchedBackend(shut=True)
    times = ServiceTimes({1: 1.0, 2: 1.0})
    with running(
        backend, max_batch_size=2, times=times, queue_budget_seconds=3.0, clock=clock
    ) as core:

        def slow(values: list[int], rows: Rows) -> Rows:
            if 0 in values:
                clock.advance(20.0)
            return rows

        backend.spoil = slow
        plug = hold_one(core, backend)
        callers = {
            value: Caller(value, deadline=clock.now + seconds, enqueued_at=clock.now)
            for value, seconds in ((1, 100.0), (2, 20.5), (3, 100.0), (4, 100.0))
        }
        for caller in callers.values():
            core.submit(caller.request)
        backend.gate.set()
        plug.assert_got_its_row()
        assert type(callers[2].error()) is DeadlineExceeded
        for value in (1, 3, 4):
            callers[value].assert_got_its_row()
    assert backend.batches == [[0], [4, 3], [1]]


def test_one_slow_batch_does_not_shut_an_idle_engine_for_good() -> None:
    clock = ManualClock()
    times = ServiceTimes()
    times.observe(1, 300.0)
    with running(WatchedBackend(), times=times, queue_budget_seconds=5.0, clock=clock) as core:
        caller = Caller(2, deadline=clock.now + 30.0, enqueued_at=clock.now)
        core.submit(caller.request)
        caller.assert_got_its_row()
    assert times.batch_seconds(1) < 300.0, "the next estimate has learned from it"
