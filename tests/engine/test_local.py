"""LocalEngine: what only an engine in the callers' own process meets."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from app.engine.base import Engine
from app.engine.local import LocalEngine
from tests.engine.doubles import WatchedBackend, assert_row_of, run, running
from tests.engine.test_contract import hold_one, infer


def test_the_answers_of_one_batch_wake_the_loop_once() -> None:
    backend = WatchedBackend()
    wakes: list[str] = []

    async def scenario(engine: Engine) -> None:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counted(callback: Callable[..., Any], *args: Any, **kwargs: Any) -> asyncio.Handle:
            wakes.append(threading.current_thread().name)
            return wake(callback, *args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign,assignment]
        await asyncio.gather(*(infer(engine, value) for value in range(8)))

    with running(backend, max_batch_size=8, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core)))
    assert backend.batches == [list(range(8))]
    assert [name for name in wakes if name.startswith("engine-")] == ["engine-0"]


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
