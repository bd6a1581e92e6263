"""Schedule: which way is next and how long one waits, in numbers alone."""

from __future__ import annotations

import pytest

from app.engine.schedule import Running, Schedule, Way
from app.engine.timing import ServiceTimes

NOW = 1000.0
WIDE = Way(ServiceTimes({1: 4.0, 2: 5.0, 4: 6.0}), max_batch_size=4, lanes=1)
NARROW = Way(ServiceTimes({1: 2.0, 2: 4.0}), max_batch_size=2, lanes=3)
ONE_WAY = Schedule(WIDE)
TWO_WAYS = Schedule(WIDE, NARROW, wide_up_to=2)


def batches(way: Way, *started_ago: float, size: int = 1) -> list[Running]:
    return [Running(way, size, NOW - seconds) for seconds in started_ago]


@pytest.mark.parametrize("waiting", [0, 1, 100])
@pytest.mark.parametrize("running", [[], batches(WIDE, 0.0)], ids=["idle", "busy"])
def test_without_lanes_everything_is_wide_and_who_asks_is_free(
    waiting: int, running: list[Running]
) -> None:
    assert ONE_WAY.next_way(waiting, running) is WIDE
    assert ONE_WAY.free_way(waiting, running) is WIDE


@pytest.mark.parametrize(
    ("waiting", "running", "following", "free"),
    [
        (1, [], WIDE, WIDE),
        (2, [], WIDE, WIDE),
        (3, [], NARROW, NARROW),  # more than one wide batch answers as soon
        (1, batches(WIDE, 0.0), WIDE, None),  # one wide batch at a time
        (3, batches(WIDE, 0.0), NARROW, None),  # no lane beside a wide batch
        (1, batches(NARROW, 0.0), NARROW, NARROW),  # no wide batch beside a lane
        (3, batches(NARROW, 0.0, 0.0), NARROW, NARROW),
    ],
)
def test_with_lanes_wide_and_narrow_never_run_at_once(
    waiting: int, running: list[Running], following: Way, free: Way | None
) -> None:
    assert TWO_WAYS.next_way(waiting, running) is following
    assert TWO_WAYS.free_way(waiting, running) is free


@pytest.mark.parametrize(
    ("schedule", "waiting", "running", "expected"),
    [
        (ONE_WAY, 0, [], 0.0),
        (ONE_WAY, 3, [], 0.0),  # joins the three that wait
        (ONE_WAY, 4, [], 6.0),  # a full batch goes first
        (ONE_WAY, 0, batches(WIDE, 1.0), 3.0),  # what remains of the running one
        (ONE_WAY, 4, batches(WIDE, 1.0), 9.0),
        (ONE_WAY, 0, batches(WIDE, 7.0), 3.0),  # overdue by 3 s: may well take 3 more
        (TWO_WAYS, 0, batches(WIDE, 1.0), 3.0),  # the next one is wide as well
        (TWO_WAYS, 5, batches(WIDE, 1.0), 3.0),  # three lanes are free at its end
        (TWO_WAYS, 6, batches(WIDE, 1.0), 7.0),  # and filled by those before it
        (TWO_WAYS, 0, batches(NARROW, 0.5), 0.0),  # two lanes are free now
        (TWO_WAYS, 0, batches(NARROW, 0.5, 1.0, 0.0), 1.0),  # the first to be free
    ],
)
def test_the_wait_is_over_what_runs_and_the_full_batches_ahead(
    schedule: Schedule, waiting: int, running: list[Running], expected: float
) -> None:
    assert schedule.wait_seconds(waiting, running, NOW) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "waiting", "running", "expected"),
    [
        (ONE_WAY, 0, [], 4.0),
        (ONE_WAY, 1, [], 5.0),
        (ONE_WAY, 3, [], 6.0),
        (ONE_WAY, 4, [], 4.0),  # alone again, behind the full one
        (TWO_WAYS, 1, [], 5.0),
        (TWO_WAYS, 2, [], 2.0),  # the third one makes them narrow, and is alone in its batch
        (TWO_WAYS, 1, batches(NARROW, 0.0), 4.0),
    ],
)
def test_the_own_batch_is_the_one_that_is_not_full_yet(
    schedule: Schedule, waiting: int, running: list[Running], expected: float
) -> None:
    assert schedule.own_seconds(waiting, running) == expected
