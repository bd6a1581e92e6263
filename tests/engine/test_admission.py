"""Admission: who is refused and when he should come back, in numbers alone."""

from __future__ import annotations

import pytest

from app.engine.admission import check_deadline, check_wait
from app.errors import DeadlineExceeded, Overloaded


def is_admitted(
    wait: float, *, budget: float = 5.0, left: float = 60.0, own: float = 0.0, full: bool = False
) -> bool:
    try:
        check_wait(
            wait,
            budget_seconds=budget,
            time_left_seconds=left,
            own_seconds=own,
            waiting=3,
            is_full=full,
        )
    except Overloaded:
        return False
    return True


def test_who_has_no_time_left_is_late() -> None:
    check_deadline(0.001)
    for left in (0.0, -1.0):
        with pytest.raises(DeadlineExceeded, match="before the image reached the queue"):
            check_deadline(left)


def test_the_wait_must_fit_the_budget() -> None:
    assert is_admitted(5.0)
    assert not is_admitted(5.001)


def test_the_wait_and_the_own_batch_must_fit_the_deadline() -> None:
    assert is_admitted(1.0, left=1.5, own=0.5)
    assert not is_admitted(1.0, left=1.5, own=0.501)


def test_an_idle_engine_turns_away_nobody_who_has_time() -> None:
    assert is_admitted(0.0, budget=0.0, left=0.001)


def test_without_room_nobody_is_admitted() -> None:
    assert not is_admitted(0.0, full=True)


def test_a_refusal_says_how_much_waits_and_when_it_may_be_less() -> None:
    with pytest.raises(Overloaded, match=r"3 images wait already, about 9\.0 s of work") as refused:
        check_wait(9.0, budget_seconds=5.0, time_left_seconds=3.5, own_seconds=0.5, waiting=3)
    # 6 s too long: the own batch has to begin 3 s from now.
    assert 6 <= refused.value.retry_after_seconds <= 12
