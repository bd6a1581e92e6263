"""The embedded model over real HTTP: the accuracy it states, and answers free of their company."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from examples.digits.data import held_out
from examples.digits.drawings import drawings
from examples.digits.evaluate import read_digits
from models.build import load_served_model
from models.package import PRETRAINED, open_package
from tests.servers import RunningService, running_service

TIMING = re.compile(rb',"timing_ms":\{[^}]*\}')
PACKAGE = open_package(PRETRAINED / "caformer_digits")


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    """The embedded model on ONNX Runtime, which waits long enough for batches to form."""
    with running_service("onnxruntime", max_batch_size=8, max_wait_ms=5) as service:
        yield service


def untimed(reply: httpx.Response) -> bytes:
    assert reply.status_code == 200, reply.text
    return TIMING.sub(b"", reply.content)


def test_package_is_small_and_reads_the_held_out_digits() -> None:
    size = sum(path.stat().st_size for path in PACKAGE.path.iterdir())
    assert size <= 3_000_000
    evaluation = PACKAGE.manifest.evaluation
    assert evaluation is not None
    assert evaluation.images == len(held_out()) >= 350
    assert evaluation.top1 == evaluation.correct / evaluation.images >= 0.98


def test_digits_drawn_as_with_a_mouse_are_read_in_every_shape_and_condition() -> None:
    drawn = list(drawings())
    assert len(drawn) >= 3000
    right = read_digits(load_served_model(PACKAGE), [one.image for one in drawn])
    by_condition: dict[tuple[str, str], list[bool]] = defaultdict(list)
    for drawing, found in zip(drawn, right, strict=True):
        by_condition["all", ""].append(bool(found == drawing.label))
        for condition in drawing.conditions.items():
            by_condition[condition].append(bool(found == drawing.label))
    share = {condition: sum(read) / len(read) for condition, read in by_condition.items()}
    assert share["all", ""] >= 0.97
    poor = {condition: read for condition, read in share.items() if read < 0.85}
    assert not poor
    # Thick or thin, any colours, off centre: no such condition is hard.
    shapes = {condition for condition in share if condition[0] == "glyph"}
    assert len(shapes) >= 20
    assert min(share[condition] for condition in share.keys() - shapes) >= 0.95


def test_digits_sent_one_by_one_give_the_accuracy_the_manifest_states(
    service: RunningService,
) -> None:
    correct = 0
    for png, label in held_out():
        reply = service.client.post("/classify?top_k=1", content=png)
        (best,) = reply.json()["predictions"]
        assert best["label"] == PACKAGE.labels[best["index"]]  # type: ignore[index]
        correct += best["index"] == label
    assert correct == PACKAGE.manifest.evaluation.correct  # type: ignore[union-attr]


def test_digits_sent_in_batches_give_the_accuracy_the_manifest_states(
    service: RunningService,
) -> None:
    digits, correct = held_out(), 0
    for start in range(0, len(digits), 50):
        part = digits[start : start + 50]
        files = [("image", (f"{index}.png", png)) for index, (png, _) in enumerate(part)]
        results = service.client.post("/classify", files=files).json()["results"]
        best = [result["predictions"][0]["index"] for result in results]
        correct += sum(found == label for found, (_, label) in zip(best, part, strict=True))
    assert correct == PACKAGE.manifest.evaluation.correct  # type: ignore[union-attr]


@pytest.mark.parametrize("route", ["/classify?top_k=10", "/embed"])
def test_json_of_an_image_is_byte_identical_alone_and_in_any_batch(
    service: RunningService, route: str
) -> None:
    digits = [png for png, _ in held_out()][:64]
    alone = [untimed(service.client.post(route, content=png)) for png in digits]

    with ThreadPoolExecutor(16) as callers:  # batches form from different callers' images
        crowded = list(
            callers.map(lambda png: untimed(service.client.post(route, content=png)), digits * 4)
        )
    assert crowded == alone * 4

    files = [("image", ("digit.png", png)) for png in digits]
    together = untimed(service.client.post(route, files=files))
    found = re.fullmatch(rb'(\{"model":"[^"]*","version":"[^"]*",)"results":\[(.*)\]\}', together)
    assert found is not None
    head, items = found.groups()
    assert items == b",".join(b"{" + one.removeprefix(head) for one in alone)


def test_batches_do_form(service: RunningService) -> None:
    files = [("image", ("digit.png", png)) for png, _ in held_out()[:64]]
    batches, images = "metaserve_batch_size_count", "metaserve_batch_size_sum"
    before = service.metric(images), service.metric(batches)
    assert service.client.post("/classify", files=files).status_code == 200
    assert service.metric(images) - before[0] == 64
    assert service.metric(batches) - before[1] < 64
