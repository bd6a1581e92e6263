"""What settings and measurements become: the core, the profile that callers see, the threads."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import pytest

from app import main
from app.assemble import profile_of, start_core
from app.engine.core import EngineCore
from app.engine.lanes import Learned, NarrowLanes
from app.engine.timing import ServiceTimes
from app.engine.window import Request
from app.listener import bind
from app.main import build_state, wire_model
from app.processes import supervisor
from app.processes.runtime_folder import runtime_folder
from app.processes.shape import Shape
from app.processes.supervisor import WORKER, Supervisor
from app.settings import PREFIX, Settings, load_settings
from tests.engine.doubles import (
    PATIENCE_SECONDS,
    Caller,
    CountingObserver,
    WatchedBackend,
    pixels_of,
)
from tests.servers import EMBEDDED, fake_backend, running_service

PREPARED = {1: 0.010, 2: 0.012, 4: 0.020, 8: 0.060}
"""Seconds of a batch: 4 images do most a second, and 3 are worth the padding to 4, at 3.33."""


def prepared_backend() -> WatchedBackend:
    backend = WatchedBackend(shut=True, lanes=1)
    backend.info = dataclasses.replace(backend.info, prepared_sizes=tuple(PREPARED))
    return backend


def started(backend: WatchedBackend, seconds: dict[int, float], **settings: Any) -> EngineCore:
    """Return the core of a service in which warm-up took so long."""
    times = ServiceTimes(seconds)
    profile = profile_of(Learned(backend, times))
    return start_core(Settings(**settings), backend, times, profile, None, CountingObserver()).core


def submit(core: EngineCore, *values: int, waited_seconds: float = 0.0) -> list[Caller]:
    now = time.monotonic()
    callers = [Caller(value) for value in values]
    for caller in callers:
        core.submit(
            Request(pixels_of(caller.value), now + 3600, now - waited_seconds, caller.request.reply)
        )
    return callers


def test_the_newest_are_answered_first_once_the_oldest_is_over_the_budget() -> None:
    backend = WatchedBackend(shut=True)
    core = started(backend, {1: 1e-6}, queue_budget_ms=60_000)  # far too short: all are admitted
    callers = submit(core, 0)
    backend.wait_for_batch()
    callers += submit(core, 1, 2, 3, waited_seconds=120)
    backend.gate.set()
    for caller in callers:
        caller.assert_got_its_row()
    core.close(PATIENCE_SECONDS)
    assert backend.batches == [[0], [3], [2], [1]]


def test_a_batch_is_not_padded_where_warm_up_found_that_it_does_not_pay() -> None:
    backend = prepared_backend()
    core = started(backend, PREPARED, queue_budget_ms=60_000)
    callers = submit(core, 0)
    backend.wait_for_batch()
    callers += submit(core, 1, 2, 3)
    backend.gate.set()
    for caller in callers:
        caller.assert_got_its_row()
    core.close(PATIENCE_SECONDS)
    assert backend.batches == [[0], [1, 2], [3]]


LANES = {
    "images_per_second": 300.0,
    "max_batch_size": 4,
    "batch_ms": {"1": 10.0, "2": 12.0, "4": 20.0, "8": 60.0},
    "threads": 7,
    "lanes": 3,
    "lane_batch_size": 2,
    "lane_batch_ms": {"1": 11.0, "2": 20.0},
    "wide_up_to": 5,
    "pads_from": {"2": 2, "4": 4, "8": 8},
}
ALONE = LANES | {
    "images_per_second": 1200.0,
    "lanes": 6,
    "lane_batch_size": 0,
    "lane_batch_ms": {},
    "wide_up_to": 0,
}


@pytest.mark.parametrize(("has_lanes", "expected"), [(True, LANES), (False, ALONE)])
def test_models_shows_what_warm_up_measured(has_lanes: bool, expected: dict[str, Any]) -> None:
    backend = fake_backend()
    backend.info = dataclasses.replace(
        backend.info, batches_in_flight=6, threads=7, prepared_sizes=tuple(PREPARED)
    )
    lanes = NarrowLanes(fake_backend(), ServiceTimes({1: 0.011, 2: 0.02}), 3, 2, 5)
    learned = Learned(backend, ServiceTimes(PREPARED), lanes if has_lanes else None)
    with running_service(loaded=False) as service:
        warm = start_core(
            service.state.settings,
            *(backend, learned.times, profile_of(learned), None),
            CountingObserver(),
            learned.narrow,
        )
        service.state.loaded = wire_model(service.state, warm)
        shown = service.client.get("/models").json()
    assert shown["profile"] == expected
    assert (shown["max_batch_size"], shown["batch_ms"]) == (4, expected["batch_ms"])


def decoding_threads() -> int:
    state = build_state(load_settings({"model": str(EMBEDDED)}))
    with closing(state.pool):
        return state.pool.threads


def test_images_are_decoded_by_as_many_threads_as_are_asked_for_or_the_limit_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(main, "cpu_limit", lambda: 5)
    assert decoding_threads() == 5
    monkeypatch.setenv(f"{PREFIX}THREADS", "3")
    assert decoding_threads() == 3


class Noted:
    """In place of a child: remembers with which variables and descriptors it would start."""

    environments: list[dict[str, str]]
    descriptors: list[Sequence[int]]

    def __init__(
        self, _: object, module: str, environment: dict[str, str], descriptors: Sequence[int]
    ) -> None:
        self.descriptors.append(descriptors)
        if module == WORKER:
            self.environments.append(environment)


def test_each_of_several_workers_decodes_with_its_share_of_the_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(supervisor, "Child", Noted)
    monkeypatch.setattr(Noted, "environments", [], raising=False)
    monkeypatch.setattr(Noted, "descriptors", [], raising=False)
    settings = load_settings({"threads": "7", "workers": "2", "host": "127.0.0.1", "port": "0"})
    with runtime_folder() as folder, bind(settings.host, settings.port) as listener:
        parent = Supervisor(settings, Shape(2, True, 3, 7), listener, folder, str(EMBEDDED))
        for descriptor in (*parent._life, *parent._engine_life):
            os.close(descriptor)
        for one in (parent._socket, parent._selector, parent.board, parent.roster):
            one.close()
    assert len(Noted.environments) == 2
    # Each process keeps the runtime directory from being swept while it lives.
    assert len(Noted.descriptors) == 3
    assert all(folder.lock in one for one in Noted.descriptors)
    for environment in Noted.environments:
        for name, text in environment.items():
            if name.startswith(PREFIX):
                monkeypatch.setenv(name, text)
        assert decoding_threads() == 3
