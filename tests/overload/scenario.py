"""A service of known speed on a core of its own, and load on it from the other."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from app.bench.plan import Plan, build_request, parse_url
from app.bench.recording import Recording, Summary, summarise
from app.bench.run import measure
from tests.http.wire import grey
from tests.servers import ServiceProcess, service_process

BATCH_MS = 100
BATCH_SIZE = 8
CAPACITY = 1000 / BATCH_MS * BATCH_SIZE
"""Images per second, as many as there can be."""
BUDGET_MS = 500
REFUSAL_MS = 100
PROBE_MS = 100

SETTINGS = {
    "METASERVE_BACKEND": "fake",
    "METASERVE_FAKE_BATCH_MS": str(BATCH_MS),
    "METASERVE_MAX_BATCH_SIZE": str(BATCH_SIZE),
    "METASERVE_QUEUE_BUDGET_MS": str(BUDGET_MS),
    "METASERVE_LOG_LEVEL": "warning",
}


@dataclass(frozen=True)
class Outcome:
    """What the callers and the probes saw in one run."""

    plan: Plan
    recording: Recording
    summary: Summary
    probes: Summary

    def good_latencies(self, begin: float, end: float) -> list[float]:
        """Return milliseconds of good replies to requests that were to start in a span."""
        good = self.recording.names.get("200", -1)
        rows = zip(
            self.recording.intended, self.recording.ended, self.recording.outcomes, strict=True
        )
        return [
            1000 * (ended - intended)
            for intended, ended, outcome in rows
            if begin <= intended < end and outcome == good
        ]


@contextmanager
def pinned_service(**settings: str) -> Iterator[ServiceProcess]:
    """Start the service on the first core, and leave this process and its children the others.

    With one core they share it: what the callers see then includes their own share, and the
    thresholds are the harder to keep.
    """
    cores = sorted(os.sched_getaffinity(0))
    # A child inherits the affinity of the thread that starts it, and all its threads do.
    os.sched_setaffinity(0, cores[:1])
    env = SETTINGS | {f"METASERVE_{name.upper()}": value for name, value in settings.items()}
    try:
        # "ready" is logged as information, so it is asked for instead.
        with service_process(env | {"METASERVE_LOG_LEVEL": "info"}) as service:
            os.sched_setaffinity(0, cores[1:] or cores)
            yield service
    finally:
        os.sched_setaffinity(0, cores)


def put_load(service: ServiceProcess, body: bytes, **fields: Any) -> Outcome:
    """Run the load and probes beside it; each in a process of its own."""
    target = parse_url(service.url, "classify")
    usual: dict[str, Any] = {"warmup_seconds": 1.0, "timeout_seconds": 10.0}
    plan = Plan(target, (build_request(target, body, {}),), **(usual | fields))
    probes = Plan(
        target,
        tuple(f"GET /{path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in ("livez", "readyz")),
        rates=(20.0,),
        arrivals="uniform",
        warmup_seconds=0.0,
        seconds=plan.total_seconds,
        timeout_seconds=10.0,
    )
    with ThreadPoolExecutor(2) as pool:
        load, probing = pool.submit(measure, plan), pool.submit(measure, probes)
        recording, probed = load.result(120), probing.result(120)
    return Outcome(plan, recording, summarise(recording, plan), summarise(probed, probes))


def small_image() -> bytes:
    """Return an image whose decoding costs next to nothing."""
    return grey(128, side=32)


def padded_image(size: int = 1_000_000) -> bytes:
    """Return a small image with so much behind it that its body has `size` bytes."""
    image = small_image()
    return image + bytes(size - len(image))


def median(values: list[float]) -> float:
    """Return the median."""
    assert values, "nothing was measured"
    return float(np.median(values))


def open_files(pid: int) -> int:
    """Return how many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    """Return how many threads a process has."""
    return len(os.listdir(f"/proc/{pid}/task"))


def leave(url: str, request: bytes) -> None:
    """Send a request and go away without its reply."""
    parsed = httpx.URL(url)
    with socket.create_connection((parsed.host, parsed.port or 0), timeout=20) as sock:
        sock.sendall(request)
