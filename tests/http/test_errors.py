"""Every error code of the contract, reached over a socket; 401 stands in test_auth.py."""

from __future__ import annotations

import inspect
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

import app.errors
from app.errors import BackendUnavailable, InvalidInput, Refused, ServiceError
from app.http.errors import STATUSES
from app.types import Batch, Rows
from tests.http.wire import (
    REFUSED,
    Wire,
    best_classes,
    check_error,
    encode,
    grey,
    http,
    parts,
    text,
)
from tests.servers import (
    WAIT_SECONDS,
    RunningService,
    WatchedBackend,
    fake_backend,
    running_service,
)

MULTIPART = {"content-type": "multipart/form-data; boundary=XX"}
MULTIPART_OF = "multipart/form-data; boundary="
PART = b"--XX\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n"
JSON = {"content-type": "application/json"}


def family(root: type[ServiceError] = ServiceError) -> list[type[ServiceError]]:
    return [root, *(one for child in root.__subclasses__() for one in family(child))]


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service(
        body_limit_bytes=100_000, max_images=4, max_pixels=10_000, receive_timeout_ms=300
    ) as running:
        yield running


class Raising:
    """A fake backend that raises when an image of a batch is almost white."""

    def __init__(self, error: Exception) -> None:
        self._inner = fake_backend()
        self._error = error
        self.info = self._inner.info

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        if batch.reshape(len(batch), -1).mean(1).max() > 250:
            raise self._error
        return self._inner.run(batch)

    def close(self) -> None:
        self._inner.close()


# The table.


def test_every_error_stands_in_the_table_of_statuses() -> None:
    abstract = {ServiceError, InvalidInput, Refused}

    assert set(STATUSES) == set(family()) - abstract
    assert len({error.code for error in STATUSES}) == len(STATUSES)


def test_statuses_are_those_of_the_contract() -> None:
    assert {error.code: status for error, status in STATUSES.items()} == {
        "bad_request": 400,
        "unauthenticated": 401,
        "not_found": 404,
        "method_not_allowed": 405,
        "receive_timeout": 408,
        "payload_too_large": 413,
        "unsupported_format": 415,
        "image_decode_failed": 422,
        "image_too_large": 422,
        "image_bad_aspect": 422,
        "inference_failed": 500,
        "overloaded": 503,
        "draining": 503,
        "not_ready": 503,
        "backend_unavailable": 503,
        "deadline_exceeded": 504,
    }


def test_every_error_is_drawn_in_the_tree_with_its_code() -> None:
    tree = inspect.getdoc(app.errors)
    assert tree is not None

    for error in family():
        drawn = re.search(rf"^ *{error.__name__}( +(.+))?$", tree, re.MULTILINE)
        assert drawn, f"{error.__name__} is missing in the tree of app/errors.py"
        if error in STATUSES:
            assert drawn[2] == error.code


def test_codes_that_ask_to_come_again_are_the_refusals() -> None:
    assert {error.code for error in family(Refused)} - {"internal_error"} == REFUSED


# 400 bad_request


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({}, "body is empty"),
        ({"content": b""}, "body is empty"),
        ({"content": b"", "headers": JSON}, "no JSON"),
        ({"content": b"{", "headers": JSON}, "no JSON"),
        ({"content": b"\xff\xfe{}", "headers": JSON}, "no JSON"),
        ({"content": b"[" * 5000, "headers": JSON}, "no JSON"),
        ({"content": b"null", "headers": JSON}, "not what this route takes"),
        ({"json": []}, "not what this route takes"),
        ({"json": "text"}, "not what this route takes"),
        ({"json": {}}, "not what this route takes"),
        ({"json": {"image": text(grey(0)), "images": []}}, "not what this route takes"),
        ({"json": {"image": text(grey(0)), "top_k": 3}}, "not what this route takes"),
        ({"json": {"picture": text(grey(0))}}, "no list of images"),
        ({"json": {"images": []}}, "no list of images"),
        ({"json": {"images": text(grey(0))}}, "no list of images"),
        ({"json": {"images": {"0": text(grey(0))}}}, "no list of images"),
        ({"json": {"image": 7}}, "is a text"),
        ({"json": {"image": [text(grey(0))]}}, "is a text"),
        ({"json": {"image": ""}}, "is empty"),
        ({"json": {"image": "data:image/png;base64,"}}, "is empty"),
        ({"json": {"image": "%%%"}}, "no valid base64"),
        ({"json": {"image": "abc"}}, "no valid base64"),
        ({"json": {"image": "Zm9v=Zm9v"}}, "no valid base64"),
        ({"json": {"image": "mätze"}}, "no valid base64"),
        ({"json": {"image": "data:image/png,%89PNG"}}, "must be base64"),
        ({"json": {"image": "data:image/png;base64"}}, "must be base64"),
        ({"json": {"image": "https://example.com/cat.png"}}, "URLs are not fetched"),
        ({"json": {"image": "HTTP://169.254.169.254/"}}, "URLs are not fetched"),
        ({"json": {"image": "file:///etc/passwd"}}, "no valid base64"),
        ({"files": parts(grey(0), name="file")}, "no part is named image (found: file)"),
        ({"files": parts(grey(0), name="Image")}, "no part is named image (found: Image)"),
        ({"files": {"image": ("a.png", b"")}}, "is empty"),
        ({"files": {"image": (None, b"text")}}, "is text"),
        ({"content": b"--XX--\r\n", "headers": MULTIPART}, "no part is named image (found: none)"),
        ({"content": b"", "headers": MULTIPART}, "multipart"),
        ({"content": b"hello", "headers": MULTIPART}, "multipart"),
        ({"content": b"--XX\r\nbroken\r\n", "headers": MULTIPART}, "multipart"),
        ({"content": b"x", "headers": {"content-type": f"{MULTIPART_OF}{'b' * 999}"}}, "multipart"),
        (
            {"content": PART.replace(b"name=image; ", b"") + b"\r\n--XX--\r\n"}
            | {"headers": MULTIPART},
            "must be provided",
        ),
        ({"content": PART + b"one\r\n" + PART + b"cut", "headers": MULTIPART}, "closing boundary"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "boundary"),
        ({"params": {"top_k": "0"}, "content": grey(0)}, "top_k"),
        ({"params": {"top_k": "-1"}, "content": grey(0)}, "top_k"),
        ({"params": {"top_k": "abc"}, "content": grey(0)}, "top_k"),
        ({"params": {"top_k": ""}, "content": grey(0)}, "top_k"),
        ({"params": {"top_k": "2.5"}, "content": grey(0)}, "top_k"),
        ({"params": {"topk": "5"}, "content": grey(0)}, "no parameter 'topk'"),
        ({"headers": {"x-request-timeout-ms": "soon"}, "content": grey(0)}, "no positive number"),
        ({"headers": {"x-request-timeout-ms": "0"}, "content": grey(0)}, "no positive number"),
        ({"headers": {"x-request-timeout-ms": "-5"}, "content": grey(0)}, "no positive number"),
        ({"headers": {"x-request-timeout-ms": "nan"}, "content": grey(0)}, "no positive number"),
        ({"headers": {"x-request-timeout-ms": "inf"}, "content": grey(0)}, "no positive number"),
        ({"headers": {"x-request-timeout-ms": ""}, "content": grey(0)}, "no positive number"),
    ],
)
def test_a_request_of_the_wrong_shape_is_refused_in_words(
    service: RunningService, request_: dict[str, Any], says: str
) -> None:
    reply = service.client.post("/classify", **request_)

    assert says in check_error(reply, 400, "bad_request")


@pytest.mark.parametrize(
    "query", ["encoding=hex", "normalize=perhaps", "encoding=", "top_k=5", "encoding=float&x=1"]
)
def test_embed_refuses_parameters_it_does_not_know(service: RunningService, query: str) -> None:
    reply = service.client.post(f"/embed?{query}", content=grey(0))

    check_error(reply, 400, "bad_request")


# 404, 405


@pytest.mark.parametrize(
    "path", ["/nope", "/classify/", "/classify/x", "/%00", "/..", "//classify", "/docs/"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_not_there_is_not_found(service: RunningService, method: str, path: str) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(http(method, path))
        reply = wire.read_reply()

    check_error(reply, 404, "not_found")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/classify", "POST"),
        ("OPTIONS", "/classify", "POST"),
        ("PUT", "/embed", "POST"),
        ("DELETE", "/embed", "POST"),
        ("PROPFIND", "/embed", "POST"),
        ("POST", "/models", "GET"),
        ("POST", "/livez", "GET"),
        ("PATCH", "/readyz", "GET"),
        ("POST", "/metrics", "GET"),
        ("POST", "/docs", "GET"),
        ("POST", "/", "GET"),
    ],
)
def test_another_method_is_refused_and_told_which_it_may_use(
    service: RunningService, method: str, path: str, allowed: str
) -> None:
    reply = service.client.request(method, path)

    assert method in check_error(reply, 405, "method_not_allowed")
    assert reply.headers["allow"] == allowed


def test_head_gets_the_headers_of_its_refusal_and_no_body(service: RunningService) -> None:
    reply = service.client.head("/classify")

    assert (reply.status_code, reply.headers["allow"], reply.content) == (405, "POST", b"")


# 408 receive_timeout


@pytest.mark.parametrize("content_type", ["image/png", "application/json", f"{MULTIPART_OF}XX"])
def test_a_body_that_stops_in_the_middle_times_out(
    service: RunningService, content_type: str
) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        body = PART + b"-" * 1000
        wire.send(http("POST", "/classify", body, f"Content-Type: {content_type}")[:-500])

        reply = wire.read_reply()

        assert "0.3 s" in check_error(reply, 408, "receive_timeout")
        assert reply.headers["connection"] == "close"
        assert wire.read_end() == b""


# 413 payload_too_large


def test_a_body_whose_announced_length_is_too_large_is_refused(service: RunningService) -> None:
    reply = service.client.post("/classify", content=b"x" * 100_001)

    assert "100001 bytes" in check_error(reply, 413, "payload_too_large")


def test_a_body_of_just_the_limit_is_read(service: RunningService) -> None:
    reply = service.client.post("/classify", content=b"x" * 100_000)

    check_error(reply, 415, "unsupported_format")


@pytest.mark.parametrize("headers", [{}, MULTIPART, JSON])
def test_a_streamed_body_is_refused_as_soon_as_it_is_too_large(
    service: RunningService, headers: dict[str, str]
) -> None:
    head = PART if headers is MULTIPART else b"x"

    def pieces() -> Iterator[bytes]:
        yield head
        for _ in range(200):
            yield b"x" * 1000

    reply = service.client.post("/classify", content=pieces(), headers=headers)

    check_error(reply, 413, "payload_too_large")


def test_a_caller_that_asks_first_is_refused_before_it_sends(service: RunningService) -> None:
    head = http("POST", "/classify", b"", "Expect: 100-continue").replace(
        b"Content-Length: 0", b"Content-Length: 100001"
    )
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(head)

        reply = wire.read_reply()

        check_error(reply, 413, "payload_too_large")
        assert reply.headers["connection"] == "close"
        assert wire.read_end() == b""


def test_a_caller_that_asks_first_is_told_to_go_on(service: RunningService) -> None:
    image = grey(255)
    head = http("POST", "/classify", image, "Expect: 100-continue")[: -len(image)]
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(head)
        assert wire.read_head() == (100, {})

        wire.send(image)
        reply = wire.read_reply()

        assert best_classes([reply.json()]) == [9]
        assert "connection" not in reply.headers


@pytest.mark.parametrize(
    "request_",
    [
        {"files": parts(*[grey(0)] * 5)},
        {"json": {"images": [text(grey(0))] * 5}},
        {"files": [*parts(*[grey(0)] * 4), ("other", ("a", b"x"))]},
    ],
)
def test_too_many_images_or_parts_are_refused(
    service: RunningService, request_: dict[str, Any]
) -> None:
    reply = service.client.post("/classify", **request_)

    assert "more than 4 images" in check_error(reply, 413, "payload_too_large")


def test_as_many_images_as_allowed_are_answered(service: RunningService) -> None:
    reply = service.client.post("/classify", files=parts(*[grey(0)] * 4))

    assert best_classes(reply.json()["results"]) == [0] * 4


# 415, 422


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"not an image", 415, "unsupported_format"),
        (b"%PDF-1.4", 415, "unsupported_format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_format"),
        (grey(0)[:60], 422, "image_decode_failed"),
        (encode(Image.new("RGB", (64, 64)), "JPEG")[:-300], 422, "image_decode_failed"),
        (b"\x89PNG\r\n\x1a\n", 422, "image_decode_failed"),
        (encode(Image.new("L", (101, 100))), 422, "image_too_large"),
        (encode(Image.new("L", (51, 1))), 422, "image_bad_aspect"),
    ],
)
@pytest.mark.parametrize("path", ["/classify", "/embed"])
def test_an_image_that_cannot_be_used_is_refused_and_counted_once(
    service: RunningService, path: str, data: bytes, status: int, code: str
) -> None:
    before = service.metric("metaserve_images_rejected_total", code=code)

    replies = [
        service.client.post(path, content=data),
        service.client.post(path, files=parts(data)),
        service.client.post(path, json={"image": text(data)}),
        service.client.post(path, content=data, headers={"accept": "application/octet-stream"}),
    ]

    messages = {check_error(reply, status, code) for reply in replies}
    assert len(messages) == 1
    assert service.metric("metaserve_images_rejected_total", code=code) == before + len(replies)


def test_a_bad_image_does_not_spoil_its_neighbours(service: RunningService) -> None:
    images = [text(grey(255)), text(b"not an image"), "%%%", text(grey(0))]
    rejected = service.metric("metaserve_images_rejected_total", code="unsupported_format")

    reply = service.client.post("/classify", json={"images": images})

    assert reply.status_code == 200
    results = reply.json()["results"]
    assert best_classes(results) == [9, "unsupported_format", "bad_request", 0]
    assert [set(result) for result in results[1:3]] == [{"error"}] * 2
    assert set(results[1]["error"]) == {"code", "message"}
    assert service.metric("metaserve_images_rejected_total", code="unsupported_format") == (
        rejected + 1
    )


def test_bad_parts_do_not_spoil_their_neighbours(service: RunningService) -> None:
    files: list[Any] = [("image", (None, b"text")), *parts(b"", grey(0), grey(0)[:50])]

    results = service.client.post("/embed", files=files).json()["results"]

    codes = [result.get("error", {}).get("code") for result in results]
    assert codes == ["bad_request", "bad_request", None, "image_decode_failed"]


def test_images_that_are_all_bad_are_each_told_so(service: RunningService) -> None:
    reply = service.client.post("/classify", json={"images": ["%", text(b"x")]})

    assert reply.status_code == 200
    assert best_classes(reply.json()["results"]) == ["bad_request", "unsupported_format"]


def test_octets_have_no_place_for_an_error_so_the_request_is_one(service: RunningService) -> None:
    reply = service.client.post(
        "/embed",
        headers={"accept": "application/octet-stream"},
        files=parts(grey(0), b"not an image", grey(9)),
    )

    check_error(reply, 415, "unsupported_format")


# 500 inference_failed, 503 backend_unavailable


def test_a_failing_backend_is_our_fault_and_told_without_details() -> None:
    with running_service(Raising(ValueError("secret detail"))) as service:
        reply = service.client.post("/classify", content=grey(255))

        assert "secret" not in check_error(reply, 500, "inference_failed")
        assert service.metric("metaserve_backend_errors_total", backend="fake") == 1


def test_an_image_that_breaks_the_backend_does_not_take_its_neighbours_along() -> None:
    with running_service(WatchedBackend(Raising(ValueError("broken")))) as service:
        files = parts(grey(0), grey(255), grey(28), grey(57))
        results = service.client.post("/classify", files=files).json()["results"]

    assert best_classes(results) == [0, "inference_failed", 1, 2]


def test_a_backend_that_cannot_be_reached_says_when_to_come_again() -> None:
    error = BackendUnavailable("the inference server does not answer", retry_after_seconds=2.5)
    with running_service(Raising(error)) as service:
        reply = service.client.post("/classify", content=grey(255))

        check_error(reply, 503, "backend_unavailable")
        assert reply.headers["retry-after"] == "3"
        refused = service.metric("metaserve_requests_refused_total", reason="backend_unavailable")
        assert refused == 1


def test_a_fault_of_ours_is_told_in_the_one_shape_without_details(
    service: RunningService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr("app.http.pipeline.read_image", broken)

    reply = service.client.post("/classify", content=grey(0))

    assert "secret" not in check_error(reply, 500, "internal_error")
    assert "secret detail" in caplog.text
    assert reply.headers["x-request-id"] in caplog.text


def test_text_fields_beside_an_image_do_not_count_as_images(service: RunningService) -> None:
    fields = {str(index): "x" for index in range(20)}

    assert service.client.post("/classify", data=fields, files=parts(grey(0))).status_code == 200


@pytest.mark.parametrize("item", ['""', "0", '"data:;base64;base64"'])
def test_a_list_of_millions_is_refused_before_anything_is_made_of_it(
    service: RunningService, monkeypatch: pytest.MonkeyPatch, item: str
) -> None:
    def touched(_: object) -> None:
        raise AssertionError("an item was looked at")

    monkeypatch.setattr("app.http.inputs.decode_base64", touched)
    count = 30_000  # within the body limit of these tests
    body = '{"images":[' + ",".join([item] * count) + "]}"

    reply = service.client.post(
        "/classify", content=body, headers={"content-type": "application/json"}
    )
    check_error(reply, 413, "payload_too_large")


# 503 overloaded, draining, not_ready; 504


@pytest.fixture
def pool() -> Iterator[Callable[..., Any]]:
    """Ask in the background; the threads are there before any service looks for its own."""
    started = threading.Barrier(3)
    with ThreadPoolExecutor(2) as executor:
        for _ in range(2):
            executor.submit(started.wait, WAIT_SECONDS)
        started.wait(WAIT_SECONDS)
        yield executor.submit


def post(service: RunningService, **request: Any) -> httpx.Response:
    return httpx.post(f"{service.url}/classify", timeout=WAIT_SECONDS, trust_env=False, **request)


@pytest.mark.parametrize("status", [503, 429])
def test_a_full_queue_refuses_at_once(pool: Callable[..., Any], status: int) -> None:
    backend = WatchedBackend(gate_open=False)
    with running_service(
        backend, batch_seconds={1: 2.5}, queue_budget_ms=500, overload_status=status
    ) as service:
        first = pool(post, service, content=grey(0))
        backend.wait_for_batches(1)

        reply = service.client.post("/classify", content=grey(0))
        several = service.client.post("/embed", files=parts(grey(0), grey(1)))

        assert "wait already" in check_error(reply, status, "overloaded")
        assert reply.headers["retry-after"] in {"2", "3", "4"}  # 2 s too long, drawn by lot
        check_error(several, status, "overloaded")
        assert service.metric("metaserve_requests_refused_total", reason="overloaded") == 2
        assert service.client.get("/readyz").status_code == 200
        assert service.client.get("/livez").status_code == 200
        backend.gate.set()
        assert first.result(WAIT_SECONDS).status_code == 200


def test_a_deadline_shorter_than_the_wait_is_refused_at_once(pool: Callable[..., Any]) -> None:
    backend = WatchedBackend(gate_open=False)
    with running_service(backend, batch_seconds={1: 1.0}) as service:
        first = pool(post, service, content=grey(0))
        backend.wait_for_batches(1)

        reply = service.client.post(
            "/classify", content=grey(0), headers={"x-request-timeout-ms": "500"}
        )

        check_error(reply, 503, "overloaded")
        backend.gate.set()
        assert first.result(WAIT_SECONDS).status_code == 200


@pytest.mark.parametrize(
    ("headers", "request_timeout_ms"),
    [
        ({"x-request-timeout-ms": "50"}, 30_000),
        ({"x-envoy-expected-rq-timeout-ms": "50"}, 30_000),
        ({"x-request-timeout-ms": "50", "x-envoy-expected-rq-timeout-ms": "60000"}, 30_000),
        ({"x-request-timeout-ms": "60000"}, 50),
        ({"x-envoy-expected-rq-timeout-ms": "60000"}, 50),
        ({"x-envoy-expected-rq-timeout-ms": "what"}, 50),
        ({}, 50),
    ],
)
def test_the_deadline_is_the_callers_within_the_servers(
    headers: dict[str, str], request_timeout_ms: float
) -> None:
    backend = WatchedBackend(gate_open=False)
    with running_service(backend, request_timeout_ms=request_timeout_ms) as service:
        started_at = time.monotonic()
        reply = service.client.post("/classify", content=grey(0), headers=headers)

        check_error(reply, 504, "deadline_exceeded")
        assert 0.05 <= time.monotonic() - started_at < WAIT_SECONDS


def test_several_images_that_are_all_late_are_one_late_request() -> None:
    with running_service(WatchedBackend(gate_open=False), request_timeout_ms=50) as service:
        reply = service.client.post("/classify", files=parts(grey(0), grey(1), grey(2)))

        check_error(reply, 504, "deadline_exceeded")


def test_what_is_late_beside_what_is_bad_is_told_image_by_image() -> None:
    with running_service(WatchedBackend(gate_open=False), request_timeout_ms=50) as service:
        reply = service.client.post("/classify", files=parts(grey(0), b"no image"))

        assert best_classes(reply.json()["results"]) == ["deadline_exceeded", "unsupported_format"]


def test_the_deadline_counts_from_the_request_and_not_from_its_last_byte() -> None:
    late = threading.Event()
    with running_service(request_timeout_ms=50) as service, service.connect() as sock:
        wire = Wire(sock)
        request = http("POST", "/classify", grey(0))
        wire.send(request[:-1])
        late.wait(0.06)  # the deadline itself: nothing to be notified of
        wire.send(request[-1:])

        check_error(wire.read_reply(), 504, "deadline_exceeded")


@pytest.mark.parametrize("path", ["/classify", "/embed", "/models"])
def test_nothing_is_answered_before_the_model_is_loaded(path: str) -> None:
    with running_service(loaded=False) as service:
        method = "GET" if path == "/models" else "POST"
        reply = service.client.request(method, path)

        assert "loading" in check_error(reply, 503, "not_ready")
        assert service.metric("metaserve_requests_refused_total", reason="not_ready") == 1


def test_images_that_wait_when_the_drain_ends_are_refused(pool: Callable[..., Any]) -> None:
    backend = WatchedBackend(gate_open=False)
    with running_service(backend, max_batch_size=1) as service:
        running = pool(post, service, content=grey(0))
        backend.wait_for_batches(1)
        waiting = pool(post, service, files=parts(grey(1), grey(2)))
        assert service.state.loaded is not None
        engine = service.state.loaded.engine
        service.wait_until(lambda: engine.status().queue_depth == 2, "both images wait")

        engine.refuse_waiting()

        check_error(waiting.result(WAIT_SECONDS), 503, "draining")
        backend.gate.set()
        assert running.result(WAIT_SECONDS).status_code == 200


def test_a_service_that_drains_still_answers_and_asks_to_be_left() -> None:
    with running_service() as service:
        service.state.draining = True

        reply = service.client.post("/classify", content=grey(255))

        assert best_classes([reply.json()]) == [9]
        assert reply.headers["connection"] == "close"
