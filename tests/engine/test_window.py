"""BatchWindow: pure, so that every promise is checked with the clock as a number."""

from __future__ import annotations

import math

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

from app.engine.window import BatchWindow, Request, answer_together
from app.errors import Overloaded, ServiceError
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


def over_budget(*requests: Request, max_batch_size: int = 2) -> BatchWindow:
    """A window with a budget of one second."""
    window = BatchWindow(max_batch_size, budget_seconds=1.0)
    for one in requests:
        window.add(one)
    return window


def test_the_newest_leave_first_while_the_oldest_is_over_budget_and_one_batch() -> None:
    requests = [request(0.0), request(0.5), request(1.0), request(1.2)]
    window = over_budget(*requests)
    assert not window.is_over_budget(1.5, batch_seconds=0.5), "just within"
    assert window.is_over_budget(1.51, batch_seconds=0.5)
    assert window.take_batch(1.51, batch_seconds=0.5) == [requests[3], requests[2]]


def test_the_oldest_leave_first_again_once_the_oldest_is_within_budget() -> None:
    old, young, younger = request(0.0), request(4.5), request(4.8)
    window = over_budget(old, young, younger)
    assert window.is_over_budget(5.0)
    window.remove(old)
    assert not window.is_over_budget(5.0)
    assert window.take_batch(5.0) == [young, younger]


def test_over_budget_nobody_is_run_who_could_not_be_answered_in_time() -> None:
    patient, hurried = request(0.0, deadline=100.0), request(1.9, deadline=2.4)
    window = over_budget(patient, hurried)
    assert window.take_batch(2.0, batch_seconds=0.5) == [patient]
    assert window.take_late(2.0, batch_seconds=0.5) == []  # alone it is within budget by then


def test_over_budget_those_who_cannot_be_answered_in_time_leave_at_once() -> None:
    patient, hurried = request(0.0, deadline=100.0), request(1.9, deadline=2.4)
    window = over_budget(patient, hurried)
    assert window.take_late(2.0, batch_seconds=0.5) == [hurried]
    assert len(window) == 1


def test_within_budget_an_estimate_keeps_nobody_from_the_backend() -> None:
    window = over_budget(hurried := request(0.0, deadline=1.0))
    assert window.take_late(0.5, batch_seconds=300.0) == []
    assert window.take_batch(0.5, batch_seconds=300.0) == [hurried]


@pytest.mark.parametrize(("waiting", "taken"), [(1, 1), (4, 4), (5, 4), (6, 4), (7, 7), (9, 8)])
def test_a_prepared_size_is_run_full_until_padding_to_the_next_does_more_a_second(
    waiting: int, taken: int
) -> None:
    window = BatchWindow(8, pads_from={4: 2, 8: 7})
    for _ in range(waiting):
        window.add(request())
    assert len(window.take_batch(0.0)) == taken


def test_a_batch_may_be_told_to_be_smaller() -> None:
    requests = [request(float(index)) for index in range(3)]
    window = window_of(requests, max_batch_size=4)
    assert window.take_batch(9.0, most=1) == requests[:1]


def test_answers_given_together_wake_whoever_shares_them_once() -> None:
    woken: list[str] = []
    given_to: list[Row | ServiceError] = []
    one, other = (lambda: woken.append("one")), (lambda: woken.append("other"))
    requests = [
        Request(PIXELS, FAR_AHEAD, 0.0, given_to.append, wake) for wake in (one, other, one, None)
    ]
    answer_together((request, Overloaded("no")) for request in requests)
    assert len(given_to) == 4
    assert sorted(woken) == ["one", "other"]


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

    @initialize(
        limit=st.integers(1, 5),
        max_wait=st.sampled_from([0.0, 1.0, 3.0]),
        budget=st.sampled_from([0.0, 1.0, 5.0, math.inf]),
    )
    def open_window(self, limit: int, max_wait: float, budget: float) -> None:
        self.limit, self.max_wait, self.budget = limit, max_wait, budget
        self.window = BatchWindow(limit, max_wait, budget_seconds=budget)
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

    def is_over_budget(self, batch_seconds: float) -> bool:
        oldest = self.waiting[0].enqueued_at if self.waiting else math.inf
        return self.now - oldest > self.budget + batch_seconds

    @rule(batch_seconds=st.sampled_from([0.0, 0.5, 3.0]))
    def late_ones_leave(self, batch_seconds: float) -> None:
        end = self.now + batch_seconds if self.is_over_budget(batch_seconds) else self.now
        expected = [one for one in self.waiting if one.deadline <= self.now or one.deadline < end]
        assert self.window.take_late(self.now, batch_seconds) == expected
        self.leave(expected)

    @rule(hurry=st.booleans(), batch_seconds=st.sampled_from([0.0, 0.5, 3.0]))
    def a_batch_leaves(self, hurry: bool, batch_seconds: float) -> None:
        batch = self.window.take_batch(self.now, hurry=hurry, batch_seconds=batch_seconds)
        full = len(self.waiting) >= self.limit
        waited = bool(self.waiting) and self.now >= self.waiting[0].enqueued_at + self.max_wait
        if not (hurry or full or waited):
            assert batch == []
        elif self.is_over_budget(batch_seconds):
            end = self.now + batch_seconds
            feasible = [one for one in reversed(self.waiting) if one.deadline >= end]
            assert batch == feasible[: self.limit]
        else:
            assert batch == self.waiting[: self.limit]
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
