"""No input, however odd, is a fault of ours: nothing here may be answered with 5xx."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.errors import ServiceError
from app.http.errors import STATUSES
from tests.http.wire import check_error, encode, grey, picture, text
from tests.servers import RunningService, running_service

MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PATHS = st.sampled_from(["/classify", "/embed", "/classify?top_k=2", "/embed?encoding=base64"])
IMAGES = [grey(7, side=9), encode(picture(), "JPEG"), encode(picture(), "WEBP")]
CODES = {error.code: status for error, status in STATUSES.items()}


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service(
        max_pixels=1_000_000, max_images=5, body_limit_bytes=200_000, receive_timeout_ms=5000
    ) as running:
        yield running


def check(reply: httpx.Response) -> None:
    """Check that a reply is an answer, or blames the caller in the one shape."""
    assert reply.status_code < 500, reply.text
    if reply.status_code >= 400:
        code = reply.json()["error"]["code"]
        check_error(reply, CODES[code], code)
        return
    assert reply.status_code == 200
    content = reply.json()
    for result in content.get("results", [content]):
        if "error" in result:
            assert CODES[result["error"]["code"]] < 500
        else:
            assert "predictions" in result or "embedding" in result


def test_the_codes_are_known() -> None:
    assert ServiceError.code not in CODES


header_values = st.text(
    st.characters(min_codepoint=32, max_codepoint=255, blacklist_characters="\x7f"), max_size=60
).map(lambda value: value.strip().encode("latin-1"))


@given(
    path=PATHS,
    body=st.binary(max_size=400),
    content_type=st.one_of(
        header_values,
        st.sampled_from(
            [
                b"image/png",
                b"application/json",
                b"application/problem+json",
                b"multipart/form-data",
                b"multipart/form-data; boundary=",
                b'multipart/form-data; boundary="a b"',
                b"multipart/form-data; boundary=x; charset=hex",
                b"multipart/form-data; boundary=x; charset=undefined",
                b"multipart/form-data;;;=;boundary",
                b"application/x-www-form-urlencoded",
                b"text/plain; charset=utf-16",
            ]
        ),
    ),
)
@MANY
def test_any_body_of_any_type(
    service: RunningService, path: str, body: bytes, content_type: bytes
) -> None:
    check(service.client.post(path, content=body, headers={b"content-type": content_type}))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from([text(grey(3)), "data:image/png;base64," + text(grey(3)), "data:,", "aGk="]),
    lambda inner: (
        st.lists(inner, max_size=7)
        | st.dictionaries(st.sampled_from(["image", "images", "x", ""]), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(
    path=PATHS,
    value=st.one_of(
        json_values,
        st.builds(lambda value: {"image": value}, json_values),
        st.builds(lambda values: {"images": values}, st.lists(json_values, max_size=7)),
    ),
)
@example("/classify", {"image": "\ud800"})
@example("/classify", {"image": "data:" + ";base64" * 2000})
@example("/embed", {"images": [None, {}, [], 1e400]})
@MANY
def test_any_json(service: RunningService, path: str, value: Any) -> None:
    check(
        service.client.post(
            path, content=json.dumps(value), headers={"content-type": "application/json"}
        )
    )


fragments = st.sampled_from(
    [
        b"--XX",
        b"--XX--",
        b"--XY",
        b"\r\n",
        b"\n",
        b"\r\n\r\n",
        b"Content-Disposition: form-data; name=image; filename=a.png",
        b'Content-Disposition: form-data; name="image"',
        b"Content-Disposition: form-data",
        b"Content-Disposition: attachment; name=image; filename*=utf-8''%ff",
        b'Content-Disposition: form-data; name="image"; filename="\xff\xfe"',
        b"Content-Type: image/png",
        b"Content-Transfer-Encoding: base64",
        b"Content-Length: 99",
        b": ",
        b"X" * 5000,
        b"\0",
        grey(3),
        b"no image",
    ]
)
PART = b"--XX\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n"


@given(path=PATHS, pieces=st.lists(fragments, max_size=14), charset=header_values)
@example("/classify", [PART, grey(3), b"\r\n--XX--", b"epilogue" * 50], b"")
@example("/classify", [b"preamble", PART, grey(3), b"\r\n--XX--\r\n"], b"")
@example("/embed", [PART, grey(3), b"\r\n"] * 9 + [b"--XX--\r\n"], b"")
@example("/embed", [PART, grey(3), b"\r\n--XX--\r\n"], b"undefined")
@MANY
def test_any_multipart(
    service: RunningService, path: str, pieces: list[bytes], charset: bytes
) -> None:
    suffix = b"; charset=" + charset if charset else b""
    headers = {b"content-type": b"multipart/form-data; boundary=XX" + suffix}

    check(service.client.post(path, content=b"".join(pieces), headers=headers))


@given(
    path=PATHS,
    image=st.sampled_from(IMAGES),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
    ),
    keep=st.floats(0, 1),
)
@MANY
def test_a_mutated_image(
    service: RunningService,
    path: str,
    image: bytes,
    changes: list[tuple[float, int]],
    keep: float,
) -> None:
    data = bytearray(image)
    for place, value in changes:
        data[int(place * len(data))] = value
    if keep < 0.5:
        del data[int(2 * keep * len(data)) :]

    check(service.client.post(path, content=bytes(data)))


@given(
    path=st.sampled_from(["/classify", "/embed", "/models", "/livez", "/metrics"]),
    query=st.one_of(
        st.binary(max_size=60).map(
            lambda raw: "".join(chr(c) if 33 <= c < 127 and c != 35 else f"%{c:02x}" for c in raw)
        ),
        st.builds(
            lambda name, value: f"{name}={value}",
            st.sampled_from(["top_k", "normalize", "encoding", "TOP_K", "top_k[]"]),
            st.sampled_from(["1", "5", "-1", "1e3", "٣", "9" * 5000, "float", "true", "%00", "+1"]),
        ),
    ),
)
@MANY
def test_any_query(service: RunningService, path: str, query: str) -> None:
    method = "POST" if path in ("/classify", "/embed") else "GET"

    reply = service.client.request(method, f"{path}?{query}", content=grey(0, side=4))

    assert reply.status_code < 500, reply.text
    if path in ("/classify", "/embed"):
        check(reply)


@given(
    path=PATHS,
    headers=st.lists(
        st.tuples(
            st.sampled_from(
                [
                    b"x-request-timeout-ms",
                    b"x-envoy-expected-rq-timeout-ms",
                    b"x-request-id",
                    b"accept",
                    b"authorization",
                    b"x-api-key",
                    b"content-encoding",
                    b"cookie",
                    b"range",
                    b"forwarded",
                    b"x-forwarded-for",
                    b"x-forwarded-proto",
                    b"origin",
                    b"if-none-match",
                ]
            ),
            st.one_of(header_values, st.sampled_from([b"1e9", b"100000", b"-0", b"nan", b"gzip"])),
        ),
        max_size=4,
    ),
)
@MANY
def test_any_headers(
    service: RunningService, path: str, headers: list[tuple[bytes, bytes]]
) -> None:
    reply = service.client.post(path, headers=headers, content=grey(0, side=4))

    if reply.status_code == 504:  # the caller may ask for less time than there is
        asked = [value for name, value in headers if b"timeout" in name]
        assert any(float(value) < 5000 for value in asked)
    elif reply.headers["content-type"] == "application/octet-stream":
        assert len(reply.content) == 4 * 64
    else:
        check(reply)


@given(path=st.text(max_size=40))
@example("/classify/../embed")
@example("/static-offline-docs/../../../../../../etc/passwd")
@example("/static-offline-docs/%2e%2e/core.py")
@MANY
def test_any_path(service: RunningService, path: str) -> None:
    raw = "".join(
        chr(byte) if 33 <= byte < 127 and byte not in b"?#" else f"%{byte:02x}"
        for byte in path.encode("utf-8", "surrogatepass")
    )

    reply = service.client.get(f"/{raw}")

    assert reply.status_code < 500
    assert b"root:" not in reply.content
    if reply.status_code == 404:
        check_error(reply, 404, "not_found")


def test_after_all_that_an_image_is_answered(service: RunningService) -> None:
    reply = service.client.post("/classify", content=grey(255))

    assert reply.json()["predictions"][0]["index"] == 9
    assert service.metric("metaserve_backend_errors_total", backend="fake") == 0
