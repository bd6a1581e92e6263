"""ServiceTimes: how long a batch of each size takes, and so how long a new image would wait."""

from __future__ import annotations

import math
from collections.abc import Mapping

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

    def wait_seconds(self, waiting: int, in_flight: int, max_batch_size: int, lanes: int) -> float:
        """Return how long an image that came now would wait until its own batch starts.

        Args:
            waiting: images before it in the queue.
            in_flight: images in running batches, counted whole: how far they are is not known.
            max_batch_size: of the window.
            lanes: batches that run at once.
        """
        # What remains after the full batches ahead is the batch that the image itself joins.
        ahead = waiting // max_batch_size * self.batch_seconds(max_batch_size)
        running = math.ceil(in_flight / lanes)
        return ahead / lanes + self.batch_seconds(running)

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
