"""ServiceTimes: small worked examples, and what must hold for any measurements."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from app.engine.timing import SMOOTHING, ServiceTimes, bucket, padding_pays_from

KNOWN = {1: 0.010, 2: 0.012, 4: 0.020, 8: 0.040}

measured = st.dictionaries(st.sampled_from([1, 2, 4, 8, 16, 32]), st.floats(1e-6, 1e3), min_size=1)


@pytest.mark.parametrize(
    ("size", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (32, 32), (33, 64)]
)
def test_a_batch_size_is_rounded_up_to_a_power_of_two(size: int, expected: int) -> None:
    assert bucket(size) == expected


def test_before_anything_is_measured_nothing_is_predicted() -> None:
    times = ServiceTimes()
    assert times.batch_seconds(5) == 0.0
    assert times.wait_seconds(100, [], max_batch_size=8) == 0.0


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, 0.0), (1, 0.010), (2, 0.012), (3, 0.020), (4, 0.020), (5, 0.040), (16, 0.080)],
)
def test_a_batch_takes_what_its_bucket_took_and_beyond_the_largest_in_proportion(
    size: int, expected: float
) -> None:
    assert ServiceTimes(KNOWN).batch_seconds(size) == pytest.approx(expected)


def test_the_first_measurement_of_a_bucket_is_taken_as_it_is() -> None:
    times = ServiceTimes()
    times.observe(3, 0.5)
    assert times.as_dict() == {4: 0.5}


def test_a_new_measurement_moves_the_known_one_by_its_weight() -> None:
    times = ServiceTimes(KNOWN)
    times.observe(3, 0.120)
    assert times.as_dict() == pytest.approx(KNOWN | {4: 0.020 + SMOOTHING * 0.100})


def test_a_machine_that_became_slower_is_followed_within_a_dozen_batches() -> None:
    times = ServiceTimes({1: 0.010})
    for _ in range(12):
        times.observe(1, 0.100)
    assert times.batch_seconds(1) == pytest.approx(0.100, rel=0.1)


def test_observing_does_not_write_into_the_given_measurements() -> None:
    given_times = {1: 0.010}
    times = ServiceTimes(given_times)
    times.observe(1, 1.0)
    times.as_dict()[1] = 7.0
    assert given_times == {1: 0.010}
    assert times.batch_seconds(1) != 7.0


@pytest.mark.parametrize(
    ("waiting", "remaining", "lanes", "expected"),
    [
        (0, [], 1, 0.0),
        (0, [0.007], 1, 0.007),  # what remains of the running batch, not all of it
        (3, [], 1, 0.0),  # joins the three that wait
        (8, [], 1, 0.040),  # one full batch goes first
        (15, [], 1, 0.040),  # and its own is the second
        (16, [], 1, 0.080),
        (16, [0.007], 1, 0.087),
        (0, [0.007], 2, 0.0),  # the other lane is free
        (0, [0.007, 0.003], 2, 0.003),  # the first to be free
        (8, [0.007, 0.003], 2, 0.007),  # the batch ahead takes that one
        (16, [0.007, 0.003], 2, 0.043),  # and this one its lane after it
        (8, [0.007], 2, 0.007),
    ],
)
def test_the_wait_is_the_full_batches_ahead_and_what_remains_of_the_running(
    waiting: int, remaining: list[float], lanes: int, expected: float
) -> None:
    times = ServiceTimes(KNOWN)
    assert times.wait_seconds(waiting, remaining, 8, lanes) == pytest.approx(expected)


@given(
    known=measured,
    waiting=st.integers(0, 500),
    more=st.integers(0, 500),
    remaining=st.lists(st.floats(0, 1), max_size=4),
    max_batch_size=st.integers(1, 64),
)
def test_the_wait_is_never_negative_and_grows_with_those_who_wait(
    known: dict[int, float],
    waiting: int,
    more: int,
    remaining: list[float],
    max_batch_size: int,
) -> None:
    times, batch_seconds = ServiceTimes(known), ServiceTimes(known).batch_seconds(max_batch_size)
    remaining = [share * batch_seconds for share in remaining]
    wait = times.wait_seconds(waiting, remaining, max_batch_size, 4)
    longer = times.wait_seconds(waiting + more, remaining, max_batch_size, 4)
    assert 0 <= wait <= longer + 1e-9


@pytest.mark.parametrize(
    ("elapsed", "expected"), [(0.0, 0.040), (0.030, 0.010), (0.040, 0.0), (0.100, 0.060)]
)
def test_a_running_batch_takes_what_is_left_of_it_and_an_overdue_one_as_much_again(
    elapsed: float, expected: float
) -> None:
    assert ServiceTimes(KNOWN).remaining_seconds(8, elapsed) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0}, {2: 2, 4: 3}),  # a larger one costs nothing more: always pad
        ({1: 1.0, 2: 1.6, 4: 2.4}, {2: 2, 4: 3}),
        ({4: 1.0, 8: 1.7}, {8: 7}),  # 6 in 1.7 s are fewer a second than 4 in 1
        ({4: 1.0, 8: 3.0}, {8: 8}),  # a full one is never split
        ({1: 1.0}, {}),
    ],
)
def test_padding_pays_where_it_does_more_images_a_second(
    seconds: dict[int, float], expected: dict[int, int]
) -> None:
    assert padding_pays_from(seconds, (1, 2, 4, 8)) == expected


@given(known=measured, size=st.integers(1, 64), observed=st.floats(0, 1e3))
def test_a_measurement_moves_the_prediction_towards_itself_and_not_beyond(
    known: dict[int, float], size: int, observed: float
) -> None:
    times = ServiceTimes(known)
    before = times.as_dict().get(bucket(size), observed)
    times.observe(size, observed)
    after = times.as_dict()[bucket(size)]
    low, high = sorted((before, observed))
    assert low <= after <= high or after == pytest.approx(observed)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({1: 1.0}, 1),
        ({1: 1.0, 2: 2.0, 4: 4.0}, 1),  # no gain at all
        ({1: 1.0, 2: 1.0, 4: 1.0}, 4),  # all gain
        ({1: 1.0, 2: 1.2, 4: 2.3, 8: 4.7}, 2),  # the last 4 % are not worth the wait
        ({1: 1.0, 2: 1.6, 4: 4.0}, 2),  # worse again
    ],
)
def test_the_largest_useful_batch_is_the_smallest_that_is_about_as_good_as_the_best(
    known: dict[int, float], expected: int
) -> None:
    assert ServiceTimes(known).largest_useful() == expected
