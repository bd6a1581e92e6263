from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.http.wire import grey
from tests.servers import RunningService, running_service

MADE_HERE = re.compile(r"[0-9a-f]{32}")


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service() as running:
        yield running


@pytest.mark.parametrize(
    "request_id", ["a", "x" * 128, "4bf92f35-77b3:4da6/A3ce_929d+0e0e=4736@host.example"]
)
@pytest.mark.parametrize("path", ["/classify", "/nope", "/livez"])
def test_a_short_clean_id_is_kept(service: RunningService, path: str, request_id: str) -> None:
    reply = service.client.post(path, headers={"x-request-id": request_id}, content=b"x")

    assert reply.headers.get_list("x-request-id") == [request_id]
    assert reply.json()["request_id"] == request_id


@pytest.mark.parametrize(
    "request_id",
    [
        b"",
        b"x" * 129,
        b"two words",
        b"tab\there",
        b"caf\xc3\xa9",
        b"\xff",
        b'quote"',
        b"<script>",
        b"a;b",
        b"a,b",
        b"{}",
        b"%0a",
    ],
)
def test_any_other_id_is_replaced(service: RunningService, request_id: bytes) -> None:
    reply = service.client.get("/livez", headers={b"x-request-id": request_id})

    assert MADE_HERE.fullmatch(reply.headers["x-request-id"])


def test_a_request_without_an_id_gets_one_of_its_own(service: RunningService) -> None:
    replies = [service.client.post("/classify", content=grey(0)) for _ in range(3)]

    ids = {reply.headers["x-request-id"] for reply in replies}
    assert len(ids) == 3
    assert all(MADE_HERE.fullmatch(one) for one in ids)


@given(st.binary(max_size=200).filter(lambda value: not set(value) & set(b"\0\r\n\x0b\x0c")))
@settings(max_examples=100, deadline=None)
def test_whatever_comes_back_is_clean(service: RunningService, request_id: bytes) -> None:
    request_id = request_id.strip(b" \t")

    with service.connect() as sock:
        sock.sendall(
            b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-ID: "
            + request_id
            + b"\r\n\r\n"
        )
        reply = b"".join(iter(lambda: sock.recv(65536), b""))

    if reply.startswith(b"HTTP/1.1 200"):  # the server itself refuses control characters
        (returned,) = re.findall(rb"(?i)\r\nx-request-id: (.*)\r\n", reply)
        assert returned == request_id or MADE_HERE.fullmatch(returned.decode("ascii"))
        assert re.fullmatch(rb"[\x21-\x7e]{1,128}", returned)
    else:
        assert reply.startswith(b"HTTP/1.1 400")
