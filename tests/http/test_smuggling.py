"""What two readers could take for different requests is one request here, or none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.http.wire import Wire, best_classes, check_error, grey, http
from tests.servers import RunningService, running_service

POST = b"POST /classify HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
HIDDEN = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
"""Stands where one reader may see a body and another the next request."""


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service() as running:
        yield running


def probes(service: RunningService) -> float:
    """Return how often `HIDDEN` or its like was answered."""
    return service.metric("metaserve_request_duration_seconds_count", route="/livez", status="200")


@pytest.mark.parametrize(
    "data",
    [
        POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
        POST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc" + HIDDEN,
        POST + b"Content-Length: 3\r\nContent-Length: 60\r\n\r\nabc" + HIDDEN,
        POST + b"Content-Length: 3, 3\r\n\r\nabc" + HIDDEN,
        POST + b"Content-Length: +3\r\n\r\nabc" + HIDDEN,
        POST + b"Content-Length : 3\r\n\r\nabc" + HIDDEN,
        POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + HIDDEN,
        POST.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n0\r\n\r\n" + HIDDEN,
        POST + b"X: a\r\n folded\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
        POST + b"X: a\0b\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
        b"POST /classify\0 HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n" + HIDDEN,
        POST + b"X: y\nContent-Length: 0\r\n\r\n" + HIDDEN,
        POST + b"X: y\rContent-Length: 0\r\n\r\n" + HIDDEN,
        POST + b"Content-Length: 0\r\n\n" + HIDDEN,
        b"POST /classify HTTP/1.1\nHost: x\n\n" + HIDDEN,
        b"POST /classify HTTP/1.1\r\n Host: x\r\n\r\n" + HIDDEN,
        b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN,
        b"BREW /embed HTTP/1.1\r\nHost: x\r\n\r\n" + HIDDEN,
        b"GET /livez\r\n\r\n" + HIDDEN,
    ],
)
def test_an_ambiguous_head_is_refused_and_nothing_behind_it_is_read(
    service: RunningService, data: bytes
) -> None:
    before = probes(service)
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(data)

        check_error(wire.read_reply(), 400, "bad_request")
        assert wire.read_end() == b""
    service.client.get("/livez")
    assert probes(service) == before + 1  # this one, and none that was hidden


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\n",
        b"0x3\r\nabc\r\n0\r\n\r\n",
        b"-3\r\nabc\r\n0\r\n\r\n",
        b"3 \r\nabc\r\n0\r\n\r\n",
        b"3\nabc\r\n0\r\n\r\n",
        b"3\r\nabcX\r\n0\r\n\r\n",
        b"3;a\nb\r\nabc\r\n0\r\n\r\n",
        b"f" * 40 + b"\r\n",
        b"3\r\nabc\r\n0\r\nContent-Length: 5\r\n\r\n",
    ],
)
def test_a_bad_chunk_ends_the_connection_with_one_reply(
    service: RunningService, chunks: bytes
) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(POST + CHUNKED + b"\r\n" + chunks + HIDDEN)

        check_error(wire.read_reply(), 400, "bad_request")
        assert wire.read_end() == b""


@pytest.mark.parametrize("close", [b"Connection: close\r\n", b""])
def test_nothing_is_answered_behind_a_request_that_closes(
    service: RunningService, close: bytes
) -> None:
    head = POST if close else POST.replace(b"1.1", b"1.0")
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(head + close + b"Content-Length: 1\r\n\r\nx" + HIDDEN)

        check_error(wire.read_reply(), 415, "unsupported_format")
        assert wire.read_end() == b""


@pytest.mark.parametrize("pieces", [1, 3])
def test_garbage_behind_good_requests_comes_after_their_answers(
    service: RunningService, pieces: int
) -> None:
    data = http("POST", "/classify", grey(255)) + http("POST", "/classify", grey(0)) + b"\0\r\n\r\n"
    with service.connect() as sock:
        wire = Wire(sock)
        step = -(-len(data) // pieces)
        wire.send(*(data[at : at + step] for at in range(0, len(data), step)))

        assert best_classes([wire.read_reply().json()]) == [9]
        assert best_classes([wire.read_reply().json()]) == [0]
        assert wire.read_end()[:12] in (b"", b"HTTP/1.1 400")


@pytest.mark.parametrize("split", [False, True], ids=["at once", "in two"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_wish_for_another_protocol_leaves_body_and_next_request_what_they_are(
    service: RunningService, chunked: bool, split: bool
) -> None:
    image = grey(255)
    wish = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    framed = (
        CHUNKED + b"\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(image), image)
        if chunked
        else b"Content-Length: %d\r\n\r\n%b" % (len(image), image)
    )
    data = POST + wish + framed + http("POST", "/classify", grey(0))
    cut = data.index(b"\r\n\r\n") + 20
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(*((data[:cut], data[cut:]) if split else (data,)))

        assert best_classes([wire.read_reply().json()]) == [9]
        assert best_classes([wire.read_reply().json()]) == [0]


def test_a_body_that_looks_like_a_request_behind_an_upgrade_is_a_body(
    service: RunningService,
) -> None:
    head = POST + b"Connection: upgrade, close\r\nUpgrade: websocket\r\n"
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(head + b"Content-Length: %d\r\n\r\n" % len(HIDDEN) + HIDDEN)

        check_error(wire.read_reply(), 415, "unsupported_format")
        assert wire.read_end() == b""


def test_an_old_version_stays_one_behind_an_upgrade(service: RunningService) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        # No Host, which HTTP/1.1 alone asks for; no second reply, for the connection ends.
        wish = b"GET /livez HTTP/1.0\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"
        wire.send(wish + b"GET /livez HTTP/1.0\r\n\r\n")

        status, headers = wire.read_head()
        assert status == 200
        assert headers["connection"] == "close"
        assert b"HTTP/" not in wire.read_end()


# Bounds.


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 300 + b"\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 66_000 + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + (b"X: " + b"y" * 997 + b"\r\n") * 70 + b"\r\n",
    ],
    ids=["url", "headers", "line", "lines"],
)
def test_a_head_over_a_bound_is_told_so(service: RunningService, head: bytes) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(head)

        assert "64 KiB" in check_error(wire.read_reply(), 400, "bad_request")
        assert wire.read_end() == b""


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez?" + b"a" * 16_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 255 + b"\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 65_000 + b"\r\n\r\n",
    ],
    ids=["url", "headers", "line"],
)
def test_a_head_within_the_bounds_is_read_however_it_comes(
    service: RunningService, head: bytes
) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        for step in (len(head), 700):
            wire.send(*(head[at : at + step] for at in range(0, len(head), step)))
            assert wire.read_reply().json() == {"status": "alive"}


@pytest.mark.parametrize(
    "head", [b"GET /livez HTTP/1.1\r\nHost: x\r\nX: ", b"GET /", b"GET / HTTP/1.1\r\nX", b"\r\n"]
)
def test_a_head_that_never_ends_is_cut_off_in_the_middle(
    service: RunningService, head: bytes
) -> None:
    filler = b"\r\n" * 512 if head == b"\r\n" else b"a" * 1024
    sent = 0
    with service.connect() as sock:
        sock.sendall(head)
        try:
            while sent < 4 * 1024 * 1024:  # more than the kernel holds for us
                sent += sock.send(filler)
        except OSError:
            pass
        reply = Wire(sock).read_end()

    assert sent < 4 * 1024 * 1024
    assert not reply or reply.startswith(b"HTTP/1.1 400 ")


def test_the_end_of_a_large_body_does_not_count_to_the_next_head(service: RunningService) -> None:
    first = http("POST", "/classify", b"x" * 500_000)
    with service.connect() as sock:
        wire = Wire(sock)
        for _ in range(3):
            wire.send(first + http("POST", "/classify", grey(255)))
            check_error(wire.read_reply(), 415, "unsupported_format")
            assert best_classes([wire.read_reply().json()]) == [9]
