"""BatchWindow: pure, so that every promise is checked with the clock as a number."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from app.engine.window import BatchWindow, Request
from app.errors import ServiceError
from app.types import Row
from tests.engine.doubles import FAR_AHEAD, pixels_of

PIXELS = pixels_of(0)


def no_reply(answer: Row | ServiceError) -> None:
    raise AssertionError("the window answers nobody")


def request(enqueued_at: float = 0.0, deadline: float = FAR_AHEAD) -> Request:
    return Request(PIXELS, deadline, enqueued_at, no_reply)


def window_of(requests: list[Request], max_batch_size: int, max_wait: float = 0.0) -> BatchWindow:
    window = BatchWindow(max_batch_size, max_wait)
    for one in requests:
        window.add(one)
    return window


def test_an_empty_window_gives_nothing_and_is_never_due() -> None:
    window = BatchWindow(4)
    assert window.due_at() is None
    assert window.take_batch(1e9) == []
    assert window.take_batch(1e9, hurry=True) == []
    assert window.take_late(1e9) == []
    assert window.take_all() == []


def test_without_a_wait_it_takes_what_is_there() -> None:
    only = request(enqueued_at=5.0)
    window = window_of([only], max_batch_size=4)
    assert window.due_at() == 5.0
    assert window.take_batch(5.0) == [only]
    assert len(window) == 0


def test_a_batch_is_never_larger_than_the_limit_and_keeps_the_order_of_arrival() -> None:
    requests = [request(float(index)) for index in range(5)]
    window = window_of(requests, max_batch_size=2)
    batches = [window.take_batch(9.0) for _ in range(4)]
    assert batches == [requests[0:2], requests[2:4], requests[4:5], []]


def test_the_wait_counts_from_the_oldest_request() -> None:
    oldest, newest = request(enqueued_at=10.0), request(enqueued_at=10.9)
    window = window_of([oldest, newest], max_batch_size=4, max_wait=1.0)
    assert window.due_at() == 11.0
    assert window.take_batch(10.99) == []
    assert window.take_batch(11.0) == [oldest, newest]


def test_a_full_batch_does_not_wait() -> None:
    requests = [request(10.0), request(10.1)]
    window = window_of(requests, max_batch_size=2, max_wait=1.0)
    assert window.take_batch(10.1) == requests


def test_hurry_ends_the_wait() -> None:
    only = request(10.0)
    window = window_of([only], max_batch_size=2, max_wait=1.0)
    assert window.take_batch(10.0) == []
    assert window.take_batch(10.0, hurry=True) == [only]


def test_when_the_oldest_leaves_the_wait_counts_from_the_next() -> None:
    oldest, next_one = request(10.0), request(10.5)
    window = window_of([oldest, next_one], max_batch_size=4, max_wait=1.0)
    assert window.remove(oldest)
    assert window.due_at() == 11.5


def test_late_requests_leave_without_being_in_a_batch() -> None:
    early, late, at_the_moment = (
        request(0.0, deadline=9.0),
        request(0.0, deadline=4.0),
        request(0.0, deadline=5.0),
    )
    window = window_of([early, late, at_the_moment], max_batch_size=4)
    assert window.take_late(5.0) == [late, at_the_moment]
    assert window.take_late(5.0) == []
    assert window.take_batch(5.0) == [early]


def test_a_request_can_be_removed_from_the_middle_once() -> None:
    first, middle, last = request(), request(), request()
    window = window_of([first, middle, last], max_batch_size=4)
    assert window.remove(middle)
    assert not window.remove(middle)
    assert len(window) == 2
    assert window.take_batch(0.0) == [first, last]
    assert not window.remove(first)


def test_take_all_takes_everything_due_or_not_and_beyond_the_limit() -> None:
    requests = [request(float(index)) for index in range(5)]
    window = window_of(requests, max_batch_size=2, max_wait=100.0)
    assert window.take_all() == requests
    assert len(window) == 0


@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 8])
@given(count=st.integers(0, 40))
def test_a_free_backend_empties_the_window_in_the_fewest_batches(
    max_batch_size: int, count: int
) -> None:
    requests = [request(float(index)) for index in range(count)]
    window = window_of(requests, max_batch_size)
    batches = []
    while batch := window.take_batch(float(count)):
        batches.append(batch)
    assert [one for batch in batches for one in batch] == requests
    assert len(batches) == -(-count // max_batch_size)


class AnyLife(RuleBasedStateMachine):
    """Requests come, wait and leave in any order; a plain list is the model."""

    @initialize(limit=st.integers(1, 5), max_wait=st.sampled_from([0.0, 1.0, 3.0]))
    def open_window(self, limit: int, max_wait: float) -> None:
        self.limit, self.max_wait = limit, max_wait
        self.window = BatchWindow(limit, max_wait)
        self.waiting: list[Request] = []
        self.left: list[Request] = []
        self.now = 0.0

    def leave(self, requests: list[Request]) -> None:
        for one in requests:
            assert one not in self.left, "a request left twice"
            self.left.append(one)
            self.waiting.remove(one)

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 4.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(patience=st.sampled_from([0.5, 2.0, 100.0]))
    def one_comes(self, patience: float) -> None:
        one = request(self.now, self.now + patience)
        self.window.add(one)
        self.waiting.append(one)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def one_leaves(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.waiting))
        assert self.window.remove(one)
        self.leave([one])

    @precondition(lambda self: self.left)
    @rule(data=st.data())
    def one_that_left_leaves_again(self, data: st.DataObject) -> None:
        assert not self.window.remove(data.draw(st.sampled_from(self.left)))

    @rule()
    def late_ones_leave(self) -> None:
        expected = [one for one in self.waiting if one.deadline <= self.now]
        assert self.window.take_late(self.now) == expected
        self.leave(expected)

    @rule(hurry=st.booleans())
    def a_batch_leaves(self, hurry: bool) -> None:
        batch = self.window.take_batch(self.now, hurry=hurry)
        full = len(self.waiting) >= self.limit
        waited = bool(self.waiting) and self.now >= self.waiting[0].enqueued_at + self.max_wait
        if hurry or full or waited:
            assert batch == self.waiting[: self.limit]
        else:
            assert batch == []
        self.leave(batch)

    @rule()
    def all_leave(self) -> None:
        expected = list(self.waiting)
        assert self.window.take_all() == expected
        self.leave(expected)

    @invariant()
    def the_same_ones_wait(self) -> None:
        assert len(self.window) == len(self.waiting)

    @invariant()
    def none_waits_longer_than_the_oldest_may(self) -> None:
        due_at = self.window.due_at()
        if not self.waiting:
            assert due_at is None
        else:
            assert due_at is not None
            assert due_at <= self.waiting[0].enqueued_at + self.max_wait


TestAnyLife = AnyLife.TestCase
