"""What callers see of a service when more arrives than it can do: `scenario.py` says which.

The backend sleeps, so that its speed is known: 80 images per second. Times are asserted here, and
here alone: they are what admission promises. A machine that is so busy that a thread often waits
for tens of milliseconds may break them.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httpx
import pytest

from app.bench.recording import Phase, is_good
from tests.http.wire import Wire
from tests.overload.scenario import (
    BATCH_MS,
    BUDGET_MS,
    CAPACITY,
    PROBE_MS,
    REFUSAL_MS,
    Outcome,
    median,
    padded_image,
    pinned_service,
    put_load,
    small_image,
)

FACTORS = (0.5, 1.0, 2.0, 5.0, 10.0, 0.5)
SECONDS = 4.0
"""Of a phase: 40 batches, so that one more or less is 2.5 %."""

ACCEPTED_MS = BUDGET_MS + 2 * BATCH_MS + 100


@pytest.fixture(scope="module")
def outcome() -> Iterator[Outcome]:
    """The whole of it in one go, from half the capacity to ten times it and back."""
    with pinned_service() as service:
        rates = tuple(factor * CAPACITY for factor in FACTORS)
        yield put_load(service, small_image(), rates=rates, seconds=SECONDS)


def check_replies(outcome: Outcome) -> None:
    """Every request has a good reply, or a refusal with everything a caller needs."""
    for phase in outcome.summary.phases:
        others = {name for name in phase.outcomes if not is_good(name)}
        assert others <= {"503 overloaded"}, f"at {phase.rate:g}/s: {phase.outcomes}"
    refusals = outcome.recording.names.get("503 overloaded")
    refused = sum(
        outcome == refusals and intended >= 1.0
        for outcome, intended in zip(
            outcome.recording.outcomes, outcome.recording.intended, strict=True
        )
    )
    seen = outcome.summary.retry_after.get("503 overloaded", {"count": 0, "least": 1})
    assert seen["count"] == refused, "refusals without a Retry-After"
    assert seen["least"] >= 1


def check_refused_quickly(phase: Phase) -> None:
    assert phase.refused is not None, f"nothing was refused at {phase.rate:g}/s"
    p99 = phase.refused.percentiles["p99"]
    assert p99 <= REFUSAL_MS, f"at {phase.rate:g}/s refusals took {p99:.0f} ms at p99"


def check_probes(outcome: Outcome) -> None:
    (phase,) = outcome.probes.phases
    assert set(phase.outcomes) == {"200"}, phase.outcomes
    assert phase.offered > 100
    assert phase.good is not None
    assert phase.good.percentiles["p99"] <= PROBE_MS


def test_the_load_was_what_it_should_be(outcome: Outcome) -> None:
    for phase in outcome.summary.phases:
        assert phase.rate is not None
        assert phase.offered == pytest.approx(phase.rate * SECONDS, rel=0.25)
        # The generator may wait for its core as long as a probe may.
        assert phase.lag_ms <= PROBE_MS
    assert outcome.recording.held_back == 0


def test_every_request_is_answered_well_or_refused_with_code_and_retry_after(
    outcome: Outcome,
) -> None:
    check_replies(outcome)


def test_half_the_capacity_is_answered_whole(outcome: Outcome) -> None:
    assert set(outcome.summary.phases[0].outcomes) == {"200"}


@pytest.mark.parametrize(("factor", "share"), [(2.0, 0.95), (5.0, 0.90), (10.0, 0.80)])
def test_goodput_holds_under_overload(outcome: Outcome, factor: float, share: float) -> None:
    phases = outcome.summary.phases
    best = max(phase.goodput for phase in phases)
    goodput = phases[FACTORS.index(factor)].goodput
    assert goodput >= share * best, f"{goodput:.1f} of at best {best:.1f} images/s"


@pytest.mark.parametrize("factor", [1.0, 2.0, 5.0, 10.0])
def test_what_is_accepted_is_answered_within_budget_and_two_batches(
    outcome: Outcome, factor: float
) -> None:
    good = outcome.summary.phases[FACTORS.index(factor)].good
    assert good is not None
    assert good.percentiles["p99"] <= ACCEPTED_MS


@pytest.mark.parametrize("factor", [2.0, 5.0, 10.0])
def test_refusals_come_at_once(outcome: Outcome, factor: float) -> None:
    check_refused_quickly(outcome.summary.phases[FACTORS.index(factor)])


def test_probes_answer_throughout(outcome: Outcome) -> None:
    check_probes(outcome)


def test_latency_is_back_to_idle_two_seconds_after_the_overload(outcome: Outcome) -> None:
    windows = outcome.plan.windows()
    idle = median(outcome.good_latencies(*windows[0]))
    begin, _ = windows[-1]
    after = median(outcome.good_latencies(begin + 2, begin + 3))
    # The second median is of some forty random arrivals, on cores that others may use.
    assert after <= 1.5 * idle + 20, f"{after:.0f} ms, {idle:.0f} ms before the overload"


@pytest.fixture(scope="module")
def large_bodies() -> Iterator[Outcome]:
    """Bodies of 1 MB, at the capacity and at five times it: 400 MB/s if they were read."""
    with pinned_service() as service:
        rates = (CAPACITY, 5 * CAPACITY)
        yield put_load(service, padded_image(), rates=rates, seconds=3.0)


def test_large_bodies_are_answered_or_refused_with_code_and_retry_after(
    large_bodies: Outcome,
) -> None:
    check_replies(large_bodies)


def test_large_bodies_are_refused_at_once(large_bodies: Outcome) -> None:
    check_refused_quickly(large_bodies.summary.phases[1])


def test_goodput_holds_under_large_bodies(large_bodies: Outcome) -> None:
    normal, five_times = (phase.goodput for phase in large_bodies.summary.phases)
    assert five_times >= 0.9 * normal


def test_probes_answer_in_spite_of_large_bodies(large_bodies: Outcome) -> None:
    check_probes(large_bodies)


@pytest.mark.parametrize("expect", [b"", b"Expect: 100-continue\r\n"])
def test_a_refusal_needs_the_head_alone(expect: bytes) -> None:
    head = b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n" + expect + b"\r\n"
    # A batch of 2 s runs, and what would wait for it is over the budget.
    with pinned_service(fake_batch_ms="2000", max_batch_size="1") as service:
        url = httpx.URL(service.url)
        address = url.host, url.port or 0
        with socket.create_connection(address, timeout=20) as busy:
            body = small_image()
            length = str(len(body)).encode()
            busy.sendall(
                b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: " + length + b"\r\n\r\n"
            )
            busy.sendall(body)
            wait_until_it_runs(service.url)
            with socket.create_connection(address, timeout=2) as sock:
                wire = Wire(sock)
                wire.send(head)  # and not one byte of the body
                status, headers = wire.read_head()
    assert status == 503
    assert int(headers["retry-after"]) >= 1


def wait_until_it_runs(url: str) -> None:
    """Return once the backend has a batch."""
    for _ in range(1000):
        metrics = httpx.get(f"{url}/metrics", trust_env=False).text
        if "metaserve_inflight_batches 1.0" in metrics:
            return
    raise AssertionError("no batch began to run")
