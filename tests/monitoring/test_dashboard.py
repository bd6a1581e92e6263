"""The shape of the dashboard, which Grafana would not complain about."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.dashboard import COLUMNS, DPI, filled_in, in_words, label_times
from tests.monitoring.files import GRAFANA, choices, dashboard, panel_expressions, read_yaml

PANELS: list[dict[str, Any]] = dashboard()["panels"]

# Of Grafana's own, those that show numbers; another name shows "panel plugin not found".
PANEL_TYPES = {"bargauge", "gauge", "heatmap", "histogram", "stat", "table", "timeseries"}

# What has to be seen -> a series that shows it, and the panel where.
SUBJECTS = {
    "request rate": ("metaserve_request_duration_seconds_count", "Requests by route and status"),
    "error ratio": ('status!="503"', "Refused and failed"),
    "refusal ratio": ("metaserve_requests_refused_total", "Refused and failed"),
    "percentiles": ("metaserve_request_duration_seconds_bucket", "Latency by route"),
    "stages": ("metaserve_stage_duration_seconds_sum", "Where an image's time goes"),
    "batch size": ("metaserve_batch_size_sum", "Batch size"),
    "queue depth": ("metaserve_queue_depth", "Queue"),
    "queue wait": ("metaserve_queue_wait_estimate_seconds", "Queue wait"),
    "backend errors": ("metaserve_backend_errors_total", "Backend errors"),
    "memory": ("process_resident_memory_bytes", "Memory"),
}


@pytest.mark.parametrize("subject", SUBJECTS)
def test_there_is_a_panel_for_every_subject(subject: str) -> None:
    series, title = SUBJECTS[subject]

    assert any(series in text for found, text in panel_expressions() if found == title)


def test_latencies_are_percentiles_by_route() -> None:
    (panel,) = (one for one in PANELS if one["title"] == "Latency by route")

    for percentile in ("0.5", "0.9", "0.99"):
        start = f"histogram_quantile({percentile}, sum by (route, le)"
        assert any(target["expr"].startswith(start) for target in panel["targets"])


def test_ids_and_titles_are_unique() -> None:
    for key in ("id", "title"):
        values = [panel[key] for panel in PANELS]
        assert len(values) == len(set(values))


def test_panels_fill_the_width_and_do_not_overlap() -> None:
    cells = {
        panel["title"]: {
            (column, row)
            for column in range(place["x"], place["x"] + place["w"])
            for row in range(place["y"], place["y"] + place["h"])
        }
        for panel in PANELS
        for place in [panel["gridPos"]]
    }
    for (one, some), (other, others) in combinations(cells.items(), 2):
        assert not some & others, f"{one} is over {other}"
    taken = set[tuple[int, int]]().union(*cells.values())
    height = 1 + max(row for _, row in taken)
    assert taken == {(column, row) for column in range(COLUMNS) for row in range(height)}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_has_a_unit_a_description_and_the_provisioned_source(panel: dict[str, Any]) -> None:
    (source,) = read_yaml(GRAFANA / "provisioning/datasources/prometheus.yml")["datasources"]

    assert in_words(panel["fieldConfig"]["defaults"]["unit"])(1.5)
    assert panel["description"]
    assert panel["datasource"] == {"type": source["type"], "uid": source["uid"]}
    refs = [target["refId"] for target in panel["targets"]]
    assert len(refs) == len(set(refs))


def test_variables_read_from_the_provisioned_source() -> None:
    (source,) = read_yaml(GRAFANA / "provisioning/datasources/prometheus.yml")["datasources"]
    variables = dashboard()["templating"]["list"]

    assert [one["name"] for one in variables] == ["job", "instance"]
    assert {one["type"] for one in variables} == {"query"}
    assert {one["datasource"]["uid"] for one in variables} == {source["uid"]}


def test_a_variable_holds_the_label_of_its_name() -> None:
    labels = {name: label for name, (_, label) in choices().items()}

    assert labels == {"job": "job", "instance": "instance"}
    for variable in dashboard()["templating"]["list"]:
        assert variable["definition"] == variable["query"]["query"]


def test_grafana_knows_the_types_of_the_panels_and_the_schema() -> None:
    found = dashboard()

    assert {panel["type"] for panel in PANELS} <= PANEL_TYPES
    assert isinstance(found["schemaVersion"], int)
    assert found["schemaVersion"] > 0
    assert found["uid"]
    assert found["title"]


def test_the_provider_reads_files() -> None:
    (provider,) = read_yaml(GRAFANA / "provisioning/dashboards/metaserve.yml")["providers"]

    assert provider["type"] == "file"
    assert provider["options"]["path"].startswith("/")


def test_every_expression_is_of_the_chosen_instances() -> None:
    for title, expression in panel_expressions():
        if "metaserve:" in expression:  # a recorded number, the same for all
            continue
        braces = expression.count("{")
        chosen = expression.count('job=~"$job", instance=~"$instance"')
        assert braces == chosen >= 1, f"{title}: {expression}"
        assert "$" not in filled_in(expression, "1m")


@pytest.mark.parametrize("minutes", [1, 5, 10, 11, 30, 60, 360, 1440])
@pytest.mark.parametrize("width", [1.7, 4.4, 7.0])
def test_labels_of_the_time_do_not_overlap(width: float, minutes: float) -> None:
    figure = Figure(figsize=(width + 2, 2), dpi=DPI)
    axes = figure.add_axes((1 / (width + 2), 0.3, width / (width + 2), 0.6))

    label_times(axes, 3.0, 3.0 + 60 * minutes, width)

    figure.draw_without_rendering()
    boxes = [
        label.get_window_extent()
        for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        if 3.0 <= at <= 3.0 + 60 * minutes
    ]
    assert len(boxes) >= 2, "one alone says nothing of the scale"
    gaps = [right.x0 - left.x1 for left, right in pairwise(boxes)]
    assert min(gaps) > 0.05 * DPI
