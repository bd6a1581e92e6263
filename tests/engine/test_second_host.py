"""What a host left unanswered is held against what the next one says of itself."""

from __future__ import annotations

import asyncio
import time

import pytest

from app.errors import BackendUnavailable
from tests.engine.doubles import PATIENCE_SECONDS, pixels_of, run
from tests.engine.processes import connected, meeting_place, until


def test_what_a_slower_host_could_not_answer_in_time_is_not_handed_to_it() -> None:
    async def scenario() -> None:
        async with connected(place, patience_seconds=3600.0) as engine:
            deadline = time.monotonic() + 2 * PATIENCE_SECONDS
            task = asyncio.ensure_future(engine.infer(pixels_of(1), deadline=deadline))
            await until(lambda: place.in_flight() == 1, "a batch runs")
            first.kill()
            await until(lambda: not engine.is_ready, "the first is gone")
            assert not task.done(), "it waits for the next"
            place.start_host(batch_seconds=3600.0)  # which would answer all the same
            with pytest.raises(BackendUnavailable):
                await task

    with meeting_place() as place:
        first = place.start_host(holds=True)
        run(scenario())
