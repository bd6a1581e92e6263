"""LocalEngine: what only an engine in the callers' own process meets."""

from __future__ import annotations

import time

from app.engine.base import Engine
from app.engine.local import LocalEngine
from tests.engine.doubles import WatchedBackend, assert_row_of, run, running
from tests.engine.test_contract import hold_one, infer


def test_a_loop_that_closed_before_the_reply_does_not_hurt_the_engine() -> None:
    backend = WatchedBackend(shut=True)

    async def leave_early(engine: Engine) -> None:
        await hold_one(engine, backend, 1)  # asyncio.run cancels it and closes the loop

    with running(backend, clock=time.monotonic) as core:
        engine = LocalEngine(core)
        run(leave_early(engine))
        assert engine.status().in_flight == 1
        backend.gate.set()
        assert_row_of(2, run(infer(engine, 2)))
    assert backend.batches == [[1], [2]]
