"""What every engine promises: one suite over the core in this process and in another's hands."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from app.engine.base import Engine
from app.engine.core import EngineCore
from app.engine.local import LocalEngine
from app.engine.timing import ServiceTimes
from app.errors import DeadlineExceeded, Draining, InferenceFailed, Overloaded
from app.types import Row
from tests.engine.doubles import (
    FAR_AHEAD,
    WatchedBackend,
    assert_row_of,
    pixels_of,
    raise_for,
    run,
    running,
)
from tests.engine.processes import Place, connected, eventually, hosted, meeting_place, until

T = TypeVar("T")

Scenario = Callable[[Engine], Coroutine[Any, Any, T]]


class Served(Protocol):
    """A core at work, and an engine over it for each scenario."""

    core: EngineCore

    def run(self, scenario: Scenario[T]) -> T:
        """Run a scenario in a loop of its own."""
        ...


@dataclass
class ServedHere:
    """Through a LocalEngine."""

    core: EngineCore
    close_timeout_seconds: float

    def run(self, scenario: Scenario[T]) -> T:
        return run(scenario(LocalEngine(self.core, self.close_timeout_seconds)))


@dataclass
class ServedElsewhere:
    """Through a RemoteEngine, a real socket and shared memory."""

    core: EngineCore
    close_timeout_seconds: float
    place: Place
    queue_budget_seconds: float

    def run(self, scenario: Scenario[T]) -> T:
        async def session() -> T:
            async with connected(
                self.place,
                queue_budget_seconds=self.queue_budget_seconds,
                close_timeout_seconds=self.close_timeout_seconds,
            ) as engine:
                return await scenario(engine)

        return run(session())


class Engines(Protocol):
    """Opens engines of one kind."""

    def __call__(
        self,
        backend: WatchedBackend,
        *,
        close_timeout_seconds: float = 1.0,
        queue_budget_seconds: float = FAR_AHEAD,
        max_batch_size: int = 4,
        times: ServiceTimes | None = None,
    ) -> AbstractContextManager[Served]: ...


@contextmanager
def local(
    backend: WatchedBackend, *, close_timeout_seconds: float = 1.0, **options: Any
) -> Iterator[Served]:
    with running(backend, clock=time.monotonic, **options) as core:
        yield ServedHere(core, close_timeout_seconds)


@contextmanager
def remote(
    backend: WatchedBackend, *, close_timeout_seconds: float = 1.0, **options: Any
) -> Iterator[Served]:
    known = options["times"].as_dict() if "times" in options else {}
    budget = options.get("queue_budget_seconds", FAR_AHEAD)
    with (
        meeting_place() as place,
        running(backend, clock=time.monotonic, **options) as core,
        hosted(place, core, backend, known),
    ):
        yield ServedElsewhere(core, close_timeout_seconds, place, budget)


@pytest.fixture(params=[local, remote], scope="module")
def engines(request: pytest.FixtureRequest) -> Engines:
    opener: Engines = request.param
    return opener


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


def test_infer_returns_its_row(engines: Engines) -> None:
    backend = WatchedBackend()
    with engines(backend) as served:
        row = served.run(lambda engine: infer(engine, 42))
    assert_row_of(42, row)
    assert row.queue_seconds >= 0
    assert row.inference_seconds >= 0


def test_two_hundred_concurrent_infers_each_get_their_own(engines: Engines) -> None:
    backend = WatchedBackend()

    async def scenario(engine: Engine) -> list[Row]:
        return await asyncio.gather(*(infer(engine, value) for value in range(200)))

    with engines(backend, max_batch_size=16) as served:
        rows = served.run(scenario)
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
    engines: Engines,
    values: list[int],
    leavers: set[int],
    culprits: set[int],
    max_batch_size: int,
    lanes: int,
) -> None:
    backend = WatchedBackend(spoil=raise_for(*culprits), lanes=lanes)

    async def scenario(engine: Engine) -> list[Row | BaseException]:
        tasks = [await start(engine, value) for value in values]
        for index in leavers & set(range(len(tasks))):
            tasks[index].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with engines(backend, max_batch_size=max_batch_size) as served:
        answers = served.run(scenario)
        eventually(lambda: served.core.status().queue_depth == 0, "nothing waits")
    for index, (value, answer) in enumerate(zip(values, answers, strict=True)):
        if index in leavers and isinstance(answer, asyncio.CancelledError):
            continue
        if value in culprits:
            assert isinstance(answer, InferenceFailed)
        else:
            assert isinstance(answer, Row), repr(answer)
            assert_row_of(value, answer)
    assert max((len(batch) for batch in backend.batches), default=0) <= max_batch_size


def test_a_failed_image_raises_for_its_caller_alone(engines: Engines) -> None:
    backend = WatchedBackend(spoil=raise_for(2))

    async def scenario(engine: Engine) -> list[Row | BaseException]:
        tasks = (infer(engine, value) for value in range(1, 4))
        return await asyncio.gather(*tasks, return_exceptions=True)

    with engines(backend) as served:
        first, culprit, last = served.run(scenario)
    assert isinstance(first, Row)
    assert isinstance(culprit, InferenceFailed)
    assert isinstance(last, Row)


def test_a_call_cancelled_while_it_waits_frees_its_place(engines: Engines) -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        plug = await hold_one(engine, backend)
        gone, stays = await start(engine, 1), await start(engine, 2)
        await until(lambda: engine.status().queue_depth == 2, "two wait")
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await until(lambda: engine.status().queue_depth == 1, "the one who left freed its place")
        backend.gate.set()
        assert_row_of(0, await plug)
        assert_row_of(2, await stays)

    with engines(backend) as served:
        served.run(scenario)
    assert backend.batches == [[0], [2]]


def test_a_call_cancelled_in_its_batch_leaves_the_neighbours_theirs(engines: Engines) -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        gone = await hold_one(engine, backend, 1)
        stays = await start(engine, 2)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        await until(lambda: engine.status().in_flight == 1, "a batch runs, not to be called back")
        backend.gate.set()
        assert_row_of(2, await stays)

    with engines(backend) as served:
        served.run(scenario)
    assert backend.batches == [[1], [2]]


def test_a_deadline_is_kept_while_the_backend_is_busy(engines: Engines) -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        plug = await hold_one(engine, backend)
        with pytest.raises(DeadlineExceeded):
            await engine.infer(pixels_of(1), deadline=time.monotonic() + 0.02)
        assert not backend.gate.is_set(), "nothing but the clock has answered"
        await until(lambda: engine.status().queue_depth == 0, "nothing waits")
        backend.gate.set()
        assert_row_of(0, await plug)

    with engines(backend) as served:
        served.run(scenario)
    assert backend.batches == [[0]]


def test_a_deadline_is_kept_by_an_image_inside_a_backend_that_hangs(engines: Engines) -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        with pytest.raises(DeadlineExceeded):
            await engine.infer(pixels_of(1), deadline=time.monotonic() + 0.02)

    with engines(backend) as served:
        served.run(scenario)


def test_every_deadline_is_kept_in_whatever_order_they_come_and_pass(engines: Engines) -> None:
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
        await until(lambda: engine.status().queue_depth == 0, "nothing waits")
        backend.gate.set()
        assert_row_of(0, await plug)

    with engines(backend) as served:
        served.run(scenario)
    assert backend.batches == [[0]]


def test_requests_of_one_turn_of_the_loop_reach_an_idle_engine_in_one_batch(
    engines: Engines,
) -> None:
    backend = WatchedBackend()

    async def scenario(engine: Engine) -> None:
        for values in (range(8), range(8, 12)):
            await asyncio.gather(*(infer(engine, value) for value in values))

    with engines(backend, max_batch_size=16) as served:
        served.run(scenario)
    assert backend.batches == [list(range(8)), list(range(8, 12))]


def test_a_deadline_in_the_past_is_refused_before_the_queue(engines: Engines) -> None:
    backend = WatchedBackend()

    async def scenario(engine: Engine) -> None:
        with pytest.raises(DeadlineExceeded):
            await engine.infer(pixels_of(1), deadline=time.monotonic() - 1)

    with engines(backend) as served:
        served.run(scenario)
    assert backend.batches == []


def test_check_admission_raises_what_infer_would(engines: Engines) -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        engine.check_admission(later())
        await hold_one(engine, backend)
        await until(lambda: engine.status().in_flight == 1, "the batch is seen")
        with pytest.raises(Overloaded):
            engine.check_admission(later())
        with pytest.raises(Overloaded):
            await infer(engine, 1)
        backend.gate.set()

    times = ServiceTimes({1: 9.0})
    with engines(backend, times=times, queue_budget_seconds=5) as served:
        served.run(scenario)
    assert backend.batches == [[0]]


def test_refuse_waiting_raises_draining_for_those_who_wait(engines: Engines) -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        plug = await hold_one(engine, backend)
        waiting = await start(engine, 1)
        engine.refuse_waiting()
        with pytest.raises(Draining):
            await waiting
        backend.gate.set()
        assert_row_of(0, await plug)

    with engines(backend) as served:
        served.run(scenario)


def test_aclose_answers_the_admitted_and_refuses_new_ones(engines: Engines) -> None:
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

    with engines(backend) as served:
        served.run(scenario)
    assert backend.seen == {0, 1, 2}
    assert backend.closed >= 1


def test_aclose_leaves_a_backend_that_hangs_after_the_drain_timeout(engines: Engines) -> None:
    backend = WatchedBackend(shut=True)

    async def scenario(engine: Engine) -> None:
        hanging, waiting = await hold_one(engine, backend), await start(engine, 1)
        await engine.aclose()
        with pytest.raises(Draining):
            await waiting
        assert not hanging.done()
        backend.gate.set()
        assert_row_of(0, await hanging)

    with engines(backend, close_timeout_seconds=0.01) as served:
        served.run(scenario)
