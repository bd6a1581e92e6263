"""What orchestrators and Prometheus ask."""

from __future__ import annotations

import logging
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.http.app import create_api
from tests.http.wire import REFUSED, check_error, grey, parts
from tests.servers import (
    WAIT_SECONDS,
    RunningService,
    WatchedBackend,
    running_service,
    service_process,
)

Samples = dict[str, list[dict[str, str]]]

METRICS = {
    "metaserve_request_duration_seconds": {"route", "status"},
    "metaserve_stage_duration_seconds": {"stage"},
    "metaserve_batch_size": set(),
    "metaserve_ready": set(),
    "metaserve_stalled_seconds": set(),
    "metaserve_queue_depth": set(),
    "metaserve_queue_wait_estimate_seconds": set(),
    "metaserve_inflight_batches": set(),
    "metaserve_requests_refused_total": {"reason"},
    "metaserve_requests_cancelled_total": set(),
    "metaserve_images_rejected_total": {"code"},
    "metaserve_backend_errors_total": {"backend"},
    "metaserve_model_info": {"name", "version", "variant", "backend", "precision", "device"},
}
HISTOGRAMS = {
    "metaserve_request_duration_seconds",
    "metaserve_stage_duration_seconds",
    "metaserve_batch_size",
}


def scrape(text: str) -> Samples:
    """Return sample name -> the labels of each."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append(sample.labels)
    return samples


def busy(service: RunningService) -> None:
    """Send a bit of everything."""
    client = service.client
    client.post("/classify", content=grey(0))
    client.post("/embed", files=parts(grey(0), grey(1), b"no image"))
    client.post("/classify", content=b"no image")
    client.post("/classify?top_k=0", content=b"no image")
    for path in ("/models", "/livez", "/docs", "/openapi.json", "/", "/secret/path/7", "/metrics"):
        client.get(path)
    client.get("/static-offline-docs/swagger-ui.css")
    client.put("/embed")


@pytest.fixture(scope="module")
def text() -> Iterator[str]:
    with running_service(batch_seconds={1: 0.001}) as service:
        service.state.draining = True
        service.client.get("/readyz")
        service.state.draining = False
        busy(service)
        reply = service.client.get("/metrics")
        assert reply.status_code == 200
        assert reply.headers["content-type"].startswith("text/plain; version=")
        yield reply.text


def test_probes_before_the_model_is_loaded() -> None:
    with running_service(loaded=False) as service:
        assert service.client.get("/livez").json() == {"status": "alive"}
        check_error(service.client.get("/readyz"), 503, "not_ready")
        check_error(service.client.get("/startupz"), 503, "not_ready")
        assert "metaserve_ready 0.0" in service.client.get("/metrics").text
        assert service.metric("metaserve_requests_refused_total", reason="not_ready") == 0


def test_probes_of_a_service_that_serves() -> None:
    with running_service() as service:
        assert service.client.get("/livez").json() == {"status": "alive"}
        assert service.client.get("/readyz").json() == {"status": "ready"}
        assert service.client.get("/startupz").json() == {"status": "started"}
        assert service.metric("metaserve_ready") == 1


def test_a_service_that_drains_is_unready_and_alive() -> None:
    with running_service() as service:
        service.state.draining = True

        reply = service.client.get("/readyz")
        check_error(reply, 503, "draining")
        assert reply.headers["connection"] == "close"
        assert service.client.get("/livez").status_code == 200
        assert service.client.get("/startupz").status_code == 200
        assert service.metric("metaserve_ready") == 0
        assert service.metric("metaserve_requests_refused_total", reason="draining") == 0


def test_a_stalled_backend_is_dead_until_it_moves_again() -> None:
    backend = WatchedBackend(gate_open=False)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result(WAIT_SECONDS)  # its thread is there before the service's are
        with running_service(backend, stall_seconds=0.05) as service:
            assert service.client.get("/livez").status_code == 200
            url = f"{service.url}/classify"
            waiting = pool.submit(
                httpx.post, url, content=grey(0), timeout=WAIT_SECONDS, trust_env=False
            )
            backend.wait_for_batches(1)

            service.wait_until(
                lambda: service.client.get("/livez").status_code == 503, "liveness fails"
            )

            stalled = service.metric("metaserve_stalled_seconds")
            assert 0.05 < stalled < WAIT_SECONDS
            assert "nothing completed" in check_error(
                service.client.get("/livez"), 503, "backend_unavailable"
            )
            assert service.client.get("/readyz").status_code == 200
            backend.gate.set()
            assert waiting.result(WAIT_SECONDS).status_code == 200
            assert service.client.get("/livez").status_code == 200
            assert service.metric("metaserve_stalled_seconds") == 0


def test_every_metric_of_the_contract_is_there_with_its_labels(text: str) -> None:
    samples = scrape(text)

    for name, labels in METRICS.items():
        sample = f"{name}_count" if name in HISTOGRAMS else name
        assert sample in samples, f"{name} is missing"
        assert all(set(one) == labels for one in samples[sample]), samples[sample]


def test_what_was_never_counted_is_shown_as_zero(text: str) -> None:
    samples = scrape(text)

    # A rate sees nothing of the step with which a series begins.
    refused = {one["reason"] for one in samples["metaserve_requests_refused_total"]}
    assert refused == REFUSED
    rejected = {one["code"] for one in samples["metaserve_images_rejected_total"]}
    assert rejected == {
        "unsupported_format",
        "image_decode_failed",
        "image_too_large",
        "image_bad_aspect",
    }
    assert 'metaserve_requests_refused_total{reason="overloaded"} 0.0' in text


def test_no_metric_is_there_that_the_contract_does_not_know(text: str) -> None:
    suffixes = r"(_bucket|_count|_sum|_created)$"
    names = {re.sub(suffixes, "", name) for name in scrape(text) if name.startswith("metaserve_")}

    # `_created` of a counter has lost the `_total`.
    assert names <= set(METRICS) | {name.removesuffix("_total") for name in METRICS}


def test_buckets_go_from_half_a_millisecond_to_ten_seconds(text: str) -> None:
    buckets = scrape(text)["metaserve_request_duration_seconds_bucket"]

    bounds = [float(labels["le"]) for labels in buckets if labels["route"] == "/models"]
    assert (bounds[0], bounds[-2], bounds[-1]) == (0.0005, 10.0, float("inf"))
    assert bounds == sorted(bounds)


def test_stages_are_those_of_the_contract(text: str) -> None:
    stages = {one["stage"] for one in scrape(text)["metaserve_stage_duration_seconds_count"]}

    assert stages == {"decode", "queue", "inference", "rank"}


def test_routes_are_templates_and_never_what_a_caller_wrote(text: str) -> None:
    with running_service(loaded=False) as service:
        paths = create_api(service.state).openapi()["paths"]
        service.state.pool.close()

    routes = {one["route"] for one in scrape(text)["metaserve_request_duration_seconds_count"]}

    assert routes <= set(paths) | {"/", "/docs", "/openapi.json", "unmatched"}
    assert {"/classify", "/embed", "/models", "/readyz", "unmatched"} <= routes
    assert "secret" not in text


def test_values_follow_the_traffic() -> None:
    with running_service() as service:
        busy(service)
        duration = "metaserve_request_duration_seconds_count"

        assert service.metric(duration, route="/classify", status="200") == 1
        assert service.metric(duration, route="/classify", status="400") == 1
        assert service.metric(duration, route="/classify", status="415") == 1
        assert service.metric(duration, route="/embed", status="405") == 1
        assert service.metric("metaserve_batch_size_sum") == 3
        stage = "metaserve_stage_duration_seconds_count"
        assert service.metric(stage, stage="inference") == 3
        assert service.metric(stage, stage="decode") == 3
        assert service.metric(stage, stage="rank") == 1
        rejected = "metaserve_images_rejected_total"
        assert service.metric(rejected, code="unsupported_format") == 2
        assert service.metric("metaserve_queue_depth") == 0
        assert service.metric("metaserve_inflight_batches") == 0


def test_gauges_show_what_waits() -> None:
    backend = WatchedBackend(gate_open=False)
    started = threading.Barrier(4)
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            pool.submit(started.wait, WAIT_SECONDS)
        started.wait(WAIT_SECONDS)
        with running_service(
            backend, max_batch_size=1, batch_seconds={1: 5.0}, queue_budget_ms=20_000
        ) as service:

            def classify(level: int) -> httpx.Response:
                url = f"{service.url}/classify"
                return httpx.post(url, content=grey(level), timeout=WAIT_SECONDS, trust_env=False)

            waiting = [pool.submit(classify, level) for level in range(3)]
            backend.wait_for_batches(1)
            service.wait_until(lambda: service.metric("metaserve_queue_depth") == 2, "two wait")

            assert service.metric("metaserve_inflight_batches") == 1
            estimate = service.metric("metaserve_queue_wait_estimate_seconds")
            assert 10 < estimate < 15, "two whole batches, and what remains of the running one"
            backend.gate.set()
            assert {one.result(WAIT_SECONDS).status_code for one in waiting} == {200}


def test_metrics_are_served_apart_on_a_port_of_their_own() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    with service_process({"METASERVE_METRICS_PORT": str(port)}) as service:
        check_error(httpx.get(f"{service.url}/metrics", trust_env=False), 404, "not_found")
        httpx.post(f"{service.url}/classify", content=grey(0), trust_env=False)
        apart = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False)

    assert apart.status_code == 200
    samples = scrape(apart.text)
    assert {"route": "/classify", "status": "200"} in samples[
        "metaserve_request_duration_seconds_count"
    ]
    assert "metaserve_model_info" in samples


def test_polls_while_the_model_loads_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with running_service(loaded=False) as service, caplog.at_level(logging.INFO):
        assert service.client.get("/readyz").status_code == 503
        assert [one for one in caplog.records if one.name == "metaserve.access"] == []
        assert service.client.get("/nothing").status_code == 404
        assert [one for one in caplog.records if one.name == "metaserve.access"] != []
