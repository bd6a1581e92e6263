"""Settings and the embedded package become a core that answers, whatever was learned."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest

from app import assemble
from app.assemble import WarmCore, open_core
from app.backends.base import Backend
from app.engine.lanes import Learned, NarrowLanes
from app.engine.shelf import ProfileShelf
from app.engine.timing import ServiceTimes
from app.engine.window import Request
from app.settings import load_settings
from app.types import Row
from models.golden import golden_images
from models.package import Package, find_package, open_package
from tests.engine.doubles import FAR_AHEAD, PATIENCE_SECONDS, Caller, CountingObserver
from tests.required import require


@pytest.fixture(scope="module")
def package() -> Package:
    require("onnxruntime")
    return open_package(find_package("caformer_digits"))


def open_with(package: Package, **flags: str) -> WarmCore:
    return open_core(load_settings({"threads": "2"} | flags), package, CountingObserver())


def answers(warm: WarmCore, package: Package, count: int) -> list[Row]:
    """Submit golden images in one go and return their rows."""
    callers = [Caller(value) for value in range(count)]
    images = golden_images(package.manifest.input.size, 5)[:count]
    for caller, image in zip(callers, images, strict=True):
        reply = caller.request.reply
        caller.request = Request(image, FAR_AHEAD, 0.0, reply)
        warm.core.submit(caller.request, announce=False)
    warm.core.announce()
    rows = [caller.answer() for caller in callers]
    assert all(isinstance(row, Row) for row in rows), rows
    return [row for row in rows if isinstance(row, Row)]


def test_without_lanes_the_backend_keeps_the_threads_it_was_given(
    package: Package, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "metaserve.engine"):
        warm = open_with(package, lanes="1")
    warm.core.close(PATIENCE_SECONDS)
    assert (warm.profile.threads, warm.profile.lanes) == (2, 1)
    assert warm.profile.lane_batch_seconds == {}
    assert [one.getMessage() for one in caplog.records] == [str(warm.profile)]


def test_what_is_learned_is_one_of_the_two_and_serves(package: Package) -> None:
    warm = open_with(package)
    rows = answers(warm, package, 5)
    warm.core.close(PATIENCE_SECONDS)
    assert warm.profile.threads in (1, 2)
    for row, expected in zip(rows, package.golden[0], strict=True):
        assert abs(row.logits - expected).max() <= 1e-4


def test_an_image_gets_the_same_answer_wide_and_in_a_lane(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    def keep_both(
        wide: Backend, times: ServiceTimes, open_narrow: object, lanes: int, limit: int
    ) -> Learned:
        assert callable(open_narrow)
        return Learned(wide, times, NarrowLanes(open_narrow(), times, lanes, 1, 1))

    monkeypatch.setattr(assemble, "learn_lanes", keep_both)
    before = set(threading.enumerate())
    warm = open_with(package)
    lone = [answers(warm, package, 1)[0]]
    together = answers(warm, package, 5)
    warm.core.close(PATIENCE_SECONDS)
    assert warm.profile.lanes == 2
    assert lone[0].logits.tobytes() == together[0].logits.tobytes()
    assert lone[0].embedding.tobytes() == together[0].embedding.tobytes()
    assert set(threading.enumerate()) == before


def test_what_one_process_measured_another_takes_over_without_measuring(
    package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shelf = ProfileShelf(tmp_path)
    first = open_core(load_settings({"threads": "2"}), package, CountingObserver(), shelf)
    first.core.close(PATIENCE_SECONDS)

    def never(*_: object) -> Learned:
        raise AssertionError("measured again")

    monkeypatch.setattr(assemble, "warm_up", never)
    monkeypatch.setattr(assemble, "learn_lanes", never)
    second = open_core(load_settings({"threads": "2"}), package, CountingObserver(), shelf)
    rows = answers(second, package, 5)
    second.core.close(PATIENCE_SECONDS)

    assert second.profile == first.profile
    for row, expected in zip(rows, package.golden[0], strict=True):
        assert abs(row.logits - expected).max() <= 1e-4
    with pytest.raises(AssertionError, match="measured again"):  # with other settings it does
        open_core(load_settings({"threads": "1"}), package, CountingObserver(), shelf)
