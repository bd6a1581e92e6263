"""EngineCore with lanes: one wide batch, or narrow ones side by side, never both at once."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from itertools import islice

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from app.engine.lanes import NarrowLanes
from app.engine.timing import ServiceTimes
from app.types import Batch, Rows
from tests.engine.doubles import (
    PATIENCE_SECONDS,
    Caller,
    WatchedBackend,
    hold_one,
    running,
    submit,
)


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
