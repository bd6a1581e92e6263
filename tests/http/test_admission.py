"""No work is spent on an image that cannot be answered in time, whenever that turns out."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.errors import Overloaded
from app.http import pipeline
from app.http.pool import HERE_SECONDS, CpuPool
from app.images.peek import is_cheap
from app.images.read import read_image
from app.types import Batch, Pixels, Rows
from tests.http.test_pool import FAR, learn, until_waiting
from tests.http.wire import Wire, check_error, grey, http, parts, text
from tests.servers import (
    EMBEDDED,
    WAIT_SECONDS,
    RunningService,
    WatchedBackend,
    fake_backend,
    running_service,
)

# If one of these were read, the answer would say what is wrong with it.
SMALL = grey(0, side=32)
DAMAGED_AT = SMALL.index(b"IDAT") + 6
BROKEN_SMALL = SMALL[:DAMAGED_AT] + b"\xff\xff" + SMALL[DAMAGED_AT + 2 :]
BROKEN_LARGE = b"no image at all"
JSON = "Content-Type: application/json"


@contextmanager
def busy_service() -> Iterator[tuple[RunningService, threading.Event]]:
    """A service that becomes overloaded, for an hour, when the event is set."""
    backend = WatchedBackend(gate_open=False)
    with running_service(backend, batch_seconds={1: 3600.0}, queue_budget_ms=500) as service:
        begin = threading.Event()

        def overload() -> None:
            begin.wait(WAIT_SECONDS)
            with service.connect() as sock:
                sock.sendall(http("POST", "/classify", grey(0)))
                ended.wait(WAIT_SECONDS)

        ended = threading.Event()
        thread = threading.Thread(target=overload, name="overload")
        thread.start()
        try:
            yield service, begin
        finally:
            begin.set()
            ended.set()
            thread.join(WAIT_SECONDS)
            backend.gate.set()


@pytest.mark.parametrize(
    ("body", "header"),
    [
        (BROKEN_SMALL, "Content-Type: image/png"),
        (BROKEN_LARGE, "Content-Type: image/png"),
        (json.dumps({"images": [text(BROKEN_SMALL), text(BROKEN_LARGE)]}).encode(), JSON),
    ],
    ids=["read on the loop", "read in a thread", "several"],
)
def test_an_overload_that_begins_while_a_body_comes_keeps_it_from_being_read(
    body: bytes, header: str
) -> None:
    with busy_service() as (service, begin), service.connect() as sock:
        wire, request = Wire(sock), http("POST", "/classify", body, header, "Expect: 100-continue")
        wire.send(request[: -len(body)])
        assert wire.read_head()[0] == 100, "the head was refused"
        begin.set()
        service.wait_until(
            lambda: service.metric("metaserve_inflight_batches") == 1, "the backend is busy"
        )
        wire.send(body)
        reply = wire.read_reply()
    check_error(reply, 503, "overloaded")


def test_the_same_bodies_are_read_and_refused_where_there_is_no_overload() -> None:
    assert is_cheap(BROKEN_SMALL), "it is not read on the loop"
    with running_service() as service:
        for body in (BROKEN_SMALL, BROKEN_LARGE):
            assert service.client.post("/classify", content=body).status_code in (415, 422)
        reply = service.client.post("/classify", json={"images": [text(BROKEN_LARGE)]})
        assert reply.json()["results"][0]["error"]["code"] == "unsupported_format"


def test_an_overload_refuses_the_head_of_a_request() -> None:
    with busy_service() as (service, begin), service.connect() as sock:
        begin.set()
        service.wait_until(
            lambda: service.metric("metaserve_inflight_batches") == 1, "the backend is busy"
        )
        wire = Wire(sock)
        wire.send(http("POST", "/classify", BROKEN_LARGE)[: -len(BROKEN_LARGE)])
        assert wire.read_head()[0] == 503


class SecondLate:
    """Answers one batch at once, and the next ones when told to."""

    def __init__(self) -> None:
        self._inner = fake_backend()
        self.info = self._inner.info
        self.gate = threading.Event()
        self._batches = 0

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        self._batches += 1
        if self._batches > 1:
            assert self.gate.wait(WAIT_SECONDS)
        return self._inner.run(batch, deadline)

    def close(self) -> None:
        self._inner.close()


def test_a_request_whose_last_image_is_late_is_late_as_a_whole() -> None:
    backend = SecondLate()
    with running_service(backend, max_batch_size=1) as service:
        reply = service.client.post(
            "/classify",
            files=parts(grey(0), grey(255)),
            headers={"X-Request-Timeout-Ms": "500"},
        )
        backend.gate.set()
    check_error(reply, 504, "deadline_exceeded")


def test_a_small_image_that_is_enlarged_for_its_network_is_read_in_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = Path(shutil.copytree(EMBEDDED, tmp_path / "large"))
    manifest = json.loads((large / "manifest.json").read_text())
    manifest["input"]["size"] = 224
    (large / "manifest.json").write_text(json.dumps(manifest))
    assert read_by(EMBEDDED, monkeypatch) == "server"
    assert read_by(large, monkeypatch).startswith("cpu")


def read_by(package: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of the thread in which a small image is read."""
    names: list[str] = []

    def noting(*arguments: Any, **options: Any) -> Pixels:
        names.append(threading.current_thread().name)
        return read_image(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "read_image", noting)
        with running_service(package=package) as service:
            reply = service.client.post("/classify", content=grey(0, side=32))
    assert reply.status_code == 200, reply.text
    (name,) = names
    return name


def test_a_turn_of_the_loop_reads_few_of_the_small_images_that_came_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count, took = 8, 2 * HERE_SECONDS
    turn, reads = 0, list[int]()
    first, sent, is_over = threading.Event(), threading.Event(), threading.Event()

    def next_turn() -> None:
        nonlocal turn
        turn += 1
        if not is_over.is_set():
            asyncio.get_running_loop().call_soon(next_turn)

    def slow(*arguments: Any, **options: Any) -> Pixels:
        if not first.is_set():  # the loop stands until all the others have come
            next_turn()
            first.set()
            sent.wait(WAIT_SECONDS)
        else:
            reads.append(turn)
            until = time.monotonic() + took
            while time.monotonic() < until:
                pass
        return read_image(*arguments, **options)

    monkeypatch.setattr(pipeline, "read_image", slow)
    with running_service(queue_budget_ms=60_000) as service:
        wires = [Wire(service.connect()) for _ in range(1 + count)]
        request = http("POST", "/classify", grey(0, side=32))
        try:
            wires[0].send(request)
            assert first.wait(WAIT_SECONDS)
            for wire in wires[1:]:
                wire.send(request)
            sent.set()
            replies = [wire.read_reply() for wire in wires]
        finally:
            sent.set()
            is_over.set()
            for wire in wires:
                wire.sock.close()
    assert [reply.status_code for reply in replies] == [200] * (1 + count)
    assert len(set(reads)) == count, f"they were read in the turns {reads}"


def test_who_would_wait_too_long_for_a_thread_is_told_when_to_come_back() -> None:
    pool, gate = CpuPool(threads=1, budget_seconds=1.0), threading.Event()

    async def scenario() -> None:
        jobs = [asyncio.create_task(pool.run(gate.wait, WAIT_SECONDS)) for _ in range(2)]
        await until_waiting(pool, 2)
        learn(pool, 50.0)
        with pytest.raises(Overloaded) as refused:  # 100 s to wait, 1 s is the budget
            await pool.run_admitted(FAR, lambda: None)
        assert 99 <= refused.value.retry_after_seconds <= 200
        gate.set()
        await asyncio.gather(*jobs)

    asyncio.run(scenario())
    pool.close()


def test_retry_after_of_the_service_follows_the_wait() -> None:
    with busy_service() as (service, begin):
        begin.set()
        service.wait_until(
            lambda: service.metric("metaserve_inflight_batches") == 1, "the backend is busy"
        )
        reply = httpx.post(f"{service.url}/classify", content=grey(0), trust_env=False)
    check_error(reply, 503, "overloaded")
    # The time-out of the service is 30 s at most, so an hour is too long by an hour.
    assert int(reply.headers["retry-after"]) >= 3000
