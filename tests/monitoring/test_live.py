"""A real Prometheus scrapes real services under load: every expression has something to show."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from PIL import Image

from benchmarks.dashboard import Span, draw, filled_in
from tests.http.wire import grey, parts
from tests.monitoring.files import alerts, choices, measured_parts, panel_expressions, rules
from tests.monitoring.prometheus import Prometheus, running_prometheus
from tests.servers import WAIT_SECONDS, service_process, wait_until

# Room for six images in all: eight callers are too many.
SMALL = {
    "METASERVE_BACKEND": "fake",
    "METASERVE_FAKE_BATCH_MS": "20",
    "METASERVE_MAX_BATCH_SIZE": "2",
    "METASERVE_QUEUE_BUDGET_MS": "40",
}
CALLERS = 8
RATE_INTERVAL = "30s"
ELSEWHERE = "kube_pod_container_status_restarts_total"
"""kube-state-metrics shows it; the cases of alerts_test.yml hold it."""


@dataclass(frozen=True)
class Place:
    """Two services, of one process and of several, and who watches them."""

    prometheus: Prometheus
    targets: list[str]
    began_at: float


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    fragile = (sys.executable, "-m", "tests.monitoring.fragile_service")
    several = SMALL | {
        "METASERVE_WORKERS": "2",
        "METASERVE_ENGINE": "shared",
        "METASERVE_METRICS_PORT": "0",
    }
    began_at = time.time()
    with ExitStack() as stack:
        one = stack.enter_context(service_process(SMALL, command=fragile))
        two = stack.enter_context(service_process(several))
        port = two.wait_for_log("metrics on port")["message"].split()[-1]
        targets = [one.url.removeprefix("http://"), f"127.0.0.1:{port}"]
        folder = tmp_path_factory.mktemp("prometheus")
        prometheus = stack.enter_context(running_prometheus(folder, targets))
        stack.enter_context(callers(one.url, two.url))
        yield Place(prometheus, targets, began_at)


@contextmanager
def callers(*urls: str) -> Iterator[None]:
    """Send a bit of everything to services, from as many callers each as are too many."""
    ends = threading.Event()
    threads = [
        threading.Thread(target=call, args=(url, ends), daemon=True)
        for url in urls
        for _ in range(CALLERS)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), "a caller hangs"


def call(url: str, ends: threading.Event) -> None:
    black, white = grey(0), grey(255)
    with httpx.Client(base_url=url, timeout=WAIT_SECONDS, trust_env=False) as client:
        while not ends.is_set():
            for _ in range(5):
                client.post("/classify", content=white)
                client.post("/embed", files=parts(white, white))
            client.post("/classify", content=black)
            client.post("/classify", content=b"no image")
            ends.wait(0.01)


def wait_for_values(prometheus: Prometheus, expressions: dict[str, str]) -> None:
    """Return once every expression has a finite value.

    Args:
        prometheus: that is asked.
        expressions: what each is for -> it.
    """
    missing = dict(expressions)

    def nothing_is_missing() -> bool:
        for name, expression in list(missing.items()):
            values = [value for _, value in prometheus.query(expression)]
            if any(math.isfinite(value) for value in values):
                del missing[name]
        return not missing

    pause = threading.Event()
    try:
        wait_until(nothing_is_missing, "values", seconds=40, between=lambda: pause.wait(0.3))
    except AssertionError:
        raise AssertionError(f"these are empty under traffic: {missing}") from None


def test_every_panel_has_something_to_show(place: Place) -> None:
    expressions = {
        f"{title} {index}": filled_in(text, RATE_INTERVAL)
        for index, (title, text) in enumerate(panel_expressions())
    }

    wait_for_values(place.prometheus, expressions)


def test_every_variable_has_something_to_choose(place: Place) -> None:
    wait_for_values(place.prometheus, {"both are scraped": "count(metaserve_ready) == 2"})

    values = {
        name: place.prometheus.label_values(filled_in(series, RATE_INTERVAL), label)
        for name, (series, label) in choices().items()
    }
    assert values == {"job": ["metaserve"], "instance": sorted(place.targets)}


def test_every_alert_has_something_to_look_at(place: Place) -> None:
    expressions = {
        f"{name}: {part}": part
        for name, alert in alerts().items()
        for part in measured_parts(alert["expr"])
        if ELSEWHERE not in part
    }

    wait_for_values(place.prometheus, expressions)


def test_the_rules_are_in_force(place: Place) -> None:
    def loaded() -> list[str]:
        return [rule["name"] for rule in place.prometheus.rules() if rule["health"] == "ok"]

    names = [rule.get("alert") or rule["record"] for rule in rules()]
    wait_until(lambda: loaded() == names, f"all of them are evaluated: {names}")


def test_what_was_sent_is_seen(place: Place) -> None:
    wait_for_values(
        place.prometheus,
        {
            "two are ready": "sum(metaserve_ready) == 2",
            "one has two workers": 'sum(metaserve_processes{role="worker"}) == 2',
            "both refuse": 'count(metaserve_requests_refused_total{reason="overloaded"} > 0) == 2',
            "a ratio": "metaserve:images_refused:ratio_rate5m > 0 < 1",
            "black images": "metaserve:requests_failed:ratio_rate5m > 0 < 1",
            "failed batches": 'metaserve_backend_errors_total{backend="fake"} > 0',
            "rejected": 'metaserve_images_rejected_total{code="unsupported_format"} > 0',
            "batches of two": "sum(metaserve_batch_size_sum / metaserve_batch_size_count) > 2.0",
            "batches take 20 ms": "min(metaserve:request_duration_seconds:p99_5m) > 0.02",
            "not stalled": "max(metaserve_stalled_seconds) < 5",
        },
    )


def test_nothing_pages_in_the_first_minute(place: Place) -> None:
    wait_for_values(place.prometheus, {"refusals": "metaserve:images_refused:ratio_rate5m > 0.05"})

    firing = {one["alertname"] for one, _ in place.prometheus.query('ALERTS{alertstate="firing"}')}
    assert firing == set()
    pending = {one["alertname"] for one, _ in place.prometheus.query("ALERTS")}
    assert "MetaserveRefusing" in pending, "and it is on its way"


def test_the_dashboard_is_drawn(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "plots" / "dashboard.png"

    draw(place.prometheus.url, Span(place.began_at, time.time(), RATE_INTERVAL), out)

    assert out.stat().st_size < 300_000
    with Image.open(out) as picture:
        assert picture.width == 1440
        assert len(picture.convert("RGB").getcolors(256) or []) > 20, "it shows lines"


def test_an_instance_that_goes_away_is_missed(tmp_path: Path) -> None:
    with service_process(SMALL, wait="listening") as third:
        target = third.url.removeprefix("http://")
        with running_prometheus(tmp_path, [target]) as prometheus:
            wait_for_values(prometheus, {"it is ready": "metaserve_ready == 1"})
            third.process.kill()
            not_ready = alerts()["MetaserveNotReady"]["expr"]
            none_ready = alerts()["MetaserveNoneReady"]["expr"]
            wait_for_values(prometheus, {"one": not_ready, "none": none_ready})

            assert {one["instance"] for one, _ in prometheus.query(not_ready)} == {target}
