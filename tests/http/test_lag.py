"""What a request has waited for the event loop counts, in its budget and in its deadline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from app.http import protocol
from app.http.caller import Caller
from tests.http.wire import Wire, best_classes, check_error, grey, http
from tests.servers import RunningService, running_service

LAG_SECONDS = 0.4


class EarlyCaller(Caller):
    """A caller whose request had to wait for the event loop."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        super().__init__(cycle)
        self.arrived_at -= LAG_SECONDS


@pytest.fixture
def late_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "Caller", EarlyCaller)


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service() as running:
        yield running


@pytest.fixture(scope="module")
def impatient() -> Iterator[RunningService]:
    with running_service(queue_budget_ms=LAG_SECONDS * 500) as running:
        yield running


@pytest.mark.usefixtures("late_loop")
def test_a_request_that_has_waited_beyond_the_budget_is_refused_unread(
    impatient: RunningService,
) -> None:
    with impatient.connect() as sock:
        wire = Wire(sock)
        wire.send(http("POST", "/classify", grey(255), "Expect: 100-continue"))

        check_error(wire.read_reply(), 503, "overloaded")


@pytest.mark.usefixtures("late_loop")
def test_a_deadline_counts_from_the_head(service: RunningService) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(http("POST", "/classify", grey(255), "X-Request-Timeout-Ms: 300"))
        check_error(wire.read_reply(), 504, "deadline_exceeded")
        wire.send(http("POST", "/classify", grey(255)))
        reply = wire.read_reply().json()

    assert best_classes([reply]) == [9]
    assert reply["timing_ms"]["total"] >= LAG_SECONDS * 1e3


def test_a_request_that_has_not_waited_is_answered(impatient: RunningService) -> None:
    with impatient.connect() as sock:
        wire = Wire(sock)
        wire.send(http("POST", "/classify", grey(255)))

        assert best_classes([wire.read_reply().json()]) == [9]
