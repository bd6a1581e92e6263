"""Thousands of requests of every kind leave nothing behind."""

from __future__ import annotations

from app.bench.plan import Plan, build_request, parse_url
from app.bench.recording import summarise
from app.bench.run import measure
from tests.overload.scenario import leave, open_files, small_image, threads
from tests.servers import ServiceProcess, service_process, wait_until

REQUESTS = 3000
LEAVERS = 200


def test_descriptors_and_threads_are_as_before_after_thousands_of_requests() -> None:
    settings = {
        "METASERVE_BACKEND": "fake",
        "METASERVE_FAKE_BATCH_MS": "10",
        "METASERVE_MAX_BATCH_SIZE": "4",
        "METASERVE_QUEUE_BUDGET_MS": "40",
    }
    with service_process(settings) as service:
        pid = service.process.pid
        # Pools start their threads with their first work.
        mixed_load(service, seconds=1.0)
        files = settled_files(pid)
        threads_before = threads(pid)
        outcomes = mixed_load(service, seconds=4.0)
        assert sum(outcomes.values()) >= REQUESTS, outcomes
        kinds = {"200", "415 unsupported_format", "422 image_decode_failed", "503 overloaded"}
        assert kinds <= set(outcomes) <= kinds | {"504 deadline_exceeded"}
        wait_until(
            lambda: open_files(pid) <= files,
            f"{files} descriptors are open again, not {open_files(pid)}",
        )
        assert threads(pid) <= threads_before


def mixed_load(service: ServiceProcess, seconds: float) -> dict[str, int]:
    """Send good images, bad ones and more than fit; and callers that leave."""
    target = parse_url(service.url, "classify")
    good = build_request(target, small_image(), {})
    bad = build_request(target, b"no image", {})
    broken = build_request(target, small_image()[:60], {})
    hurried = build_request(target, small_image(), {"X-Request-Timeout-Ms": "5"})
    for _ in range(LEAVERS):
        leave(service.url, good)
    requests = (good, good, bad, good, broken, good, hurried)
    plan = Plan(target, requests, rates=(800.0,), seconds=seconds, warmup_seconds=0.0)
    (phase,) = summarise(measure(plan), plan).phases
    return phase.outcomes


def settled_files(pid: int) -> int:
    """Return the open descriptors once connections are closed: the fewest of three in a row."""
    seen: list[int] = []

    def is_steady() -> bool:
        seen.append(open_files(pid))
        return len(seen) >= 200 and len(set(seen[-200:])) == 1

    wait_until(is_steady, "the number of descriptors settles")
    return seen[-1]
