"""Decoding is admitted by time as inference is, and large work does not hold up the loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

import pytest

from app.errors import DeadlineExceeded, Overloaded
from app.http.pool import HERE_SECONDS, CpuPool
from tests.servers import WAIT_SECONDS

FAR = 1e9
T = TypeVar("T")


@pytest.fixture
def pool() -> Iterator[CpuPool]:
    pool = CpuPool(threads=1, budget_seconds=1.0)
    yield pool
    pool.close()


def learn(pool: CpuPool, mean_seconds: float) -> None:
    """Have the pool believe that its jobs take so long."""
    pool._mean_seconds = mean_seconds


async def until_waiting(pool: CpuPool, jobs: int) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while pool._pending < jobs:
            await asyncio.sleep(0)


def test_an_idle_pool_admits_whatever_it_believes(pool: CpuPool) -> None:
    learn(pool, 60.0)

    assert pool.is_idle
    assert asyncio.run(pool.run_admitted(time.monotonic() + 1, lambda: 7)) == 7


def test_a_job_that_would_wait_too_long_is_refused_at_once(pool: CpuPool) -> None:
    gate = threading.Event()

    async def scenario() -> None:
        learn(pool, 0.4)
        jobs = [asyncio.create_task(pool.run(gate.wait, WAIT_SECONDS)) for _ in range(2)]
        await until_waiting(pool, 2)
        assert pool.wait_seconds() == pytest.approx(0.8)
        pool.check_admission(FAR)
        with pytest.raises(Overloaded, match="decoded"):  # beyond its own deadline
            await pool.run_admitted(time.monotonic() + 0.5, lambda: None)
        jobs.append(asyncio.create_task(pool.run(gate.wait, WAIT_SECONDS)))
        await until_waiting(pool, 3)
        with pytest.raises(Overloaded) as refused:  # over the budget
            await pool.run_admitted(FAR, lambda: None)
        assert refused.value.retry_after_seconds >= 1
        gate.set()
        assert await asyncio.gather(*jobs) == [True] * 3
        pool.check_admission(FAR)

    asyncio.run(scenario())


def test_a_job_that_has_waited_beyond_the_budget_is_not_begun() -> None:
    pool = CpuPool(threads=1, budget_seconds=0.05)
    gate = threading.Event()
    begun: list[int] = []

    async def scenario() -> None:
        plug = asyncio.create_task(pool.run(gate.wait, WAIT_SECONDS))
        await until_waiting(pool, 1)
        submitted_at = time.monotonic()
        late = asyncio.create_task(pool.run_admitted(FAR, begun.append, 1))
        await until_waiting(pool, 2)
        while time.monotonic() <= submitted_at + 0.06:
            await asyncio.sleep(0)
        gate.set()
        with pytest.raises(Overloaded):
            await late
        await plug

    asyncio.run(scenario())
    pool.close()
    assert begun == []


def test_a_passed_deadline_is_told_as_one_whether_the_pool_is_busy_or_not(pool: CpuPool) -> None:
    gate = threading.Event()

    async def scenario() -> None:
        with pytest.raises(DeadlineExceeded):
            pool.check_admission(time.monotonic() - 1)
        plug = asyncio.create_task(pool.run(gate.wait, WAIT_SECONDS))
        await until_waiting(pool, 1)
        with pytest.raises(DeadlineExceeded):
            pool.check_admission(time.monotonic() - 1)
        gate.set()
        await plug

    asyncio.run(scenario())


def test_threads_work_side_by_side_and_share_the_wait() -> None:
    pool = CpuPool(threads=2, budget_seconds=10)
    both = threading.Barrier(3, timeout=WAIT_SECONDS)
    gate = threading.Event()

    def meet() -> None:
        both.wait()
        gate.wait(WAIT_SECONDS)

    async def scenario() -> None:
        learn(pool, 0.4)
        jobs = [asyncio.create_task(pool.run(meet)) for _ in range(2)]
        await asyncio.to_thread(both.wait)  # fails where the two do not run at once
        assert pool.wait_seconds() == pytest.approx(1 * 0.4 / 2)  # the next thread to be free
        more = [asyncio.create_task(pool.run(gate.wait, WAIT_SECONDS)) for _ in range(2)]
        await until_waiting(pool, 4)
        assert pool.wait_seconds() == pytest.approx(3 * 0.4 / 2)
        gate.set()
        await asyncio.gather(*jobs, *more)

    asyncio.run(scenario())
    pool.close()


def test_a_job_that_runs_keeps_its_place_when_its_caller_leaves(pool: CpuPool) -> None:
    gate, running = threading.Event(), threading.Event()

    def job() -> None:
        running.set()
        gate.wait(WAIT_SECONDS)

    async def scenario() -> None:
        learn(pool, 3.0)
        task = asyncio.create_task(pool.run(job))
        await until_waiting(pool, 1)
        assert await asyncio.to_thread(running.wait, WAIT_SECONDS)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(Overloaded):  # the thread is busy all the same
            pool.check_admission(time.monotonic() + 1)
        gate.set()
        async with asyncio.timeout(WAIT_SECONDS):
            while pool._pending:
                await asyncio.sleep(0)

    asyncio.run(scenario())


def test_a_deadline_ends_the_wait_though_the_thread_is_busy(pool: CpuPool) -> None:
    gate = threading.Event()

    async def scenario() -> None:
        plug = asyncio.create_task(pool.run(gate.wait, WAIT_SECONDS))
        await until_waiting(pool, 1)
        with pytest.raises(DeadlineExceeded):
            await pool.run_admitted(time.monotonic() + 0.01, lambda: None)
        assert not plug.done()
        gate.set()
        await plug

    asyncio.run(scenario())


def test_a_cancelled_job_frees_its_place(pool: CpuPool) -> None:
    gate = threading.Event()
    begun: list[int] = []

    async def scenario() -> None:
        plug = asyncio.create_task(pool.run(gate.wait, WAIT_SECONDS))
        await until_waiting(pool, 1)
        waiting = asyncio.create_task(pool.run_admitted(FAR, begun.append, 1))
        await until_waiting(pool, 2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with asyncio.timeout(WAIT_SECONDS):
            while pool._pending > 1:
                await asyncio.sleep(0)
        gate.set()
        await plug

    asyncio.run(scenario())
    assert begun == []


def test_the_wait_follows_what_jobs_took(pool: CpuPool) -> None:
    asyncio.run(pool.run_admitted(FAR, time.sleep, 0.05))

    assert pool._mean_seconds >= 0.005
    assert pool.wait_seconds() == 0


async def fill_turn(pool: CpuPool, *jobs: Callable[[], T]) -> list[asyncio.Task[T]]:
    """Have this turn of the loop do all that it may, and these jobs wait for others."""
    pool._mean_share_seconds = 1e-9  # nobody is refused at the door
    filling = asyncio.create_task(pool.run_here(FAR, time.sleep, HERE_SECONDS))
    tasks = [asyncio.create_task(pool.run_here(FAR, job)) for job in jobs]
    await asyncio.sleep(0)
    assert filling.done()
    assert len(pool._waiting_here) == len(jobs)
    return tasks


def test_a_turn_of_the_loop_does_so_much_itself_and_no_more(pool: CpuPool) -> None:
    begun: list[tuple[int, int]] = []

    def begin(job: int, seconds: float) -> None:
        begun.append((job, pool._turn_jobs))
        time.sleep(seconds)

    async def scenario() -> None:
        await pool.run_here(FAR, begin, 0, 0.0)
        assert begun == [(0, 0)]  # the first of a turn waits for nothing
        jobs = (partial(begin, 1, 0.0), partial(begin, 2, HERE_SECONDS), partial(begin, 3, 0.0))
        tasks = await fill_turn(pool, *jobs)
        async with asyncio.timeout(WAIT_SECONDS):
            await asyncio.gather(*tasks)
        assert begun == [(0, 0), (1, 0), (2, 1), (3, 0)]  # in their order, in two turns
        assert pool.wait_seconds() == 0

    asyncio.run(scenario())


def test_what_waits_for_a_turn_of_the_loop_counts(pool: CpuPool) -> None:
    async def scenario() -> None:
        tasks = await fill_turn(pool, int, int, int)
        pool._mean_share_seconds = 0.4
        assert pool.wait_seconds() == pytest.approx(1.2)
        with pytest.raises(Overloaded):
            await pool.run_here(FAR, int)
        tasks[0].cancel()  # its caller left
        await asyncio.sleep(0)
        async with asyncio.timeout(WAIT_SECONDS):
            assert await asyncio.gather(*tasks[1:]) == [0, 0]
        assert await pool.run_here(FAR, int) == 0

    asyncio.run(scenario())


def test_a_turn_learns_what_it_takes_for_each_of_its_jobs(pool: CpuPool) -> None:
    async def scenario() -> None:
        await asyncio.gather(*await fill_turn(pool, int))

    asyncio.run(scenario())
    assert pool._mean_share_seconds > HERE_SECONDS / 50


def test_who_leaves_while_it_waits_for_a_turn_leaves_the_line(pool: CpuPool) -> None:
    begun: list[int] = []

    async def scenario() -> None:
        filling = partial(time.sleep, HERE_SECONDS)
        tasks = await fill_turn(pool, filling, partial(begun.append, 1), partial(begun.append, 2))
        tasks[1].cancel()
        async with asyncio.timeout(WAIT_SECONDS):
            with pytest.raises(asyncio.CancelledError):
                await tasks[1]
            await tasks[2]
        assert not pool._waiting_here

    asyncio.run(scenario())
    assert begun == [2]


def test_who_has_waited_for_a_turn_beyond_the_budget_is_told_so() -> None:
    pool = CpuPool(threads=1, budget_seconds=HERE_SECONDS / 2)

    async def scenario() -> None:
        tasks = await fill_turn(pool, partial(time.sleep, HERE_SECONDS), int)
        await tasks[0]
        with pytest.raises(Overloaded):
            await tasks[1]

    asyncio.run(scenario())
    pool.close()


def test_a_deadline_ends_the_wait_for_a_turn(pool: CpuPool) -> None:
    begun: list[int] = []

    async def scenario() -> None:
        plug = [partial(time.sleep, HERE_SECONDS) for _ in range(5)]
        await fill_turn(pool, *plug)
        with pytest.raises(DeadlineExceeded):
            await pool.run_here(time.monotonic() + HERE_SECONDS, begun.append, 1)
        assert len(pool._waiting_here) < len(plug)

    asyncio.run(scenario())
    assert begun == []


def test_a_failure_comes_back_from_either_place(pool: CpuPool) -> None:
    def fail() -> None:
        raise ValueError("no")

    async def scenario() -> None:
        with pytest.raises(ValueError, match="no"):
            await pool.run(fail)
        with pytest.raises(ValueError, match="no"):
            await pool.run_here(FAR, fail)
        (task,) = await fill_turn(pool, fail)
        with pytest.raises(ValueError, match="no"):
            await task
        assert pool._pending == 0

    asyncio.run(scenario())
