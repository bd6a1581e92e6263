"""Warm-up learns what one thread and lanes of one thread are worth, on clocks of their own."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest

from app.assemble import profile_of
from app.backends.fake import FakeBackend
from app.engine import lanes as lanes_module
from app.engine.base import Profile
from app.engine.lanes import Learned, SideBySide, learn_lanes, recall, wide_up_to
from app.engine.timing import ServiceTimes
from app.types import Batch, Rows
from models.golden import golden_images
from tests.engine.doubles import PATIENCE_SECONDS, ManualClock

WIDE = {1: 0.025, 2: 0.054, 4: 0.110}


class Narrow(FakeBackend):
    """One thread; remembers what it ran and whether it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self.fails = False
        self.sizes: list[int] = []

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        if self.fails:
            raise RuntimeError("cannot run")
        self.sizes.append(len(batch))
        return super().run(batch, deadline)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def learn(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Learned, Narrow, Narrow]]:
    """Returns what is learned from given times, and the wide and the narrow backend."""

    def learn(
        alone: dict[int, float], lanes: dict[int, float], *, wide: dict[int, float] = WIDE
    ) -> tuple[Learned, Narrow, Narrow]:
        def warm_up(backend: FakeBackend | SideBySide, limit: int, clock: object) -> ServiceTimes:
            return ServiceTimes(lanes if isinstance(backend, SideBySide) else alone)

        monkeypatch.setattr(lanes_module, "warm_up", warm_up)
        wide_backend, narrow = Narrow(), Narrow()
        times = ServiceTimes(wide)
        learned = learn_lanes(wide_backend, times, lambda: narrow, 2, 8, ManualClock())
        return learned, wide_backend, narrow

    return learn


Learn = Callable[..., tuple[Learned, Narrow, Narrow]]


def test_lanes_that_do_more_images_a_second_are_kept_beside_the_wide_backend(learn: Learn) -> None:
    learned, wide, narrow = learn({1: 0.041}, {1: 0.047, 2: 0.094})
    assert learned.backend is wide
    assert learned.narrow is not None
    assert learned.narrow.backend is narrow
    assert (learned.narrow.lanes, learned.narrow.max_batch_size) == (2, 1)
    assert learned.narrow.wide_up_to == 1
    assert not wide.closed
    assert not narrow.closed


@pytest.mark.parametrize("lane_seconds", [0.047, 0.0518])
def test_lanes_that_do_hardly_less_where_nothing_is_decoded_are_kept(
    learn: Learn, lane_seconds: float
) -> None:
    learned, wide, narrow = learn({1: 0.041}, {1: lane_seconds})
    assert learned.narrow is not None
    assert not wide.closed
    assert not narrow.closed


@pytest.mark.parametrize("lane_seconds", [0.060, 0.0534])
def test_lanes_that_do_five_percent_less_are_dropped(learn: Learn, lane_seconds: float) -> None:
    learned, wide, narrow = learn({1: 0.041}, {1: lane_seconds})
    assert learned.backend is wide
    assert learned.narrow is None
    assert narrow.closed
    assert not wide.closed


def test_a_tiny_network_keeps_one_thread_alone(learn: Learn) -> None:
    learned, wide, narrow = learn({1: 0.0001}, {1: 0.00001}, wide={1: 0.0002})
    assert learned.backend is narrow
    assert learned.narrow is None
    assert learned.times.as_dict() == {1: 0.0001}
    assert wide.closed
    assert not narrow.closed


def test_a_small_network_that_threads_do_not_help_takes_a_lane_for_every_image(
    learn: Learn,
) -> None:
    learned, wide, narrow = learn({1: 0.004}, {1: 0.004}, wide={1: 0.004})
    assert learned.backend is narrow
    assert learned.narrow is not None
    assert learned.narrow.backend is narrow
    assert learned.narrow.wide_up_to == 0
    assert wide.closed


def test_a_large_network_keeps_its_threads_whatever_a_busy_machine_measured(learn: Learn) -> None:
    learned, wide, _ = learn({1: 0.025}, {1: 0.025})
    assert learned.backend is wide
    assert not wide.closed


def test_a_narrow_backend_that_fails_is_closed_and_the_error_told(learn: Learn) -> None:
    class Broken(Narrow):
        def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
            raise RuntimeError("no memory")

    broken, wide = Broken(), Narrow()
    with pytest.raises(RuntimeError, match="no memory"):
        learn_lanes(wide, ServiceTimes(WIDE), lambda: broken, 2, 8)
    assert broken.closed
    assert not wide.closed, "who opened it closes it"


@pytest.mark.parametrize(
    ("wide", "lane", "lanes", "size", "expected"),
    [
        ({1: 25.0, 2: 54.0}, {1: 47.0}, 2, 1, 1),
        ({1: 10.0, 2: 15.0, 4: 28.0, 8: 60.0}, {1: 40.0}, 8, 1, 4),  # three run as four do
        ({1: 10.0, 2: 15.0, 4: 30.0, 8: 60.0}, {1: 40.0}, 8, 1, 2),  # a useful batch at most
        ({1: 10.0, 2: 15.0, 4: 20.0, 8: 30.0}, {1: 15.0, 2: 28.0}, 2, 2, 3),
        ({1: 90.0}, {1: 40.0}, 4, 1, 1),  # a lone image all the same
    ],
)
def test_a_wide_batch_takes_as_many_as_it_answers_no_later_than_the_lanes(
    wide: dict[int, float], lane: dict[int, float], lanes: int, size: int, expected: int
) -> None:
    assert wide_up_to(ServiceTimes(wide), ServiceTimes(lane), lanes, size) == expected


def test_side_by_side_runs_a_batch_in_every_lane_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=PATIENCE_SECONDS)

    class Meeting(FakeBackend):
        def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
            together.wait()  # passes only when all three are inside
            return super().run(batch)

    before = set(threading.enumerate())
    lanes = SideBySide(Meeting(), 3)
    images = golden_images(lanes.info.input_size, 2)
    assert lanes.run(images).logits.shape == (2, 10)
    lanes.close()
    assert set(threading.enumerate()) == before


def test_the_profile_says_what_was_learned_in_one_line(learn: Learn) -> None:
    learned, _, _ = learn({1: 0.041}, {1: 0.047})
    profile = profile_of(learned)
    assert profile.lanes == 2
    assert profile.lane_batch_seconds == {1: 0.047}
    assert profile.images_per_second == pytest.approx(2 / 0.047)
    assert "2 lanes of 1 thread with batches of 1 (47.00 ms)" in str(profile)
    assert "\n" not in str(profile)


def test_the_profile_does_not_move_with_the_times_that_serving_follows(learn: Learn) -> None:
    learned, _, _ = learn({1: 0.041}, {1: 0.047})
    profile = profile_of(learned)
    learned.times.observe(1, 100.0)
    assert profile.batch_seconds == WIDE


def test_a_profile_of_nothing_measured_says_so() -> None:
    assert Profile({}, 8).images_per_second == 0.0


def test_several_large_batches_in_flight_count_each() -> None:
    assert Profile({1: 0.5, 8: 1.0}, 8, lanes=3).images_per_second == 24.0
    alone = Profile({8: 1.0}, 8, lanes=3, lane_batch_seconds={1: 1.0}, lane_batch_size=1)
    assert alone.images_per_second == 8.0


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        (Profile({1: 1.0}, 8), 8),
        (Profile({1: 1.0}, 8, lanes=3), 24),
        (Profile({1: 1.0}, 2, lanes=8, lane_batch_seconds={1: 1.0}, lane_batch_size=1), 8),
        (Profile({1: 1.0}, 4, lanes=2, lane_batch_seconds={1: 1.0}, lane_batch_size=1), 4),
    ],
)
def test_a_round_of_batches_fills_every_lane(profile: Profile, expected: int) -> None:
    assert profile.images_at_once == expected


def of_threads(threads: int) -> Narrow:
    backend = Narrow()
    backend.info = replace(backend.info, threads=threads)
    return backend


@pytest.mark.parametrize(
    ("profile", "serves_wide", "has_lanes", "warmed"),
    [
        (Profile(WIDE, 1, threads=4), True, False, ([1, 2, 4], [])),
        (Profile(WIDE, 1, threads=1), False, False, ([], [1, 2, 4])),
        (
            Profile(WIDE, 1, 4, 4, {1: 0.05, 2: 0.09}, 2, wide_up_to=1),
            True,
            True,
            ([1, 2, 4], [1, 2]),
        ),
        (
            Profile(WIDE, 1, 4, 1, {1: 0.05, 2: 0.09}, 2),
            False,
            True,
            ([], [1, 2, 4, 1, 2]),
        ),
    ],
    ids=["wide", "one thread", "wide and lanes", "lanes of the one thread"],
)
def test_what_is_recalled_is_what_was_learned(
    profile: Profile, serves_wide: bool, has_lanes: bool, warmed: tuple[list[int], list[int]]
) -> None:
    wide, narrow = of_threads(4), of_threads(1)
    learned = recall(profile, wide, lambda: narrow)
    assert profile_of(learned) == profile
    assert learned.backend is (wide if serves_wide else narrow)
    assert (learned.narrow is not None) is has_lanes
    assert learned.narrow is None or learned.narrow.backend is narrow
    assert (wide.sizes, narrow.sizes) == warmed, "each size once"
    assert wide.closed is not serves_wide
    assert not narrow.closed


def test_a_failure_while_recalling_closes_what_was_opened() -> None:
    wide, narrow = of_threads(4), of_threads(1)
    narrow.fails = True
    with pytest.raises(RuntimeError, match="cannot run"):
        recall(Profile(WIDE, 1, 4, 4, {1: 0.05}, 1), wide, lambda: narrow)
    assert narrow.closed
    assert not wide.closed, "that is the caller's"
