"""The rules: what promtool says of them, and what it cannot know."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest

from app.http.app import create_api
from app.metrics_page import reference
from tests.monitoring.files import (
    PROMETHEUS,
    ROOT,
    alerts,
    measured_parts,
    panel_expressions,
    read_yaml,
    rules,
)
from tests.monitoring.prometheus import program
from tests.servers import running_service

EXPECTED = {
    "MetaserveRefusing",
    "MetaserveErrorRatio",
    "MetaserveSlow",
    "MetaserveStalled",
    "MetaserveNotReady",
    "MetaserveNoneReady",
    "MetaserveRestartLoop",
}
EXPRESSIONS = [rule["expr"] for rule in rules()] + [text for _, text in panel_expressions()]


def known_series() -> set[str]:
    """Return the name of every series that the service shows."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", reference(), re.MULTILINE)
    suffixes = {"histogram": ("_bucket", "_count", "_sum")}
    return {name + suffix for name, kind in rows for suffix in suffixes.get(kind, ("",))}


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_promtool_finds_nothing_wrong(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [program("promtool"), *arguments],
        cwd=PROMETHEUS,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_prometheus_loads_the_rules_and_nothing_else() -> None:
    assert read_yaml(PROMETHEUS / "prometheus.yml")["rule_files"] == ["alerts.yml"]
    assert read_yaml(PROMETHEUS / "alerts_test.yml")["rule_files"] == ["alerts.yml"]


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_every_alert_has_cases_for_and_against_it(name: str) -> None:
    cases = [
        bool(case["exp_alerts"])
        for test in read_yaml(PROMETHEUS / "alerts_test.yml")["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == name
    ]

    assert cases.count(True) >= 1
    assert cases.count(False) >= 2


def test_the_alerts_are_those_that_are_promised() -> None:
    assert set(alerts()) == EXPECTED


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_alert_says_what_is_wrong_and_where_to_read_on(name: str) -> None:
    alert: dict[str, Any] = alerts()[name]
    page = (ROOT / "docs/operations.md").read_text("utf-8")

    assert alert["labels"]["severity"] in ("critical", "warning")
    assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
    assert alert["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"
    section = re.search(rf"^### {name}\n(.+?)(?=^##)", page, re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/operations.md says nothing of {name}"
    for part in ("It means", "Look", "Do"):
        assert re.search(rf"\*\*{part}", section[1]), f"{name}: no {part}"


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_series_that_is_asked_for_is_one_that_the_service_shows(expression: str) -> None:
    names = set(re.findall(r"\b(?:metaserve|process|python)_\w+", expression))
    recorded = {rule["record"] for rule in rules() if "record" in rule}

    assert names <= known_series()
    assert set(re.findall(r"\bmetaserve:[\w:]+", expression)) <= recorded


def test_manifests_for_kubernetes_ask_for_series_that_the_service_shows() -> None:
    for path in (ROOT / "k8s").rglob("*.y*ml"):
        names = set(re.findall(r"\bmetaserve_[a-z_]+\b", path.read_text("utf-8")))
        assert names <= known_series(), path


def test_every_route_that_takes_images_is_looked_at_and_no_other() -> None:
    with running_service(loaded=False) as service:
        paths = create_api(service.state).openapi()["paths"]
    images = {path for path, methods in paths.items() if "post" in methods}

    for expression in EXPRESSIONS:
        if "metaserve_request_duration" in expression:
            found = re.findall(r'route=~"([^"]+)"', expression)
            assert len(found) == expression.count("metaserve_request_duration"), expression
            assert all(set(one.split("|")) == images for one in found), expression


def test_an_objective_at_a_bound_of_the_buckets_is_exact() -> None:
    (objective,) = (rule for rule in rules() if rule.get("record", "").endswith(":objective"))
    row = re.search(r"`metaserve_request_duration_seconds`.* Buckets: (.*)\.", reference())
    number = re.fullmatch(r"vector\((.+)\)", objective["expr"])

    assert row is not None
    assert number is not None
    assert number[1] in row[1].split(", ")


def test_parts_of_an_alert_are_found() -> None:
    assert measured_parts("a > 0.05\nand\nsum(b or c) >= 10") == ["a\nand\nsum(b or c)"]
    assert measured_parts('up{a="x or"} == 0\nor\nabsent(up{b="c"})') == [
        'up{a="x or"}',
        'up{b="c"}',
    ]
    assert measured_parts("a > scalar(b)\nand\nc >= 2") == ["a\nand\nc"]
