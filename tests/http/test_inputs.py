from __future__ import annotations

import base64
import json
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from app.http import schemas
from tests.http.wire import encode, grey, parts, picture, text, without_timing
from tests.servers import RunningService, running_service

FORMS: dict[str, Callable[[bytes], dict[str, Any]]] = {
    "raw without a content type": lambda data: {"content": data},
    "raw image/png": lambda data: {"content": data, "headers": {"content-type": "image/png"}},
    "raw image/anything": lambda data: {"content": data, "headers": {"content-type": "image/tga"}},
    "raw octet-stream": lambda data: {
        "content": data,
        "headers": {"content-type": "application/octet-stream"},
    },
    "raw as curl --data-binary sends it": lambda data: {
        "content": data,
        "headers": {"content-type": "application/x-www-form-urlencoded"},
    },
    "raw and chunked": lambda data: {"content": iter([data[:7], data[7:]])},
    "multipart": lambda data: {"files": parts(data)},
    "multipart beside another field": lambda data: {"files": parts(data), "data": {"note": "hi"}},
    "json image": lambda data: {"json": {"image": text(data)}},
    "json base64 with line breaks": lambda data: {
        "json": {"image": base64.encodebytes(data).decode()}
    },
    "json base64 with carriage returns and spaces": lambda data: {
        "json": {"image": " \r\n ".join(textwrap.wrap(text(data), 76))}
    },
    "json data uri": lambda data: {"json": {"image": f"data:image/png;base64,{text(data)}"}},
    "json data uri with a parameter, in capitals": lambda data: {
        "json": {"image": f"DATA:image/png;charset=utf-8;BASE64,{text(data)}"}
    },
    "json data uri without a type": lambda data: {"json": {"image": f"data:;base64,{text(data)}"}},
    "json with a charset": lambda data: {
        "content": json.dumps({"image": text(data)}),
        "headers": {"content-type": "Application/JSON; charset=utf-8"},
    },
}

FILES = {
    "png": encode(picture(1)),
    "jpeg": encode(picture(2, 400, 300), "JPEG"),
    "webp with transparency": encode(picture(3).convert("RGBA"), "WEBP"),
    "grey gif": encode(picture(4).convert("L"), "GIF"),
}


@pytest.fixture(scope="module")
def real() -> Iterator[RunningService]:
    with running_service("onnxruntime") as service:
        yield service


def ask(real: RunningService, path: str, request: dict[str, Any]) -> httpx.Response:
    reply = real.client.post(path, **request)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "application/json"
    return reply


@pytest.mark.parametrize("data", FILES.values(), ids=list(FILES))
@pytest.mark.parametrize("path", ["/classify?top_k=10", "/embed", "/embed?normalize=true"])
def test_every_form_of_one_image_gets_the_same_bytes(
    real: RunningService, path: str, data: bytes
) -> None:
    replies = {
        name: without_timing(ask(real, path, form(data)).content) for name, form in FORMS.items()
    }

    assert len(set(replies.values())) == 1, replies


@pytest.mark.parametrize("path", ["/classify", "/embed?encoding=base64"])
def test_one_image_and_a_list_of_one_hold_the_same_result(real: RunningService, path: str) -> None:
    data = FILES["png"]

    alone = ask(real, path, {"content": data}).json()
    listed = ask(real, path, {"json": {"images": [text(data)]}}).json()

    assert set(listed) == {"model", "version", "results"}
    (item,) = listed["results"]
    del alone["timing_ms"], item["timing_ms"]
    assert alone == {"model": listed["model"], "version": listed["version"]} | item


@pytest.mark.parametrize("path", ["/classify", "/embed"])
def test_several_images_get_what_each_gets_alone_in_the_order_sent(
    real: RunningService, path: str
) -> None:
    images = [encode(picture(seed)) for seed in range(11)]

    alone = [without_timing(ask(real, path, {"content": data}).content) for data in images]
    as_parts = ask(real, path, {"files": parts(*images)}).content
    as_json = ask(real, path, {"json": {"images": [text(data) for data in images]}}).content

    assert len(set(alone)) == len(images)
    assert without_timing(as_parts) == without_timing(as_json)
    results = json.loads(without_timing(as_parts))["results"]
    assert results == [
        {key: value for key, value in json.loads(one).items() if key not in ("model", "version")}
        for one in alone
    ]


def test_top_k_says_how_many_classes(real: RunningService) -> None:
    request = {"content": FILES["png"]}
    all_ten = ask(real, "/classify?top_k=10", request).json()["predictions"]

    assert [p["index"] for p in ask(real, "/classify", request).json()["predictions"]] == [
        p["index"] for p in all_ten[:5]
    ]
    assert ask(real, "/classify?top_k=1", request).json()["predictions"] == all_ten[:1]
    assert ask(real, "/classify?top_k=100000000000000000000", request).json()["predictions"] == (
        all_ten
    )


def test_predictions_are_ordered_labelled_and_sum_to_one(real: RunningService) -> None:
    predictions = ask(real, "/classify?top_k=10", {"content": FILES["jpeg"]}).json()["predictions"]

    probabilities = [p["probability"] for p in predictions]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-6)
    assert sorted(p["index"] for p in predictions) == list(range(10))
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert [p["label"] for p in predictions] == [words[p["index"]] for p in predictions]


@pytest.mark.parametrize("normalize", ["false", "true"])
def test_numbers_base64_and_bytes_hold_the_same_float32(
    real: RunningService, normalize: str
) -> None:
    query = f"/embed?normalize={normalize}"
    request = {"content": FILES["png"]}

    numbers = ask(real, query, request).json()
    coded = ask(real, f"{query}&encoding=base64", request).json()
    octets = real.client.post(
        query, headers={"accept": "application/octet-stream"}, content=FILES["png"]
    )

    assert octets.status_code == 200
    assert octets.headers["content-type"] == "application/octet-stream"
    assert octets.headers["x-embedding-dim"] == "64"
    assert np.asarray(numbers["embedding"], "<f4").tobytes() == octets.content
    assert base64.b64decode(coded["embedding"]) == octets.content
    assert (numbers["dim"], coded["dim"], len(octets.content)) == (64, 64, 4 * 64)
    assert numbers["normalized"] is coded["normalized"] is (normalize == "true")
    length = np.linalg.norm(np.frombuffer(octets.content, "<f4").astype(np.float64))
    assert bool(abs(length - 1) < 1e-6) is (normalize == "true")


def test_octets_of_several_images_follow_each_other(real: RunningService) -> None:
    images = [FILES["png"], FILES["jpeg"], FILES["png"]]
    headers = {"accept": "text/html, application/octet-stream;q=0.9"}

    together = real.client.post("/embed", headers=headers, files=parts(*images))
    alone = [real.client.post("/embed", headers=headers, content=data).content for data in images]

    assert together.status_code == 200
    assert together.content == b"".join(alone)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_several_embeddings_come_in_every_encoding(real: RunningService, encoding: str) -> None:
    images = [text(FILES["png"]), text(FILES["jpeg"])]

    reply = ask(real, f"/embed?encoding={encoding}", {"json": {"images": images}}).json()

    kinds = {"float": list, "base64": str}
    assert [type(result["embedding"]) for result in reply["results"]] == [kinds[encoding]] * 2
    assert [result["dim"] for result in reply["results"]] == [64, 64]


def test_timings_are_in_the_reply_and_add_up(real: RunningService) -> None:
    timing = ask(real, "/classify", {"content": FILES["jpeg"]}).json()["timing_ms"]

    assert list(timing) == ["decode", "queue", "inference", "total"]
    assert all(value >= 0 for value in timing.values())
    assert timing["decode"] + timing["queue"] + timing["inference"] <= timing["total"]


def test_photographs_are_turned_upright_unless_told_otherwise() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    upright = picture(5, 64, 64)
    turned = encode(upright.transpose(Image.Transpose.ROTATE_180), "PNG", exif=exif)

    with running_service("onnxruntime") as service:
        assert without_timing(ask(service, "/embed", {"content": turned}).content) == (
            without_timing(ask(service, "/embed", {"content": encode(upright)}).content)
        )
    with running_service("onnxruntime", exif_orientation=False) as service:
        assert without_timing(ask(service, "/embed", {"content": turned}).content) != (
            without_timing(ask(service, "/embed", {"content": encode(upright)}).content)
        )


def test_models_says_what_answers(real: RunningService) -> None:
    reply = real.client.get("/models")

    assert reply.status_code == 200
    content = reply.json()
    assert content["name"] == ask(real, "/classify", {"content": grey(9)}).json()["model"]
    expected = {"input_size": 32, "classes": 10, "dim": 64, "backend": "onnxruntime"}
    expected |= {"precision": "fp32", "device": "cpu", "variant": "caformer_digits"}
    assert {key: content[key] for key in expected} == expected
    assert content["proof"]["batch_dependence"] == 0
    profile = content["profile"]
    assert profile["max_batch_size"] == content["max_batch_size"]
    assert profile["batch_ms"] == content["batch_ms"]
    assert profile["lanes"] >= 1
    assert set(profile) == set(schemas.EngineProfile.model_fields)


def test_a_lone_request_with_many_images_is_not_refused_for_its_own_sake() -> None:
    images = [grey(level % 256, side=8) for level in range(40)]
    # The engine believes in half a second a batch of two, and a queue of one second.
    with running_service(
        batch_seconds={1: 0.5, 2: 0.5}, max_batch_size=2, queue_budget_ms=1000
    ) as service:
        results = service.client.post("/classify", files=parts(*images)).json()["results"]

    assert [result for result in results if "error" in result] == []
