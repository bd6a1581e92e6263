"""The serving benchmark: its servers do the same work, and its page says what was measured."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image

import benchmarks.serving_report as report
from app.bench.server_process import CannotStart
from benchmarks.serving import measure_flatness, measure_load
from benchmarks.serving_limits import Limits
from benchmarks.serving_loads import Load
from benchmarks.serving_processes import ours, theirs
from models.package import PRETRAINED, open_package

IMAGES = Path(__file__).parents[2] / "examples/images"


def load(image: bytes | None = None) -> Load:
    """Return a load of the embedded package."""
    drawing = (IMAGES / "drawing_four.png").read_bytes()
    package = open_package(PRETRAINED / "caformer_digits")
    return Load("tiny", "a drawing", package, image or drawing, seconds=0.2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    # One for all tests: an export takes seconds.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_the_handwritten_service_sees_in_images_what_ours_sees() -> None:
    one = load()
    with ours(one, "scaled", 1) as mine, theirs(one, 1) as other:
        for path in sorted(IMAGES.glob("*_*.png")):
            answers = [
                httpx.post(
                    f"{server.url}/classify",
                    content=path.read_bytes(),
                    headers={"Content-Type": "application/octet-stream"},
                    trust_env=False,
                ).json()["predictions"]
                for server in (mine, other)
            ]
            best = [predictions[0] for predictions in answers]
            assert best[0]["index"] == best[1]["index"], path
            assert best[0]["probability"] == pytest.approx(best[1]["probability"], abs=0.02), path
        assert mine.cpu_seconds() > 0
        assert mine.memory_mb() > 10


def test_a_load_is_measured_and_its_page_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "DOCS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "plots/serving.json")
    monkeypatch.setattr(report, "PAGE", tmp_path / "benchmarks.md")
    (tmp_path / "benchmarks.md").write_text("# Benchmarks\n\nkept\n")
    monkeypatch.setattr("benchmarks.serving.SHARES", (0.5,))
    result = measure_load(load(), 1, 1)
    for _ in range(2):  # a second run replaces the first
        report.keep("tiny", result)
        report.keep("flat", {"points": [{"requests": 0, "mb": 1.0, "files": 9, "threads": 3}]})
        report.write_page()
    page = (tmp_path / "benchmarks.md").read_text()
    assert page.startswith("# Benchmarks\n\nkept\n")
    assert page.count("### tiny: a drawing") == 1
    assert "| ours, scaled, 1 proc. | " in page
    assert "| hand-written (aim 3.0) | 2.2 | " in page
    assert "not measured" not in page
    assert "| 0 | 1.0 | 9 | 3 |" in page
    assert (tmp_path / "plots/tiny.svg").exists()
    results = json.loads((tmp_path / "plots/serving.json").read_text())
    assert results["tiny"]["rounds"]["rate ours, scaled, 1 proc. 8"][0] > 0


def test_flatness_is_watched_over_good_bad_and_refused_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.serving.FLAT_REQUESTS", 200)
    points = measure_flatness(load())["points"]
    assert points[-1]["requests"] >= 200
    assert all(one["mb"] > 10 and one["threads"] > 1 for one in points)


def test_limits_count_images() -> None:
    limits = Limits(load(), 2)
    buckets = limits.buckets(0.05)
    best = limits.best(buckets)
    assert limits.run_rate(best, 0.1) > 0
    alone, both = limits.decode_rate("scaled", 1, 0.2), limits.pipelined_rate("scaled", best, 0.2)
    assert 0 < both < 2.5 * 2 * alone
    assert limits.decode_ms("scaled") == pytest.approx(1000 / alone, rel=0.9)


def test_a_server_that_cannot_start_gives_its_reason() -> None:
    picture = BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with (
        pytest.raises(CannotStart, match="METASERVE_DECODE='nosuch' cannot be used"),
        ours(load(picture.getvalue()), "nosuch", 1),
    ):
        pass


def test_decoding_is_compared_with_what_the_load_generator_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "cpu_limit", lambda: 2)
    server = "ours, scaled, 2 proc. 32"
    rounds = {
        f"rate {server}": [800.0],
        "decode limit scaled": [1000.0],
        f"generator {server}": [0.5],  # 0.4 of two CPUs
    }
    (row,) = report._with_what_is_left(rounds, server, "scaled")
    assert row.endswith("| - | 1.00 | |")
