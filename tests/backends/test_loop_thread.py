"""An event loop in a thread: callers get their answer, and are never left waiting."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor

import pytest

from app.backends.loop_thread import LoopThread

PATIENCE_SECONDS = 20.0


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    loop = LoopThread("under test")
    yield loop
    if not loop.is_closed:
        loop.close()
    assert "under test" not in {one.name for one in threading.enumerate()}


async def thread_name() -> str:
    return threading.current_thread().name


async def forever(started: threading.Event) -> None:
    started.set()
    await asyncio.Event().wait()


def test_a_coroutine_runs_in_the_loops_thread(loop: LoopThread) -> None:
    assert loop.call(thread_name()) == "under test"


def test_what_a_coroutine_raises_comes_out(loop: LoopThread) -> None:
    async def fail() -> None:
        raise ValueError("as said")

    with pytest.raises(ValueError, match="as said"):
        loop.call(fail())


def test_a_call_that_takes_too_long_is_cancelled(loop: LoopThread) -> None:
    cancelled = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    with pytest.raises(TimeoutError):
        loop.call(wait(), timeout_seconds=0.05)
    assert cancelled.wait(PATIENCE_SECONDS), "the coroutine still runs"


def test_closing_ends_every_call_that_waits(loop: LoopThread) -> None:
    started = [threading.Event() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(loop.call, forever(one)) for one in started]
        for one in started:
            assert one.wait(PATIENCE_SECONDS), "a call did not start"
        loop.close()
        for call in calls:
            with pytest.raises(CancelledError):
                call.result(PATIENCE_SECONDS)
