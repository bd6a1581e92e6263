"""The metrics reference in docs/operations.md, held against what is served."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.metrics_page import BEGIN, END, reference, with_metrics
from tests.http.wire import grey
from tests.servers import service_process

PAGE = Path(__file__).parents[1] / "docs" / "operations.md"
ROW = re.compile(r"^\| `(\w+)` \| (\w+) \| (.*?) \| (.+) \|$", re.MULTILINE)


def test_the_page_is_what_the_code_says() -> None:
    page = PAGE.read_text("utf-8")

    assert page == with_metrics(page), "run `make docs`"


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="does not hold"):
        with_metrics(f"no marks, {END}")
    assert with_metrics(f"a {BEGIN} old {END} z") == f"a {BEGIN}\n{reference()}{END} z"


@pytest.mark.parametrize("workers", [1, 2])
def test_the_reference_lists_what_is_served_and_nothing_else(workers: int) -> None:
    with service_process(
        {"METASERVE_WORKERS": str(workers), "METASERVE_BACKEND": "fake"}
    ) as service:
        httpx.post(f"{service.url}/classify", content=grey(0), trust_env=False)
        text = httpx.get(f"{service.url}/metrics", trust_env=False).text

    other = "Only with several processes" if workers == 1 else "Only with one process"
    listed = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)))
        for name, kind, labels, words in ROW.findall(reference())
        if other not in words
    }
    served = {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels} - {"le"},
        )
        for family in text_string_to_metric_families(text)
    }
    assert served == listed


def test_the_reference_names_buckets_and_help() -> None:
    rows = {name: words for name, _, _, words in ROW.findall(reference())}

    assert rows["metaserve_batch_size"] == (
        "Images in each batch the backend ran. Buckets: 1, 2, 4, 8, 16, 32, 64, 128, 256, +Inf."
    )
    assert "Buckets: 0.0005, 0.001" in rows["metaserve_stage_duration_seconds"]
    assert rows["metaserve_processes"].endswith("Only with several processes.")
    assert next(iter(rows)).startswith("metaserve_")
