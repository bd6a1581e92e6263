"""The straight line of one image: bytes -> decode -> prepare -> infer; times taken at the seams."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from app.errors import BadRequest, DeadlineExceeded, Overloaded, Refused, ServiceError
from app.http.context import RequestContext
from app.http.inputs import Item
from app.http.state import LoadedModel, ServiceState
from app.images.peek import DECODE_IN_PLACE_PIXELS, is_cheap
from app.images.read import read_image
from app.types import Pixels, Row


@dataclass(frozen=True, slots=True)
class Answered:
    """One image's row and what it took to get it.

    Attributes:
        row: logits and embedding.
        decode_seconds: from hand-over to the decoding threads to pixels.
    """

    row: Row
    decode_seconds: float


Outcome = Answered | ServiceError


class Pipeline:
    """Answers the images of one request.

    Args:
        state: the service's.
        model: what answers.
        deadline: absolute `time.monotonic()` seconds.
        lag_seconds: that the request has waited already for the event loop.
    """

    def __init__(
        self, state: ServiceState, model: LoadedModel, deadline: float, lag_seconds: float
    ) -> None:
        self._state = state
        self._model = model
        self._deadline = deadline
        self._lag_seconds = lag_seconds

    def check_admission(self) -> None:
        """Refuse an image that could not be answered in time, before any work is spent on it.

        One estimate: the wait for the event loop, which is over, that for a decoding thread,
        decoding, and the wait for a batch.

        Raises:
            Refused: too much waits already, or the engine closes.
            DeadlineExceeded: the deadline has passed.
        """
        pool, engine = self._state.pool, self._model.engine
        pool.check_admission(self._deadline)
        ahead_seconds = self._lag_seconds + pool.ahead_seconds()
        try:
            engine.check_admission(self._deadline, ahead_seconds=ahead_seconds)
        except Overloaded:
            if not self._is_idle():
                raise
            # What is expected of decoding keeps nobody from an idle service: after a few slow
            # images nothing else could teach it that others are fast.
            engine.check_admission(self._deadline, ahead_seconds=self._lag_seconds)

    def _is_idle(self) -> bool:
        """Tell whether no image is in hand."""
        status = self._model.engine.status()
        return self._state.pool.is_idle and not status.queue_depth and not status.in_flight

    async def answer_one(self, item: Item) -> Answered:
        """Answer the image of a request that holds no other.

        Raises:
            ServiceError: the image cannot be used, or cannot be answered now.
        """
        if isinstance(item, BadRequest):
            raise item
        pool = self._state.pool
        # A cheap one here: a thread would cost more.
        run = pool.run_here if self._is_cheap(item) else pool.run_admitted
        self.check_admission()
        started_at = time.monotonic()
        pixels = await run(self._deadline, self._read, item)
        return await self._infer(pixels, started_at)

    async def answer_all(self, items: Sequence[Item]) -> list[Outcome]:
        """Answer images side by side; one that fails does not touch the others.

        Raises:
            ServiceError: when no image was answered and none of them is to blame: the request as
                a whole was refused or late.
        """
        # Two rounds of batches keep the backend busy; a request with more images than that waits
        # for itself and is not refused for it.
        places = asyncio.Semaphore(2 * self._model.profile.images_at_once)
        # One decode a thread: the images of other callers come in between.
        turns = asyncio.Semaphore(self._state.pool.threads)
        tasks = [asyncio.ensure_future(self._outcome(item, places, turns)) for item in items]
        try:
            outcomes = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # where one hit a fault of ours, or the caller left
                task.cancel()
        if time.monotonic() >= self._deadline:  # those that were in time are late by now
            outcomes = [_late() if isinstance(one, Answered) else one for one in outcomes]
        first = outcomes[0]
        refused = (Refused, DeadlineExceeded)
        if isinstance(first, refused) and all(isinstance(other, refused) for other in outcomes):
            raise first
        return outcomes

    async def _outcome(
        self, item: Item, places: asyncio.Semaphore, turns: asyncio.Semaphore
    ) -> Outcome:
        if isinstance(item, BadRequest):
            return item
        try:
            async with places:
                async with turns:
                    self._model.engine.check_admission(self._deadline)
                    started_at = time.monotonic()
                    pixels = await self._state.pool.run_admitted(self._deadline, self._read, item)
                return await self._infer(pixels, started_at)
        except ServiceError as error:
            return error

    async def _infer(self, pixels: Pixels, started_at: float) -> Answered:
        decode_seconds = time.monotonic() - started_at
        row = await self._model.engine.infer(pixels, deadline=self._deadline)
        stages = self._state.metrics.stage_duration
        stages["decode"].observe(decode_seconds)
        stages["queue"].observe(row.queue_seconds)
        stages["inference"].observe(row.inference_seconds)
        if time.monotonic() >= self._deadline:
            raise _late()
        return Answered(row, decode_seconds)

    def _is_cheap(self, data: bytes) -> bool:
        side = self._state.package.manifest.input.size
        return side * side <= DECODE_IN_PLACE_PIXELS and is_cheap(data)

    def _read(self, data: bytes) -> Pixels:
        settings = self._state.settings
        return read_image(
            data,
            self._state.package.manifest.input,
            max_pixels=settings.max_pixels,
            exif_orientation=settings.exif_orientation,
            decode=settings.decode,
        )


def note_outcomes(context: RequestContext, outcomes: Sequence[Outcome]) -> None:
    """Keep for the log what the slowest of each stage took."""
    answered = [outcome for outcome in outcomes if isinstance(outcome, Answered)]
    if answered:
        context.stage_ms = {
            "decode": milliseconds(max(outcome.decode_seconds for outcome in answered)),
            "queue": milliseconds(max(outcome.row.queue_seconds for outcome in answered)),
            "inference": milliseconds(max(outcome.row.inference_seconds for outcome in answered)),
        }


def milliseconds(seconds: float) -> float:
    """Return milliseconds to the microsecond."""
    return round(seconds * 1e3, 3)


def _late() -> DeadlineExceeded:
    return DeadlineExceeded("the deadline passed before the reply was written")
