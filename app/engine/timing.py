"""ServiceTimes: how long a batch of each size takes, and so how long a new image would wait."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

# Weight of a new measurement: follows a machine that changes within a dozen batches.
SMOOTHING = 0.2
# A larger batch is worth its longer wait when it saves at least this share per image.
USEFUL_GAIN = 0.05


def bucket(size: int) -> int:
    """Return the power of two under which a duration is kept where no closer size was timed."""
    return 1 << max(size - 1, 0).bit_length()


class ServiceTimes:
    """Seconds per batch, by bucket: measured at warm-up, followed while serving."""

    def __init__(self, seconds: Mapping[int, float] | None = None) -> None:
        self._seconds = dict(seconds or {})

    def observe(self, size: int, seconds: float) -> None:
        """Take a batch's duration into account."""
        key = min([bucket(size), *(timed for timed in self._seconds if timed >= size)])
        known = self._seconds.get(key, seconds)
        self._seconds[key] = known + SMOOTHING * (seconds - known)

    def batch_seconds(self, size: int) -> float:
        """Return how long a batch of this size should take; 0 before anything was measured."""
        if not self._seconds or size <= 0:
            return 0.0
        at_least = [known for known in self._seconds if known >= size]
        if at_least:
            return self._seconds[min(at_least)]
        largest = max(self._seconds)
        return self._seconds[largest] * size / largest

    def wait_seconds(
        self, waiting: int, remaining: Sequence[float], max_batch_size: int, lanes: int = 1
    ) -> float:
        """Return how long an image that came now would wait until its own batch starts.

        Args:
            waiting: images before it in the queue.
            remaining: seconds until each of the running batches should end.
            max_batch_size: of the window.
            lanes: batches that run at once.
        """
        # What remains after the full batches ahead is the batch that the image itself joins.
        rounds, lane = divmod(waiting // max_batch_size, lanes)
        free_at = sorted([*remaining, *[0.0] * (lanes - len(remaining))])
        return free_at[lane] + rounds * self.batch_seconds(max_batch_size)

    def remaining_seconds(self, size: int, elapsed_seconds: float) -> float:
        """Return how long a running batch should still take.

        One that is overdue by x may well take x more: so an estimate that was too short grows with
        every moment of a backend that became slow, or hangs, before any batch has ended.
        """
        return abs(self.batch_seconds(size) - elapsed_seconds)

    def best_images_per_second(self) -> float:
        """Return the throughput of the best batch, one after the other.

        Raises:
            ValueError: nothing was timed.
        """
        return max(size / max(seconds, 1e-9) for size, seconds in self._seconds.items())

    def largest_useful(self) -> int:
        """Return the smallest timed batch size that is about as fast per image as the best.

        Raises:
            ValueError: nothing was timed.
        """
        per_image = {size: seconds / size for size, seconds in self._seconds.items()}
        best = min(per_image.values())
        return min(size for size, cost in per_image.items() if cost <= best * (1 + USEFUL_GAIN))

    def as_dict(self) -> dict[int, float]:
        """Return a copy, bucket -> seconds."""
        return dict(sorted(self._seconds.items()))


def padding_pays_from(seconds: Mapping[int, float], prepared: Sequence[int]) -> dict[int, int]:
    """Return from how many images on it pays to pad a batch up to each prepared size.

    With n images between two sizes a device either does n in the time of the larger, or runs the
    smaller full and leaves the rest to the next batch; what does more images a second pays.

    Args:
        seconds: timed size -> seconds of a batch.
        prepared: sizes of the device, rising; of these the timed ones count.
    """
    timed = [size for size in prepared if size in seconds]
    pays_from = {}
    for smaller, larger in pairwise(timed):
        even = smaller * seconds[larger] / seconds[smaller]
        pays_from[larger] = min(max(math.ceil(even), smaller + 1), larger)
    return pays_from
