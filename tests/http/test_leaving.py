"""Who leaves, or is out of time, costs nothing more: no decoding, no batch, no place."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from app.engine.base import EngineStatus
from app.http import pipeline
from app.http.state import LoadedModel
from app.images.read import read_image
from app.types import Pixels, Row
from tests.http.wire import Wire, best_classes, check_error, encode, grey, http, parts, picture
from tests.servers import WAIT_SECONDS, RunningService, WatchedBackend, running_service

LARGE = encode(picture(0, 200, 200))
"""Too many pixels to be decoded in place."""


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the name of the thread of every decoding."""
    threads: list[str] = []

    def watched(*args: object, **options: object) -> Pixels:
        threads.append(threading.current_thread().name)
        return read_image(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "read_image", watched)
    return threads


def status(service: RunningService) -> EngineStatus:
    assert service.state.loaded is not None
    return service.state.loaded.engine.status()


def cancelled(service: RunningService) -> float:
    return service.metric("metaserve_requests_cancelled_total")


def plugged(service: RunningService) -> Callable[[], None]:
    """Keep the only decoding thread busy; returns what lets it go."""
    gate, begun = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        gate.wait(WAIT_SECONDS)

    service.state.pool._executor.submit(wait)
    assert begun.wait(WAIT_SECONDS)
    return gate.set


def test_of_200_queued_callers_180_leave_and_never_reach_the_backend() -> None:
    backend = WatchedBackend(gate_open=False)
    with (
        running_service(backend, max_batch_size=8) as service,
        ExitStack() as leaving,
        ExitStack() as staying,
    ):
        first = Wire(staying.enter_context(service.connect()))
        first.send(http("POST", "/classify", grey(0)))
        backend.wait_for_batches(1)
        stayed = []
        for index in range(200):
            stays = index % 10 == 0
            wire = Wire((staying if stays else leaving).enter_context(service.connect()))
            wire.send(http("POST", "/classify", grey(255)))
            if stays:
                stayed.append(wire)
        service.wait_until(lambda: status(service).queue_depth == 200, "all of them wait")

        leaving.close()

        service.wait_until(lambda: status(service).queue_depth <= 29, "their places are free")
        service.wait_until(lambda: cancelled(service) >= 171, "the metric counts them")
        backend.gate.set()
        assert first.read_reply().status_code == 200
        assert [best_classes([wire.read_reply().json()]) for wire in stayed] == [[9]] * 20
        assert 21 <= backend.images <= 21 + 9
        assert cancelled(service) <= 180


@pytest.mark.parametrize("images", [1, 5])
def test_an_image_whose_caller_leaves_before_its_turn_is_never_decoded(
    decoded: list[str], images: int
) -> None:
    backend = WatchedBackend()
    files = _multipart([LARGE] * images) if images > 1 else http("POST", "/classify", LARGE)
    with running_service(backend, threads=1) as service:
        release = plugged(service)
        with service.connect() as leaving:
            leaving.sendall(files)
            service.wait_until(lambda: service.state.pool._pending == 1, "an image waits")

        service.wait_until(lambda: cancelled(service) == 1, "the caller is gone")
        service.wait_until(lambda: service.state.pool._pending == 0, "its place is free")
        release()
        assert service.client.post("/classify", content=LARGE).status_code == 200
        assert len(decoded) == 1
        assert backend.images == 1


def test_an_image_that_expires_before_its_turn_is_never_decoded(decoded: list[str]) -> None:
    with running_service(WatchedBackend(), threads=1) as service:
        release = plugged(service)
        headers = {"x-request-timeout-ms": "50"}
        reply = service.client.post("/classify", content=LARGE, headers=headers)

        check_error(reply, 504, "deadline_exceeded")
        release()
        assert service.client.post("/classify", content=LARGE).status_code == 200
        assert len(decoded) == 1


def test_an_image_that_expires_in_the_queue_is_told_in_time_and_never_executed() -> None:
    backend = WatchedBackend(gate_open=False)
    with running_service(backend, max_batch_size=1) as service, service.connect() as sock:
        wire = Wire(sock)
        wire.send(http("POST", "/classify", grey(0)))
        backend.wait_for_batches(1)
        started_at = time.monotonic()
        headers = {"x-request-timeout-ms": "150"}

        reply = service.client.post("/classify", content=grey(255), headers=headers)

        check_error(reply, 504, "deadline_exceeded")
        assert 0.15 <= time.monotonic() - started_at < 1.0  # where it is idle: below 0.2
        backend.gate.set()
        assert wire.read_reply().status_code == 200
        assert service.client.post("/classify", content=grey(28)).status_code == 200
        assert backend.images == 2


class Tardy:
    """An engine whose rows come, though late."""

    def __init__(self, model: LoadedModel, late: threading.Event) -> None:
        self._engine = model.engine
        self._late = late
        self.status = model.engine.status
        self.check_admission = model.engine.check_admission
        self.refuse_waiting = model.engine.refuse_waiting
        self.aclose = model.engine.aclose

    async def infer(self, pixels: Pixels, *, deadline: float) -> Row:
        row = await self._engine.infer(pixels, deadline=deadline + WAIT_SECONDS)
        while time.monotonic() < deadline:
            self._late.wait(0.001)
        return row


@pytest.mark.parametrize("images", [1, 3])
def test_what_is_late_when_it_is_to_be_written_is_told_as_late(images: int) -> None:
    with running_service(request_timeout_ms=60) as service:
        model = service.state.loaded
        assert model is not None
        engine = Tardy(model, threading.Event())
        service.state.loaded = LoadedModel(engine, model.backend, model.golden, model.profile)

        files = parts(*[grey(0)] * images)
        reply = service.client.post("/classify", files=files)

        check_error(reply, 504, "deadline_exceeded")


def test_tiny_images_are_decoded_in_place_others_and_several_in_threads(
    decoded: list[str],
) -> None:
    with running_service() as service:
        assert service.client.post("/classify", content=grey(0, side=32)).status_code == 200
        assert decoded == ["server"]
        for request in ({"content": LARGE}, {"files": parts(grey(0), grey(1))}):
            decoded.clear()
            assert service.client.post("/classify", **request).status_code == 200
            assert decoded
            assert all(name.startswith("cpu") for name in decoded)


def test_decoding_and_the_wait_for_a_batch_are_one_estimate() -> None:
    backend = WatchedBackend(gate_open=False)
    settings: dict[str, Any] = {"queue_budget_ms": 1e6, "request_timeout_ms": 1e6}
    with (
        running_service(backend, batch_seconds={1: 20.0}, **settings) as service,
        service.connect() as sock,
        service.connect() as refused,
    ):
        wire = Wire(sock)
        wire.send(http("POST", "/classify", grey(0)))
        backend.wait_for_batches(1)
        model, pool = service.state.model(), service.state.pool
        deadline = time.monotonic() + 50.0
        pool._mean_seconds = 25.0
        pool.check_admission(deadline)
        model.engine.check_admission(deadline)  # a batch to wait for and its own: 40 s

        head = http("POST", "/classify", b"x", "X-Request-Timeout-Ms: 50000")[:-1]
        refused.sendall(head)  # each of them alone is in time, together they are not

        check_error(Wire(refused).read_reply(), 503, "overloaded")
        backend.gate.set()
        assert wire.read_reply().status_code == 200


def test_an_idle_service_tries_whatever_it_expects_of_decoding() -> None:
    with running_service(queue_budget_ms=300) as service:
        service.state.pool._mean_seconds = 60.0
        for headers in ({}, {"X-Request-Timeout-Ms": "5000"}):
            reply = service.client.post("/classify", content=grey(0), headers=headers)
            assert reply.status_code == 200, reply.text


def _multipart(images: list[bytes]) -> bytes:
    part = b"--XX\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n%b\r\n"
    body = b"".join(part % image for image in images) + b"--XX--\r\n"
    return http("POST", "/classify", body, "Content-Type: multipart/form-data; boundary=XX")
