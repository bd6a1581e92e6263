"""RemoteEngine: several workers on one host, and either side dying: real processes."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvloop

from app.backends.base import BackendInfo
from app.engine.base import Engine
from app.engine.shared import remote
from app.engine.shared.link import Link, connect
from app.engine.shared.remote import RemoteEngine
from app.engine.shared.wire import Greeting
from app.errors import BackendUnavailable, DeadlineExceeded, Draining, Overloaded
from app.types import Pixels, Row
from tests.engine.doubles import (
    PATIENCE_SECONDS,
    WatchedBackend,
    assert_row_of,
    pixels_of,
    run,
    running,
)
from tests.engine.processes import (
    PACKAGE,
    Place,
    connected,
    eventually,
    hosted,
    meeting_place,
    open_descriptors,
    slot_maps,
    until,
)


@pytest.fixture
def place() -> Iterator[Place]:
    with meeting_place() as place:
        yield place


def soon() -> float:
    return time.monotonic() + 3 * PATIENCE_SECONDS


def ask(engine: Engine, value: int, deadline: float | None = None) -> asyncio.Task[Row]:
    return asyncio.ensure_future(engine.infer(pixels_of(value), deadline=deadline or soon()))


async def in_flight_on(place: Place, count: int) -> None:
    await until(lambda: place.in_flight() == count, f"{count} images run")


def test_images_of_two_workers_share_a_batch(place: Place) -> None:
    backend = WatchedBackend(shut=True)

    async def scenario() -> None:
        async with connected(place) as one, connected(place) as other:
            plug = ask(one, 0)
            await asyncio.to_thread(backend.wait_for_batch)
            tasks = [ask(one, 1), ask(other, 2), ask(one, 3), ask(other, 4)]
            await until(lambda: core.status().queue_depth == 4, "all four wait")
            backend.gate.set()
            for value, task in enumerate([plug, *tasks]):
                assert_row_of(value, await task)

    with running(backend, clock=time.monotonic) as core, hosted(place, core, backend):
        run(scenario())
    assert [set(batch) for batch in backend.batches] == [{0}, {1, 2, 3, 4}]


def test_a_loop_of_uvloop_is_served_and_reconnects_as_well(place: Place) -> None:
    first = place.start_host(holds=True)

    async def scenario() -> None:
        async with asyncio.timeout(3 * PATIENCE_SECONDS), connected(place) as engine:
            tasks = [ask(engine, value) for value in range(3)]
            await until(lambda: place.in_flight() > 0, "a batch runs")
            first.kill()
            await until(lambda: not engine.is_ready, "readiness goes off")
            place.start_host()
            for value, task in enumerate(tasks):
                assert_row_of(value, await task)

    uvloop.run(scenario())


def test_a_new_host_answers_what_a_killed_one_left(place: Place) -> None:
    first = place.start_host(holds=True)

    async def scenario() -> None:
        async with connected(place) as engine:
            tasks = [ask(engine, value) for value in range(3)]
            await until(lambda: place.in_flight() > 0, "a batch runs")
            first.kill()
            await until(lambda: not engine.is_ready, "readiness goes off")
            with pytest.raises(BackendUnavailable) as refusal:
                engine.check_admission(soon())
            assert refusal.value.retry_after_seconds >= 1
            with pytest.raises(BackendUnavailable):
                await ask(engine, 9)
            assert engine.status().stalled_seconds == 0, "it refuses, it does not stall"
            assert not any(task.done() for task in tasks)
            place.start_host()
            for value, task in enumerate(tasks):
                assert_row_of(value, await task)
            assert engine.is_ready

    run(scenario())


def test_what_two_hosts_died_of_is_not_tried_on_a_third(place: Place) -> None:
    first = place.start_host(holds=True)

    async def scenario() -> None:
        async with connected(place) as engine:
            task = ask(engine, 1)
            await in_flight_on(place, 1)
            first.kill()
            await until(lambda: not engine.is_ready, "the first is gone")
            place.board.withdraw(0)
            second = place.start_host(holds=True)
            await in_flight_on(place, 1)
            second.kill()
            await until(lambda: not engine.is_ready, "the second is gone")
            place.start_host()
            await until(lambda: engine.is_ready, "the third is there")
            assert_row_of(2, await ask(engine, 2))
            with pytest.raises(BackendUnavailable):
                await task

    run(scenario())


def test_without_a_new_host_nobody_waits_longer_than_patience_or_deadline(place: Place) -> None:
    host = place.start_host(holds=True)

    async def scenario() -> None:
        async with connected(place, patience_seconds=0.2) as engine:
            patient, hurried = ask(engine, 1), ask(engine, 2, time.monotonic() + 0.1)
            await until(lambda: place.in_flight() > 0, "a batch runs")
            host.kill()
            for task in (patient, hurried):
                with pytest.raises((BackendUnavailable, DeadlineExceeded)):
                    await task
            assert isinstance(patient.exception(), BackendUnavailable)

    run(scenario())


def test_a_deadline_that_no_other_host_could_meet_is_refused_at_once(place: Place) -> None:
    host = place.start_host(holds=True, batch_seconds=3600.0)

    async def scenario() -> None:
        async with connected(place, patience_seconds=3600.0) as engine:
            task = ask(engine, 1)
            await in_flight_on(place, 1)
            host.kill()
            with pytest.raises(BackendUnavailable):
                await task

    run(scenario())


def test_a_caller_that_leaves_between_two_hosts_is_not_tried_again(place: Place) -> None:
    first = place.start_host(holds=True)

    async def scenario() -> None:
        async with connected(place) as engine:
            gone, stays = ask(engine, 1), ask(engine, 2)
            await until(lambda: place.in_flight() > 0, "a batch runs")
            first.kill()
            await until(lambda: not engine.is_ready, "the host is gone")
            gone.cancel()
            place.board.withdraw(0)
            place.start_host(holds=True)
            await in_flight_on(place, 1)
            assert not stays.done()
            engine.refuse_waiting()
            with pytest.raises(asyncio.CancelledError):
                await gone
            stays.cancel()

    run(scenario())


def test_a_host_that_is_stopped_is_seen_as_stalled_and_goes_on_afterwards(place: Place) -> None:
    host = place.start_host()

    async def scenario() -> None:
        async with connected(place) as engine:
            assert_row_of(1, await ask(engine, 1))
            await until(lambda: engine.status().stalled_seconds == 0.0, "nothing is pending")
            host.send_signal(signal.SIGSTOP)
            task = ask(engine, 2)
            await until(lambda: engine.status().stalled_seconds > 0.3, "the stall grows")
            with pytest.raises(DeadlineExceeded):
                await engine.infer(pixels_of(3), deadline=time.monotonic() + 0.02)
            host.send_signal(signal.SIGCONT)
            assert_row_of(2, await task)
            await until(lambda: engine.status().stalled_seconds == 0.0, "the stall is over")

    run(scenario())


def test_a_killed_worker_costs_the_others_nothing(place: Place) -> None:
    backend = WatchedBackend(shut=True)
    gc.collect()  # what earlier tests left behind must not go in the middle of this one
    maps = slot_maps()

    async def scenario() -> None:
        async with connected(place) as engine:
            await until(lambda: slot_maps() == maps + 2, "host and worker have the slots")
            worker = place.start_worker(asks=3)
            await asyncio.to_thread(backend.wait_for_batch)
            await until(lambda: core.status().in_flight + core.status().queue_depth == 3, "3 asked")
            stays = ask(engine, 200)
            await until(lambda: core.status().queue_depth >= 1, "a neighbour waits")
            worker.kill()
            worker.wait(PATIENCE_SECONDS)
            await until(lambda: core.status().queue_depth == 1, "its waiting images are forgotten")
            assert slot_maps() == maps + 3, "a batch still reads its memory"
            backend.gate.set()
            assert_row_of(200, await stays)
            await until(lambda: slot_maps() == maps + 2, "its memory is gone after the batch")

    with (
        running(backend, max_batch_size=1, clock=time.monotonic) as core,
        hosted(place, core, backend),
    ):
        run(scenario())
    assert len(backend.batches) == 2


def test_no_free_slot_means_overloaded(place: Place) -> None:
    backend = WatchedBackend(shut=True)
    known = {4: 4.0}  # one second an image: two batches and what fits the budget

    async def scenario() -> None:
        async with connected(place, queue_budget_seconds=2.0) as engine:
            tasks = [ask(engine, value) for value in range(10)]
            await until(lambda: core.status().queue_depth == 9, "all slots are taken")
            with pytest.raises(Overloaded) as refusal:
                await ask(engine, 10)
            assert refusal.value.retry_after_seconds >= 1
            with pytest.raises(Overloaded):
                engine.check_admission(soon())
            backend.gate.set()
            for value, task in enumerate(tasks):
                assert_row_of(value, await task)
            await until(lambda: place.in_flight() == 0, "all is over")
            engine.check_admission(soon())
            assert_row_of(11, await ask(engine, 11))

    with (
        running(backend, max_batch_size=1, clock=time.monotonic) as core,
        hosted(place, core, backend, known),
    ):
        run(scenario())


def test_a_host_that_stops_answers_what_it_has_and_refuses_the_rest(place: Place) -> None:
    backend = WatchedBackend(shut=True)

    async def scenario() -> None:
        async with connected(place) as engine:
            admitted = [ask(engine, 0)]
            await asyncio.to_thread(backend.wait_for_batch)
            admitted.append(ask(engine, 1))
            await until(lambda: core.status().queue_depth == 1, "one waits")
            host.stop()
            await until(lambda: not place.board.is_ready(0), "the board says so")
            with pytest.raises((Draining, BackendUnavailable)):
                await ask(engine, 2)
            backend.gate.set()
            for value, task in enumerate(admitted):
                assert_row_of(value, await task)

    with running(backend, clock=time.monotonic) as core, hosted(place, core, backend) as host:
        run(scenario())
    assert backend.seen == {0, 1}


def test_workers_that_came_before_the_host_are_served_once_it_is_there(place: Place) -> None:
    async def scenario() -> None:
        greetings: list[Greeting] = []
        engine = place.remote(on_greeting=greetings.append)
        await engine.start()
        assert (greetings, engine.is_ready) == ([], False)
        with pytest.raises(BackendUnavailable):
            await ask(engine, 1)
        first = place.start_host()
        await until(lambda: engine.is_ready, "there is a host")
        assert isinstance(greetings[0].info, BackendInfo)
        assert_row_of(1, await ask(engine, 1))
        first.kill()
        await until(lambda: not engine.is_ready, "it is gone")
        place.start_host(batch_seconds=0.5)
        await until(lambda: engine.is_ready, "there is another")
        assert [one.profile.batch_seconds for one in greetings] == [{}, {1: 0.5}]
        await engine.aclose()

    run(scenario())


def test_a_fault_of_ours_while_connecting_is_not_the_last_try(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reasons = ["what nobody thought of", "what nobody thought of either"]

    async def spoilt(*arguments: Any) -> Link:
        if len(reasons) == 2:
            raise KeyError(reasons.pop())
        return await connect(*arguments)

    def spoilt_once(link: Link, pixels: Pixels) -> bool:
        if reasons:
            raise KeyError(reasons.pop())
        return takes(link, pixels)

    takes = Link.takes
    monkeypatch.setattr(remote, "connect", spoilt)
    first = place.start_host(holds=True)

    async def scenario() -> None:
        async with connected(place) as engine:
            monkeypatch.setattr(Link, "takes", takes)
            stays = ask(engine, 1)
            await in_flight_on(place, 1)
            monkeypatch.setattr(Link, "takes", spoilt_once)
            first.kill()
            await until(lambda: not engine.is_ready, "the host is gone")
            place.start_host()
            await until(lambda: not reasons, "its successor is met with a fault")
            assert_row_of(1, await stays)
            assert_row_of(2, await ask(engine, 2))

    with caplog.at_level(logging.ERROR):
        run(scenario())
    assert caplog.text.count("hit a fault of ours") == 2
    caplog.clear()
    gc.collect()  # the frames of the faults hold slots, which other tests count


def test_what_a_next_host_takes_in_no_slot_is_refused_and_the_rest_is_answered(
    place: Place,
) -> None:
    first = place.start_host(holds=True)
    fits = Link.takes

    async def scenario(patched: pytest.MonkeyPatch) -> None:
        async with connected(place) as engine:
            tasks = [ask(engine, value) for value in range(3)]
            await until(lambda: place.in_flight() > 0, "a batch runs")
            first.kill()
            await until(lambda: not engine.is_ready, "the host is gone")
            patched.setattr(Link, "takes", lambda link, it: it.max() != 1 and fits(link, it))
            place.start_host()
            assert_row_of(0, await tasks[0])
            assert_row_of(2, await tasks[2])
            with pytest.raises(BackendUnavailable):
                await tasks[1]
            assert engine.is_ready

    with pytest.MonkeyPatch.context() as patched:
        run(scenario(patched))


def test_an_engine_that_nobody_answers_closes_at_once(place: Place) -> None:
    async def scenario() -> None:
        away = RemoteEngine("/no/such", place.board, 0, PACKAGE, queue_budget_seconds=1)
        for engine in (place.remote(), away):
            await engine.start()
            if engine is away:
                await until(lambda: away.status().last_error is not None, "it says why")
            await engine.aclose()
            with pytest.raises(Draining):
                await ask(engine, 1)

    run(scenario())


def test_twenty_connects_leave_no_descriptor_no_memory_and_no_thread(place: Place) -> None:
    backend = WatchedBackend()

    async def scenario() -> None:
        async with connected(place) as engine:
            assert_row_of(7, await ask(engine, 7))

    with running(backend, clock=time.monotonic) as core, hosted(place, core, backend):
        run(scenario())
        gc.collect()
        eventually(lambda: slot_maps() == 0, "the first slots are gone")
        before = open_descriptors(), threading.active_count()
        for _ in range(20):
            run(scenario())
        eventually(lambda: slot_maps() == 0, "all slots are gone")
        eventually(
            lambda: (open_descriptors(), threading.active_count()) == before,
            "descriptors and threads are as before",
        )
