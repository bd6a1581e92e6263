"""Whom every engine refuses, and when it tells them to come back; here and in another process."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from app.engine.base import Engine
from app.engine.timing import ServiceTimes
from app.errors import Overloaded
from tests.engine.doubles import WatchedBackend, pixels_of, run, running
from tests.engine.processes import connected, hosted, meeting_place, until
from tests.engine.test_contract import Engines, local, remote, start


@pytest.fixture(params=[local, remote], scope="module")
def engines(request: pytest.FixtureRequest) -> Engines:
    opener: Engines = request.param
    return opener


def within(seconds: float) -> float:
    return time.monotonic() + seconds


def refusal(ask: Callable[[], None]) -> Overloaded:
    with pytest.raises(Overloaded) as raised:
        ask()
    return raised.value


async def busy(engine: Engine, backend: WatchedBackend) -> None:
    """Have one batch run, and see that the engine knows."""
    await start(engine, 0)
    await until(lambda: len(backend.batches) == 1, "a batch runs")
    await until(lambda: engine.status().in_flight == 1, "the batch is seen")


def test_the_time_before_the_queue_counts_against_budget_and_deadline(engines: Engines) -> None:
    async def scenario(engine: Engine) -> None:
        engine.check_admission(within(3600), ahead_seconds=300)
        with pytest.raises(Overloaded):
            engine.check_admission(within(3600), ahead_seconds=700)
        with pytest.raises(Overloaded):
            engine.check_admission(within(200), ahead_seconds=300)

    with engines(WatchedBackend(), queue_budget_seconds=500) as served:
        served.run(scenario)


def test_a_busy_engine_keeps_time_for_the_batch_itself_an_idle_one_tries(engines: Engines) -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        engine.check_admission(within(10))  # what was learned may be wrong
        await busy(engine, backend)
        engine.check_admission(within(3600))
        with pytest.raises(Overloaded):  # the running batch would end in time, the next would not
            engine.check_admission(within(900))
        with pytest.raises(Overloaded):
            await engine.infer(pixels_of(1), deadline=within(900))
        backend.gate.set()

    times = ServiceTimes({1: 600.0})
    with engines(backend, times=times, queue_budget_seconds=3600) as served:
        served.run(scenario)
    assert backend.batches == [[0]]


def test_retry_after_grows_with_the_excess(engines: Engines) -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        before = refusal(lambda: engine.check_admission(within(3600), ahead_seconds=105.0))
        assert 99 <= before.retry_after_seconds <= 202
        await busy(engine, backend)
        checked = refusal(lambda: engine.check_admission(within(3600)))
        with pytest.raises(Overloaded) as asked:
            await engine.infer(pixels_of(1), deadline=within(3600))
        for refused in (checked, asked.value):  # 1000 s to wait, 5 s are the budget
            assert 900 <= refused.retry_after_seconds <= 2000
        backend.gate.set()

    times = ServiceTimes({1: 1000.0})
    with engines(backend, times=times, queue_budget_seconds=5) as served:
        served.run(scenario)


def test_without_a_free_slot_retry_after_is_the_wait_beyond_the_budget() -> None:
    backend = WatchedBackend(shut=True)
    # The host has slots for two batches of four and what fits two seconds; the core waits longer.
    with (
        meeting_place() as place,
        running(backend, max_batch_size=1, times=ServiceTimes({1: 100.0}), clock=time.monotonic)
        as core,
        hosted(place, core, backend, {4: 4.0}),
    ):  # fmt: skip

        async def scenario() -> None:
            async with connected(place, queue_budget_seconds=2.0) as engine:
                tasks = [await start(engine, value) for value in range(10)]
                await until(lambda: core.status().queue_depth == 9, "all slots are taken")
                await until(lambda: engine.status().queue_depth == 9, "the board says so")
                with pytest.raises(Overloaded) as asked:
                    await engine.infer(pixels_of(10), deadline=within(3600))
                assert 800 <= asked.value.retry_after_seconds <= 2000
                backend.gate.set()
                for task in tasks:
                    await task

        run(scenario())
