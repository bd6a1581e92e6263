"""EngineCore: whatever the backend and the callers do, every request gets one answer, its own."""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import dataclass, replace
from itertools import islice

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from app.engine import core as core_module
from app.engine.core import EngineCore
from app.engine.lanes import NarrowLanes
from app.engine.timing import ServiceTimes
from app.engine.window import BatchWindow, Request
from app.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    Draining,
    InferenceFailed,
    Overloaded,
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
    Spoil,
    WatchedBackend,
    not_finite_for,
    pixels_of,
    raise_for,
    running,
    submit,
)


def hold_one(core: EngineCore, backend: WatchedBackend, value: int = 0) -> Caller:
    """Submit one request and wait until it keeps the backend busy."""
    (plug,) = submit(core, value)
    backend.wait_for_batch()
    return plug


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


# --- lanes


@dataclass
class TwoWays:
    """A wide backend, lanes of another, and how many of their batches ran at the same time."""

    wide: WatchedBackend
    narrow: WatchedBackend
    together: list[tuple[int, int]]


def two_ways(*, shut: bool = True) -> TwoWays:
    inside = {"wide": 0, "narrow": 0}
    lock = threading.Lock()
    found = TwoWays(WatchedBackend(shut=shut), WatchedBackend(shut=shut), [])

    def counted(name: str, backend: WatchedBackend) -> None:
        plain = backend.run

        def run(batch: Batch, deadline: float = math.inf) -> Rows:
            with lock:
                inside[name] += 1
                found.together.append((inside["wide"], inside["narrow"]))
            try:
                return plain(batch, deadline)
            finally:
                with lock:
                    inside[name] -= 1

        backend.run = run  # type: ignore[method-assign]

    counted("wide", found.wide)
    counted("narrow", found.narrow)
    return found


def lanes_of(
    ways: TwoWays, lanes: int = 2, *, wide_up_to: int = 1, max_batch_size: int = 1
) -> NarrowLanes:
    times = ServiceTimes({1: 2.0, 2: 4.0})
    return NarrowLanes(ways.narrow, times, lanes, max_batch_size, wide_up_to)


def test_a_lone_image_in_an_idle_engine_goes_wide() -> None:
    ways = two_ways(shut=False)
    with running(ways.wide, narrow=lanes_of(ways)) as core:
        for value in (1, 2, 3):
            submit(core, value)[0].assert_got_its_row()
    assert ways.wide.batches == [[1], [2], [3]]
    assert ways.narrow.batches == []


def test_what_waits_behind_a_wide_batch_goes_into_the_lanes_side_by_side() -> None:
    ways = two_ways()
    with running(ways.wide, narrow=lanes_of(ways)) as core:
        plug = hold_one(core, ways.wide)
        callers = submit(core, 1, 2, 3)
        assert core.status().queue_depth == 3, "no lane runs beside a wide batch"
        ways.wide.gate.set()
        ways.narrow.wait_for_batch()
        ways.narrow.wait_for_batch()
        assert core.status().running_batches == 2
        assert core.status().queue_depth == 1
        ways.narrow.gate.set()
        for caller in (plug, *callers):
            caller.assert_got_its_row()
    assert ways.wide.batches == [[0]]
    assert sorted(ways.narrow.batches) == [[1], [2], [3]]


def test_an_image_that_finds_a_lane_free_takes_it_and_no_wide_batch_starts_beside_it() -> None:
    ways = two_ways()
    ways.wide.gate.set()
    with running(ways.wide, narrow=lanes_of(ways, wide_up_to=0)) as core:
        first = submit(core, 1)[0]
        ways.narrow.wait_for_batch()
        second = submit(core, 2)[0]
        ways.narrow.wait_for_batch()
        ways.narrow.gate.set()
        first.assert_got_its_row()
        second.assert_got_its_row()
    assert ways.wide.batches == []


def test_as_many_as_a_wide_batch_answers_sooner_leave_in_one() -> None:
    ways = two_ways(shut=False)
    with running(ways.wide, narrow=lanes_of(ways, wide_up_to=3)) as core:
        callers = [Caller(value) for value in (1, 2, 3)]
        for caller in callers:
            core.submit(caller.request, announce=False)
        core.announce()
        for caller in callers:
            caller.assert_got_its_row()
    assert ways.wide.batches == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        (0, 4.0),  # alone behind the wide batch: the next wide one
        (1, 4.0),  # both lanes are free when it ends
        (2, 6.0),  # two in the lanes first, two seconds each
        (4, 8.0),
    ],
)
def test_the_wait_is_predicted_over_the_wide_batch_and_the_lanes(
    waiting: int, expected: float
) -> None:
    ways = two_ways()
    times = ServiceTimes({1: 4.0})
    with running(ways.wide, times=times, narrow=lanes_of(ways)) as core:
        hold_one(core, ways.wide)
        submit(core, *range(1, waiting + 1))
        assert core.status().predicted_wait_seconds == expected


def test_both_backends_of_a_core_with_lanes_are_closed_and_a_shared_one_once() -> None:
    ways = two_ways(shut=False)
    with running(ways.wide, narrow=lanes_of(ways)) as core:
        core.close(PATIENCE_SECONDS)
        assert (ways.wide.closed, ways.narrow.closed) == (1, 1)
    alone = two_ways(shut=False)
    shared = NarrowLanes(alone.wide, ServiceTimes({1: 2.0}), 2, 1, 0)
    with running(alone.wide, narrow=shared) as core:
        submit(core, 1)[0].assert_got_its_row()
        core.close(PATIENCE_SECONDS)
        assert alone.wide.closed == 1


@settings(deadline=None, max_examples=60)
@given(
    bursts=st.lists(st.integers(1, 7), max_size=8),
    lanes=st.integers(2, 4),
    wide_up_to=st.integers(0, 4),
    max_batch_size=st.integers(1, 3),
)
def test_wide_and_narrow_never_run_at_once_and_everybody_is_answered(
    bursts: list[int], lanes: int, wide_up_to: int, max_batch_size: int
) -> None:
    ways = two_ways(shut=False)
    narrow = lanes_of(ways, lanes, wide_up_to=wide_up_to, max_batch_size=max_batch_size)
    values = iter(range(256))
    callers: list[Caller] = []
    with running(ways.wide, max_batch_size=4, narrow=narrow) as core:
        for burst in bursts:
            arrived = submit(core, *islice(values, burst))
            callers += arrived
            if burst % 2:  # some bursts find the engine idle, others at work
                arrived[-1].answer()
    for caller in callers:
        caller.assert_got_its_row()
    assert all(wide + narrow_ <= 1 or wide == 0 for wide, narrow_ in ways.together)
    assert all(wide <= 1 and narrow_ <= lanes for wide, narrow_ in ways.together)
    assert all(len(batch) <= max_batch_size for batch in ways.narrow.batches)


# --- the backend fails


def run_one_batch(backend: WatchedBackend, *values: int) -> list[Caller]:
    """Answer these in one batch, as company of each other; the first batch is a healthy one."""
    assert not backend.gate.is_set()
    with running(backend, max_batch_size=len(values)) as core:
        plug = hold_one(core, backend, 255)
        callers = submit(core, *values)
        backend.gate.set()
        plug.assert_got_its_row()
        for caller in callers:
            caller.answer()
    assert backend.batches[1] == list(values)
    assert all(len(caller.answers) == 1 for caller in callers)
    return callers


def assert_only_culprits_failed(callers: list[Caller], *culprits: int) -> None:
    for caller in callers:
        if caller.value in culprits:
            assert type(caller.error()) is InferenceFailed
        else:
            caller.assert_got_its_row()


@pytest.mark.parametrize("culprit", range(1, 8))
def test_one_image_that_breaks_its_batch_fails_alone(culprit: int) -> None:
    backend = WatchedBackend(shut=True, spoil=raise_for(culprit))
    callers = run_one_batch(backend, *range(1, 8))
    assert_only_culprits_failed(callers, culprit)


def test_a_batch_that_breaks_is_searched_in_halves() -> None:
    backend = WatchedBackend(shut=True, spoil=raise_for(3))
    run_one_batch(backend, 1, 2, 3, 4)
    assert backend.batches[1:] == [[1, 2, 3, 4], [1, 2], [3, 4], [3], [4]]


def test_a_backend_that_always_raises_fails_everybody_and_the_engine_lives() -> None:
    backend = WatchedBackend(shut=True)
    with running(backend, max_batch_size=5) as core:
        hold_one(core, backend)
        callers = submit(core, *range(1, 6))
        backend.spoil = raise_for(*range(256))
        backend.gate.set()
        assert all(type(caller.error()) is InferenceFailed for caller in callers)
        backend.spoil = None
        (after,) = submit(core, 9)
        after.assert_got_its_row()


def test_what_breaks_only_in_company_is_answered_alone() -> None:
    def only_alone(values: list[int], rows: Rows) -> Rows:
        if len(values) > 1:
            raise MemoryError
        return rows

    backend = WatchedBackend(shut=True, spoil=only_alone)
    callers = run_one_batch(backend, 1, 2, 3)
    assert_only_culprits_failed(callers)


def test_an_error_of_our_family_goes_to_every_caller_of_the_batch_and_is_not_retried() -> None:
    backend = WatchedBackend(shut=True, spoil=raise_for(2, error=BackendUnavailable))
    callers = run_one_batch(backend, 1, 2, 3)
    assert all(type(caller.error()) is BackendUnavailable for caller in callers)
    assert len(backend.batches) == 2


def too_few(values: list[int], rows: Rows) -> Rows:
    return Rows(rows.logits[:-1], rows.embedding[:-1]) if 2 in values else rows


def too_many(values: list[int], rows: Rows) -> Rows:
    return Rows(rows.logits.repeat(2, 0), rows.embedding.repeat(2, 0)) if 2 in values else rows


def too_narrow(values: list[int], rows: Rows) -> Rows:
    return replace(rows, embedding=rows.embedding[:, 1:]) if 2 in values else rows


def flat(values: list[int], rows: Rows) -> Rows:
    return replace(rows, logits=rows.logits.reshape(-1)) if 2 in values else rows


def of_objects(values: list[int], rows: Rows) -> Rows:
    return replace(rows, logits=rows.logits.astype(object)) if 2 in values else rows


def of_doubles(values: list[int], rows: Rows) -> Rows:
    return Rows(rows.logits, rows.embedding.astype(np.float64)) if 2 in values else rows


def nothing(values: list[int], rows: Rows) -> Rows:
    return None if 2 in values else rows  # type: ignore[return-value]


@pytest.mark.parametrize(
    "spoil", [too_few, too_many, too_narrow, flat, of_objects, of_doubles, nothing]
)
def test_rows_of_the_wrong_number_shape_or_type_reach_nobody(spoil: Spoil) -> None:
    backend = WatchedBackend(shut=True, spoil=spoil)
    callers = run_one_batch(backend, 1, 2, 3)
    assert_only_culprits_failed(callers, 2)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["logits", "embedding"])
def test_a_row_that_is_not_finite_fails_alone(wrong: float, which: str) -> None:
    backend = WatchedBackend(shut=True, spoil=not_finite_for(2, wrong=wrong, which=which))
    callers = run_one_batch(backend, 1, 2, 3, 4)
    assert_only_culprits_failed(callers, 2)
    assert backend.batches[1:] == [[1, 2, 3, 4], [2]], "the neighbours' rows were good already"


def test_rows_that_are_not_finite_in_company_only_are_all_answered() -> None:
    def only_alone(values: list[int], rows: Rows) -> Rows:
        return not_finite_for(*values)(values, rows) if len(values) > 1 else rows

    backend = WatchedBackend(shut=True, spoil=only_alone)
    callers = run_one_batch(backend, 1, 2, 3, 4, 5)
    assert_only_culprits_failed(callers)


def test_a_lone_row_that_is_not_finite_fails_without_a_second_try() -> None:
    backend = WatchedBackend(shut=True, spoil=not_finite_for(2))
    callers = run_one_batch(backend, 2)
    assert_only_culprits_failed(callers, 2)
    assert backend.batches[1:] == [[2]]


def test_the_last_error_is_told_until_a_batch_goes_well(caplog: pytest.LogCaptureFixture) -> None:
    backend = WatchedBackend(spoil=raise_for(2))
    with running(backend) as core:
        assert core.status().last_error is None
        submit(core, 2)[0].error()
        assert core.status().last_error == "RuntimeError: cannot run [2]"
        submit(core, 1)[0].assert_got_its_row()
        assert core.status().last_error is None
        backend.spoil = not_finite_for(3)
        submit(core, 3)[0].error()
        assert "not finite" in (core.status().last_error or "")
    errors = [one.getMessage() for one in caplog.records if one.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "cannot run [2]" in errors[0]


def test_the_observer_hears_of_every_batch_and_every_failure() -> None:
    observer = CountingObserver()
    backend = WatchedBackend(shut=True, spoil=raise_for(3))
    with running(backend, max_batch_size=4, observer=observer) as core:
        callers = [hold_one(core, backend), *submit(core, 1, 2, 3, 4)]
        backend.gate.set()
        for caller in callers:
            caller.answer()
    assert observer.sizes == [1, 2, 1]
    assert observer.failures == 3, "four together, two together, one alone"


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


# --- deadlines and admission


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
