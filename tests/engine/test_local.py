"""LocalEngine: the engine's promise as asyncio sees it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from app.engine.base import Engine
from app.engine.local import LocalEngine
from app.engine.timing import ServiceTimes
from app.errors import DeadlineExceeded, Draining, InferenceFailed, Overloaded
from app.types import Row
from tests.engine.doubles import (
    PATIENCE_SECONDS,
    WatchedBackend,
    assert_row_of,
    pixels_of,
    raise_for,
    running,
)

T = TypeVar("T")


def run(scenario: Coroutine[Any, Any, T]) -> T:
    """Run a scenario in a loop of its own; what goes wrong in the loop's callbacks counts."""
    faults: list[dict[str, Any]] = []

    async def within_patience() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
        async with asyncio.timeout(3 * PATIENCE_SECONDS):
            return await scenario

    result = asyncio.run(within_patience())
    assert faults == []
    return result


def later() -> float:
    return time.monotonic() + 3600


async def infer(engine: Engine, value: int) -> Row:
    return await engine.infer(pixels_of(value), deadline=later())


async def start(engine: Engine, value: int) -> asyncio.Task[Row]:
    """Start an infer and let it come as far as its wait."""
    task = asyncio.ensure_future(infer(engine, value))
    await asyncio.sleep(0)
    return task


async def hold_one(engine: Engine, backend: WatchedBackend, value: int = 0) -> asyncio.Task[Row]:
    """Start an infer and wait until it keeps the backend busy."""
    task = await start(engine, value)
    await asyncio.to_thread(backend.wait_for_batch)
    return task


def test_infer_returns_its_row() -> None:
    backend = WatchedBackend()
    with running(backend, clock=time.monotonic) as core:
        row = run(infer(LocalEngine(core), 42))
    assert_row_of(42, row)
    assert row.queue_seconds >= 0
    assert row.inference_seconds >= 0


def test_two_hundred_concurrent_infers_each_get_their_own() -> None:
    backend = WatchedBackend()

    async def scenario(engine: Engine) -> list[Row]:
        return await asyncio.gather(*(infer(engine, value) for value in range(200)))

    with running(backend, max_batch_size=16, clock=time.monotonic) as core:
        rows = run(scenario(LocalEngine(core)))
    for value, row in enumerate(rows):
        assert_row_of(value, row)
    assert sorted(value for batch in backend.batches for value in batch) == list(range(200))
    assert len(backend.batches) < 200


@given(
    values=st.lists(st.integers(0, 255), min_size=1, max_size=30, unique=True),
    leavers=st.sets(st.integers(0, 29)),
    culprits=st.sets(st.integers(0, 255), max_size=3),
    max_batch_size=st.integers(1, 8),
    lanes=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_whoever_stays_gets_one_answer_its_own_whatever_the_others_do(
    values: list[int], leavers: set[int], culprits: set[int], max_batch_size: int, lanes: int
) -> None:
    backend = WatchedBackend(spoil=raise_for(*culprits), lanes=lanes)

    async def scenario(engine: Engine) -> list[Row | BaseException]:
        tasks = [await start(engine, value) for value in values]
        for index in leavers & set(range(len(tasks))):
            tasks[index].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with running(backend, max_batch_size=max_batch_size, clock=time.monotonic) as core:
        answers = run(scenario(LocalEngine(core)))
        assert core.status().queue_depth == 0
    for index, (value, answer) in enumerate(zip(values, answers, strict=True)):
        if index in leavers and isinstance(answer, asyncio.CancelledError):
            continue
        if value in culprits:
            assert isinstance(answer, InferenceFailed)
        else:
            assert isinstance(answer, Row), repr(answer)
            assert_row_of(value, answer)
    assert max((len(batch) for batch in backend.batches), default=0) <= max_batch_size


def test_a_failed_image_raises_for_its_caller_alone() -> None:
    backend = WatchedBackend(spoil=raise_for(2))

    async def scenario(engine: Engine) -> list[Row | BaseException]:
        tasks = (infer(engine, value) for value in range(1, 4))
        return await asyncio.gather(*tasks, return_exceptions=True)

    with running(backend, clock=time.monotonic) as core:
        first, culprit, last = run(scenario(LocalEngine(core)))
    assert isinstance(first, Row)
    assert isinstance(culprit, InferenceFailed)
    assert isinstance(last, Row)


def test_a_call_cancelled_while_it_waits_frees_its_place() -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        plug = await hold_one(engine, backend)
        gone, stays = await start(engine, 1), await start(engine, 2)
        assert engine.status().queue_depth == 2
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert engine.status().queue_depth == 1
        backend.gate.set()
        assert_row_of(0, await plug)
        assert_row_of(2, await stays)

    with running(backend, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core)))
    assert backend.batches == [[0], [2]]


def test_a_call_cancelled_in_its_batch_leaves_the_neighbours_theirs() -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        gone = await hold_one(engine, backend, 1)
        stays = await start(engine, 2)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert engine.status().in_flight == 1, "a running batch cannot be called back"
        backend.gate.set()
        assert_row_of(2, await stays)

    with running(backend, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core)))
    assert backend.batches == [[1], [2]]


def test_a_deadline_is_kept_while_the_backend_is_busy() -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        plug = await hold_one(engine, backend)
        with pytest.raises(DeadlineExceeded):
            await engine.infer(pixels_of(1), deadline=time.monotonic() + 0.02)
        assert not backend.gate.is_set(), "nothing but the clock has answered"
        assert engine.status().queue_depth == 0
        backend.gate.set()
        assert_row_of(0, await plug)

    with running(backend, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core)))
    assert backend.batches == [[0]]


def test_a_deadline_is_kept_by_an_image_inside_a_backend_that_hangs() -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        with pytest.raises(DeadlineExceeded):
            await engine.infer(pixels_of(1), deadline=time.monotonic() + 0.02)

    with running(backend, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core)))


def test_every_deadline_is_kept_in_whatever_order_they_come_and_pass() -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        plug = await hold_one(engine, backend)
        now, passed = time.monotonic(), []

        async def wait_for(milliseconds: int) -> None:
            with pytest.raises(DeadlineExceeded):
                await engine.infer(pixels_of(1), deadline=now + milliseconds / 1000)
            assert time.monotonic() >= now + milliseconds / 1000
            passed.append(milliseconds)

        await asyncio.gather(*map(wait_for, [60, 20, 100, 20, 40]))
        assert passed == [20, 20, 40, 60, 100]
        assert engine.status().queue_depth == 0
        backend.gate.set()
        assert_row_of(0, await plug)

    with running(backend, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core)))
    assert backend.batches == [[0]]


def test_requests_of_one_turn_of_the_loop_reach_an_idle_engine_in_one_batch() -> None:
    backend = WatchedBackend()

    async def scenario(engine: Engine) -> None:
        for values in (range(8), range(8, 12)):
            await asyncio.gather(*(infer(engine, value) for value in values))

    with running(backend, max_batch_size=16, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core)))
    assert backend.batches == [list(range(8)), list(range(8, 12))]


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


def test_a_deadline_in_the_past_is_refused_before_the_queue() -> None:
    backend = WatchedBackend()

    async def scenario(engine: Engine) -> None:
        with pytest.raises(DeadlineExceeded):
            await engine.infer(pixels_of(1), deadline=time.monotonic() - 1)

    with running(backend, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core)))
    assert backend.batches == []


def test_check_admission_raises_what_infer_would() -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        engine.check_admission(later())
        await hold_one(engine, backend)
        with pytest.raises(Overloaded):
            engine.check_admission(later())
        with pytest.raises(Overloaded):
            await infer(engine, 1)
        backend.gate.set()

    times = ServiceTimes({1: 9.0})
    with running(backend, times=times, queue_budget_seconds=5, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core)))
    assert backend.batches == [[0]]


def test_refuse_waiting_raises_draining_for_those_who_wait() -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        plug = await hold_one(engine, backend)
        waiting = await start(engine, 1)
        engine.refuse_waiting()
        with pytest.raises(Draining):
            await waiting
        backend.gate.set()
        assert_row_of(0, await plug)

    with running(backend, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core)))


def test_aclose_answers_the_admitted_and_refuses_new_ones() -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        admitted = [await hold_one(engine, backend), *[await start(engine, n) for n in (1, 2)]]
        closing = asyncio.ensure_future(engine.aclose())
        while True:
            try:
                engine.check_admission(later())
            except Draining:
                break
            await asyncio.sleep(0)
        with pytest.raises(Draining):
            await infer(engine, 3)
        assert not closing.done()
        backend.gate.set()
        await closing
        for value, task in enumerate(admitted):
            assert_row_of(value, await task)

    with running(backend, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core)))
    assert backend.seen == {0, 1, 2}
    assert backend.closed >= 1


def test_aclose_leaves_a_backend_that_hangs_after_the_drain_timeout() -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        hanging, waiting = await hold_one(engine, backend), await start(engine, 1)
        await engine.aclose()
        with pytest.raises(Draining):
            await waiting
        assert not hanging.done()
        backend.gate.set()
        assert_row_of(0, await hanging)

    with running(backend, clock=time.monotonic) as core:
        run(scenario(LocalEngine(core, close_timeout_seconds=0.01)))


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
