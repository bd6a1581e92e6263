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


def test_a_call_that_comes_while_the_loop_closes_is_refused_at_once(loop: LoopThread) -> None:
    started, ending, refused = (threading.Event() for _ in range(3))

    async def end_slowly() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ending.set()
            assert refused.wait(PATIENCE_SECONDS), "the late call was not refused"

    def call_late() -> None:
        assert ending.wait(PATIENCE_SECONDS), "the loop does not close"
        try:
            loop.call(thread_name(), PATIENCE_SECONDS / 2)
        finally:
            refused.set()

    with ThreadPoolExecutor(2) as pool:
        first, late = pool.submit(loop.call, end_slowly()), pool.submit(call_late)
        assert started.wait(PATIENCE_SECONDS), "the first call did not start"
        loop.close()
        for call in (first, late):
            with pytest.raises(CancelledError):
                call.result(PATIENCE_SECONDS)
    with pytest.raises(CancelledError):
        loop.call(thread_name())


def test_closing_ends_what_a_call_leaves_behind(loop: LoopThread) -> None:
    started, left = threading.Event(), threading.Event()

    async def leave_another() -> None:
        try:
            await forever(started)
        finally:
            behind.append(asyncio.create_task(forever(left)))

    behind: list[asyncio.Task[None]] = []
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(loop.call, leave_another())
        assert started.wait(PATIENCE_SECONDS), "the call did not start"
        loop.close()
        with pytest.raises(CancelledError):
            call.result(PATIENCE_SECONDS)
    assert behind[0].cancelled()


def test_a_call_that_ends_as_the_loop_stops_has_its_answer(loop: LoopThread) -> None:
    async def stop_and_answer() -> str:
        with pytest.raises(RuntimeError, match="cannot join current thread"):
            loop.close()
        await asyncio.sleep(0)  # the next turn is the last one
        return "answer"

    assert loop.call(stop_and_answer(), PATIENCE_SECONDS) == "answer"
    loop.close()


def test_closing_again_is_nothing(loop: LoopThread) -> None:
    loop.close()
    loop.close()
    assert loop.is_closed
