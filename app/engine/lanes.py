"""Whether batches of one thread each, side by side, pay beside one that has all the threads.

    wide     one batch at a time on all threads: what a lone image wants
    narrow   a batch a lane, each on one thread: no batch waits for its slowest thread, so more
             images a second where enough are there

Both need a backend of their own in memory, so the narrow one stays only where it pays.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from app.backends.base import Backend, BackendInfo
from app.engine.base import Profile
from app.engine.loading import run_once, warm_up
from app.engine.timing import USEFUL_GAIN, ServiceTimes
from app.types import Batch, Rows

log = logging.getLogger("metaserve.engine")

# Below, a batch costs less than what it takes to hand it to a second thread and back.
HAND_OVER_SECONDS = 0.001
# Above, more threads always answer a lone image sooner; where warm-up found otherwise, something
# else was running, and what it took must not be missed for as long as the service lives.
SMALL_SECONDS = 0.005
# What lanes may do less than wide batches at warm-up, where nothing is decoded. When images are, on
# the same CPUs, a wide batch waits for the thread that lost its CPU, and a lane for nobody else's.
TOLERATED_LOSS = 0.05


@dataclass(frozen=True)
class NarrowLanes:
    """Batches side by side, each on one thread.

    Attributes:
        backend: of one thread; its `run` is called from every lane.
        times: of a batch while all lanes run one.
        lanes: how many.
        max_batch_size: the largest useful batch of a lane.
        wide_up_to: most waiting images that one wide batch answers sooner than the lanes do.
    """

    backend: Backend
    times: ServiceTimes
    lanes: int
    max_batch_size: int
    wide_up_to: int


@dataclass(frozen=True)
class Learned:
    """The backend to serve with, and its lanes where they pay.

    Attributes:
        backend: runs batches that have the machine to itself.
        times: of these.
        narrow: None where lanes do not pay.
    """

    backend: Backend
    times: ServiceTimes
    narrow: NarrowLanes | None = None


class SideBySide:
    """Runs a batch once a lane, all at the same time; for warm-up to time."""

    def __init__(self, backend: Backend, lanes: int) -> None:
        self.info: BackendInfo = backend.info
        self._backend = backend
        self._lanes = lanes
        self._pool = ThreadPoolExecutor(lanes, thread_name_prefix="lane")

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        """Answer a batch, as often as there are lanes."""
        runs = [self._pool.submit(self._backend.run, batch) for _ in range(self._lanes)]
        rows = [run.result() for run in runs]
        return rows[0]

    def close(self) -> None:
        """End the threads; the backend stays open."""
        self._pool.shutdown()


def learn_lanes(
    wide: Backend,
    times: ServiceTimes,
    open_narrow: Callable[[], Backend],
    lanes: int,
    max_batch_size: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Learned:
    """Time one thread and lanes of one thread against a warm backend; keep what pays.

    Where one thread answers a lone image of a small network as soon as all do, it serves alone: the
    others would only burn time that decoding needs. Lanes pay where they do about as many
    images a second, see `TOLERATED_LOSS`.

    Args:
        wide: closed when it is not kept.
        times: of `wide`.
        open_narrow: opens the same on one thread.
        lanes: to try.
        max_batch_size: the limit.
        clock: in seconds.
    """
    narrow = open_narrow()
    try:
        alone = warm_up(narrow, 1, clock).batch_seconds(1)
        is_as_fast = alone <= min(SMALL_SECONDS, times.batch_seconds(1) * (1 + USEFUL_GAIN))
        if is_as_fast:
            times = warm_up(narrow, max_batch_size, clock)
        found = None
        if not (is_as_fast and alone < HAND_OVER_SECONDS):
            found = _time_lanes(narrow, times, lanes, max_batch_size, clock)
    except BaseException:
        narrow.close()
        raise
    if is_as_fast:
        wide.close()
        # One thread is a lane like any other: nobody needs to have the machine to himself.
        return Learned(narrow, times, found and replace(found, wide_up_to=0))
    if found is None:
        narrow.close()
    return Learned(wide, times, found)


def recall(profile: Profile, backend: Backend, open_narrow: Callable[[], Backend]) -> Learned:
    """Take over what another process learned on this machine; run each size once to warm it.

    Args:
        profile: what it learned.
        backend: warm or not; closed when one thread is to serve and it has more.
        open_narrow: opens the same on one thread.
    """
    alone = narrow = None
    if profile.threads == 1 and backend.info.threads != 1:
        alone = open_narrow()
    serving = alone or backend
    try:
        run_once(serving, profile.batch_seconds)
        if profile.lane_batch_seconds:
            narrow = serving if serving.info.threads == 1 else open_narrow()
            run_once(narrow, profile.lane_batch_seconds)
    except BaseException:
        for opened in (alone, narrow):
            if opened is not None and opened is not backend:
                opened.close()
        raise
    if alone is not None:
        backend.close()
    times = ServiceTimes(profile.batch_seconds)
    if narrow is None:
        return Learned(serving, times)
    lane_times = ServiceTimes(profile.lane_batch_seconds)
    size, up_to = profile.lane_batch_size, profile.wide_up_to
    return Learned(serving, times, NarrowLanes(narrow, lane_times, profile.lanes, size, up_to))


def _time_lanes(
    narrow: Backend,
    times: ServiceTimes,
    lanes: int,
    max_batch_size: int,
    clock: Callable[[], float],
) -> NarrowLanes | None:
    """Return the lanes with their times, None where they do too little."""
    together = SideBySide(narrow, lanes)
    try:
        lane_times = warm_up(together, max_batch_size, clock)
    finally:
        together.close()
    ours, theirs = lane_times.best_images_per_second() * lanes, times.best_images_per_second()
    if ours < theirs * (1 - TOLERATED_LOSS):
        log.info("%d lanes of 1 thread do %.4g images/s, less than %.4g", lanes, ours, theirs)
        return None
    size = lane_times.largest_useful()
    up_to = wide_up_to(times, lane_times, lanes, size)
    return NarrowLanes(narrow, lane_times, lanes, size, up_to)


def wide_up_to(
    wide_times: ServiceTimes, lane_times: ServiceTimes, lanes: int, lane_batch_size: int
) -> int:
    """Return how many images one wide batch answers as soon as the lanes do; at least 1.

    A lone image always has the machine to itself: its neighbour, if there is one, is not there yet.
    """
    most = 1
    for waiting in range(2, min(lanes * lane_batch_size, wide_times.largest_useful() + 1)):
        a_lane = lane_times.batch_seconds(math.ceil(waiting / lanes))
        if wide_times.batch_seconds(waiting) > a_lane:
            break
        most = waiting
    return most
