"""Callers in a hurry behind a queue that is too long for them: told in time, and never executed.

Their deadline is 150 ms away, and they must know by 200: 50 ms are left to a busy machine.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import httpx

from tests.http.wire import Wire, check_error, http
from tests.overload.scenario import BATCH_SIZE, pinned_service, small_image
from tests.process.callers import sample
from tests.servers import WAIT_SECONDS, WatchedBackend, running_service, wait_until

DEADLINE_MS = 150
TOLD_WITHIN_MS = 200
QUEUED = 80
"""Images before them: ten batches of 100 ms."""
HURRIED = 10


@dataclass
class Caller:
    """A connection of its own, with at most one request on its way."""

    wire: Wire
    sent_at: float = 0.0

    def send(self, *headers: str) -> None:
        self.sent_at = time.monotonic()
        self.wire.send(http("POST", "/classify", small_image(), *headers))

    def answer(self) -> tuple[httpx.Response, float]:
        """Return the reply, and after how many milliseconds it was here at the latest."""
        reply = self.wire.read_reply()
        return reply, 1000 * (time.monotonic() - self.sent_at)


@contextmanager
def callers(url: str, count: int) -> Iterator[list[Caller]]:
    parsed = httpx.URL(url)
    address = parsed.host, parsed.port or 0
    with ExitStack() as stack:
        yield [
            Caller(Wire(stack.enter_context(socket.create_connection(address, WAIT_SECONDS))))
            for _ in range(count)
        ]


def check_told_in_time(hurried: list[Caller]) -> list[int]:
    """Read the answers of callers who may be refused or late; returns their statuses."""
    statuses = []
    for caller in hurried:
        reply, milliseconds = caller.answer()
        if reply.status_code == 503:
            check_error(reply, 503, "overloaded")
        else:
            check_error(reply, 504, "deadline_exceeded")
        assert milliseconds <= TOLD_WITHIN_MS, f"{reply.status_code} came late"
        statuses.append(reply.status_code)
    return statuses


def test_behind_a_queue_of_a_second_they_are_refused_in_time_and_not_executed() -> None:
    with (
        pinned_service(queue_budget_ms="2000") as service,
        callers(service.url, QUEUED) as patient,
        callers(service.url, HURRIED) as hurried,
        httpx.Client(base_url=service.url, trust_env=False) as prober,
    ):

        def metric(name: str) -> float:
            return sample(prober.get("/metrics").text, name)

        before = metric("metaserve_batch_size_sum")
        for caller in patient:
            caller.send()
        wait_until(
            lambda: metric("metaserve_queue_depth") >= QUEUED - 3 * BATCH_SIZE, "the queue is deep"
        )
        for caller in hurried:
            caller.send(f"X-Request-Timeout-Ms: {DEADLINE_MS}")
        check_told_in_time(hurried)
        assert [caller.answer()[0].status_code for caller in patient] == [200] * QUEUED
        wait_until(lambda: metric("metaserve_batch_size_sum") - before >= QUEUED, "all are counted")
        assert metric("metaserve_batch_size_sum") - before == QUEUED


def test_behind_a_backend_that_became_slow_they_are_late_in_time_and_not_executed() -> None:
    # On a busy machine they may come so late that the overdue batch has given the backend away.
    assert any(504 in hurry_behind_a_slow_backend() for _ in range(5))


def hurry_behind_a_slow_backend() -> list[int]:
    """Ask a backend that is believed to be fast, and does not answer; returns the statuses."""
    backend = WatchedBackend(gate_open=False)
    with (
        running_service(backend, batch_seconds={BATCH_SIZE: 0.001}) as service,
        callers(service.url, QUEUED) as patient,
        callers(service.url, HURRIED) as hurried,
    ):
        patient[0].send()
        backend.wait_for_batches(1)
        for caller in hurried:
            caller.send(f"X-Request-Timeout-Ms: {DEADLINE_MS}")
        for caller in patient[1:]:
            caller.send()
        statuses = check_told_in_time(hurried)
        backend.gate.set()
        answered = sum(caller.answer()[0].status_code == 200 for caller in patient)
        assert answered >= 1
        assert backend.images == answered
    return statuses
