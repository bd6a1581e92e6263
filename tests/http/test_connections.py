"""Callers that leave, connections that go on, and what is no HTTP at all."""

from __future__ import annotations

import logging
import select
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from app.engine.base import EngineStatus
from app.http.protocol import PatientProtocol
from tests.http.wire import Wire, best_classes, check_error, grey, http, parts
from tests.servers import WAIT_SECONDS, RunningService, WatchedBackend, running_service, wait_until

Ask = Callable[[RunningService, bytes], "Future[httpx.Response]"]


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service(body_limit_bytes=1_000_000) as running:
        yield running


@pytest.fixture
def ask() -> Iterator[Ask]:
    """Classify in the background; the threads are there before any service looks for its own."""
    started = threading.Barrier(3)

    def post(service: RunningService, data: bytes) -> httpx.Response:
        url = f"{service.url}/classify"
        return httpx.post(url, content=data, timeout=WAIT_SECONDS, trust_env=False)

    with ThreadPoolExecutor(2) as executor:
        for _ in range(2):
            executor.submit(started.wait, WAIT_SECONDS)
        started.wait(WAIT_SECONDS)
        yield lambda service, data: executor.submit(post, service, data)


def status(service: RunningService) -> EngineStatus:
    assert service.state.loaded is not None
    return service.state.loaded.engine.status()


def cancelled(service: RunningService) -> float:
    return service.metric("metaserve_requests_cancelled_total")


def left(service: RunningService, path: str = "/classify") -> float:
    """Return how many requests ended with nobody there."""
    return service.metric("metaserve_request_duration_seconds_count", route=path, status="499")


# Callers that leave.


def test_a_caller_that_leaves_the_queue_never_reaches_the_backend(ask: Ask) -> None:
    backend = WatchedBackend(gate_open=False)
    with running_service(backend) as service:
        first = ask(service, grey(0))
        backend.wait_for_batches(1)
        with service.connect() as leaving:
            leaving.sendall(http("POST", "/classify", grey(255)))
            service.wait_until(lambda: status(service).queue_depth == 1, "the caller waits")
            neighbour = ask(service, grey(28))
            service.wait_until(lambda: status(service).queue_depth == 2, "the neighbour waits")

        service.wait_until(lambda: status(service).queue_depth == 1, "the place is free")
        service.wait_until(lambda: left(service) == 1, "the request ends")
        assert cancelled(service) == 1
        backend.gate.set()

        assert best_classes([first.result(WAIT_SECONDS).json()]) == [0]
        assert best_classes([neighbour.result(WAIT_SECONDS).json()]) == [1]
        assert backend.images == 2


def test_all_images_of_a_caller_that_leaves_are_forgotten(ask: Ask) -> None:
    backend = WatchedBackend(gate_open=False)
    with running_service(backend) as service:
        first = ask(service, grey(0))
        backend.wait_for_batches(1)
        request = httpx.Request("POST", f"{service.url}/embed", files=parts(*[grey(9)] * 5))
        with service.connect() as leaving:
            content_type = f"Content-Type: {request.headers['content-type']}"
            leaving.sendall(http("POST", "/embed", request.read(), content_type))
            service.wait_until(lambda: status(service).queue_depth == 5, "five images wait")

        service.wait_until(lambda: status(service).queue_depth == 0, "their places are free")
        service.wait_until(lambda: left(service, "/embed") == 1, "the request ends")
        assert cancelled(service) == 1
        backend.gate.set()
        assert first.result(WAIT_SECONDS).status_code == 200
        assert backend.images == 1


def test_a_caller_that_leaves_during_its_batch_takes_nobody_along(ask: Ask) -> None:
    backend = WatchedBackend(gate_open=False)
    with running_service(backend) as service:
        with service.connect() as leaving:
            leaving.sendall(http("POST", "/classify", grey(255)))
            backend.wait_for_batches(1)
            neighbour = ask(service, grey(28))
            service.wait_until(lambda: status(service).queue_depth == 1, "the neighbour waits")

        service.wait_until(lambda: left(service) == 1, "the request ends")
        assert cancelled(service) == 1
        backend.gate.set()
        assert best_classes([neighbour.result(WAIT_SECONDS).json()]) == [1]


@pytest.mark.parametrize(
    "content_type", ["image/png", "application/json", "multipart/form-data; boundary=XX"]
)
@pytest.mark.parametrize("reset", [False, True], ids=["closes", "resets"])
def test_a_caller_that_leaves_in_its_body_is_no_fault_of_ours(
    content_type: str, reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    body = b"--XX\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n" + b"x" * 100
    backend = WatchedBackend()
    with running_service(backend) as service:
        with service.connect() as leaving:
            leaving.sendall(http("POST", "/classify", body, f"Content-Type: {content_type}")[:-50])
            if reset:
                linger = b"\1\0\0\0\0\0\0\0"
                leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

        service.wait_until(lambda: left(service) == 1, "the request ends")

        assert cancelled(service) == 1
        assert backend.images == 0
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_caller_that_leaves_before_its_reply_is_read_costs_nothing(
    service: RunningService, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(20):
        with service.connect() as sock:
            sock.sendall(http("POST", "/embed", grey(0)))

    assert service.client.post("/classify", content=grey(255)).status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


# Connections that go on.


def test_requests_follow_each_other_on_one_connection(service: RunningService) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        for level, expected in ((0, 0), (255, 9), (28, 1)):
            wire.send(http("POST", "/classify", grey(level)))
            assert best_classes([wire.read_reply().json()]) == [expected]


def test_pipelined_requests_are_answered_in_order(service: RunningService) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(
            http("POST", "/classify", grey(0))
            + http("POST", "/classify", b"no image")
            + http("GET", "/nope")
            + http("POST", "/classify", grey(255))
        )

        assert best_classes([wire.read_reply().json()]) == [0]
        check_error(wire.read_reply(), 415, "unsupported_format")
        check_error(wire.read_reply(), 404, "not_found")
        assert best_classes([wire.read_reply().json()]) == [9]


def test_a_pipelined_request_is_no_sign_of_leaving() -> None:
    backend = WatchedBackend(gate_open=False)
    with running_service(backend) as service, service.connect() as sock:
        wire = Wire(sock)
        wire.send(http("POST", "/classify", grey(0)))
        backend.wait_for_batches(1)
        wire.send(http("POST", "/classify", grey(255)))
        service.client.get("/livez")  # the loop has turned
        backend.gate.set()

        assert best_classes([wire.read_reply().json()]) == [0]
        assert best_classes([wire.read_reply().json()]) == [9]
        assert cancelled(service) == 0


@pytest.mark.parametrize(
    ("path", "size", "code", "error_status"),
    [
        ("/nope", 300_000, "not_found", 404),
        ("/classify?top_k=0", 300_000, "bad_request", 400),
        ("/livez", 300_000, "method_not_allowed", 405),
        ("/classify", 1_500_000, "payload_too_large", 413),
    ],
)
def test_a_connection_goes_on_after_an_error_with_an_unread_body(
    service: RunningService, path: str, size: int, code: str, error_status: int
) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(http("POST", path, b"POST /livez HTTP/1.1\r\n\r\n".ljust(size, b"x")))
        check_error(wire.read_reply(), error_status, code)

        wire.send(http("POST", "/classify", grey(255)))

        assert best_classes([wire.read_reply().json()]) == [9]


def test_a_connection_goes_on_after_a_chunked_body_that_was_too_large(
    service: RunningService,
) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        wire.send(*[chunk] * 20, b"0\r\n\r\n")
        check_error(wire.read_reply(), 413, "payload_too_large")

        wire.send(http("POST", "/classify", grey(255)))

        assert best_classes([wire.read_reply().json()]) == [9]


def test_http_1_0_is_answered_and_closed(service: RunningService) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(http("POST", "/classify", grey(255)).replace(b"HTTP/1.1", b"HTTP/1.0"))

        assert best_classes([wire.read_reply().json()]) == [9]
        assert wire.read_end() == b""


def test_a_body_may_come_byte_by_byte(service: RunningService) -> None:
    image = grey(255, side=8)
    request = http("POST", "/classify", image)
    with service.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = Wire(sock)
        wire.send(*(request[i : i + 1] for i in range(len(request))))

        assert best_classes([wire.read_reply().json()]) == [9]


# What is no HTTP.


def test_a_large_body_that_comes_in_one_read_with_its_head_keeps_the_connection(
    service: RunningService,
) -> None:
    image = grey(0) + bytes(150_000)  # what follows the image is not read
    with service.connect() as sock:
        wire = Wire(sock)
        for _ in range(10):
            wire.send(http("POST", "/classify", image))
            head = wire.read_reply()
            assert head.status_code == 200
            assert "connection" not in head.headers


def test_a_header_line_of_a_megabyte_is_refused(service: RunningService) -> None:
    with service.connect() as sock:
        sent = 0
        try:
            sock.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: ")
            for _ in range(1024):
                sent += sock.send(b"a" * 1024)
            sock.sendall(b"\r\n\r\n")
        except OSError:  # closed while we were still sending
            assert sent < 1024 * 1024
        reply = Wire(sock).read_end()

    assert not reply or reply.startswith(b"HTTP/1.1 400 ")
    assert service.client.get("/livez").status_code == 200


def test_many_headers_beyond_the_bound_are_refused(service: RunningService) -> None:
    lines = [f"X-{index}: {'y' * 40}" for index in range(3000)]
    with service.connect() as sock:
        try:
            sock.sendall(http("GET", "/livez", b"", *lines))
        except OSError:
            assert lines
        reply = Wire(sock).read_end()

    assert not reply or reply.startswith(b"HTTP/1.1 400 ")


GARBAGE = [
    b"\r\n\r\n",
    b"hello\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)),  # a TLS handshake
    b"GET /livez\r\n\r\n",
    b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /livez HTTP/1.1\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
    b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
    b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"POST /classify HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"f" * 40
    + b"\r\n",
]


def closes_or_answers_400(service: RunningService, data: bytes) -> bytes:
    """Send bytes and no more; return what came back until the other side closed."""
    with service.connect() as sock:
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        except OSError:
            return b""
        return Wire(sock).read_end()


@pytest.mark.parametrize("data", GARBAGE)
def test_garbage_gets_400_or_nothing(
    service: RunningService, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    reply = closes_or_answers_400(service, data)

    assert not reply or reply.startswith(b"HTTP/1.1 400 ")
    assert service.client.get("/livez").status_code == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@given(st.binary(max_size=300))
@example(b"")
@settings(max_examples=100, deadline=None)
def test_random_bytes_get_400_or_nothing(service: RunningService, data: bytes) -> None:
    reply = closes_or_answers_400(service, data)

    assert not reply or reply.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "data",
    [
        b"PRI * HTTP/2.0\r\nConnection: close\r\n\r\nSM\r\n\r\n",
        b"GET /livez HTTP/9.9\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n folded: y\r\nConnection: close\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n\r\nx",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"GET http://example.com/livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    ],
)
def test_what_is_odd_but_http_is_answered(service: RunningService, data: bytes) -> None:
    with service.connect() as sock:
        sock.sendall(data)
        reply = Wire(sock).read_end()

    assert reply[:10] in (b"HTTP/1.1 2", b"HTTP/1.1 4"), reply


VALID = http("POST", "/classify", grey(255, side=8), "Content-Type: image/png", "Accept: */*")
LAST = b"\r\nGET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def impatient() -> Iterator[RunningService]:
    with running_service(receive_timeout_ms=200) as running:
        yield running


def test_bytes_that_are_no_http_are_told_so_in_the_one_shape(service: RunningService) -> None:
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(b"this is no request\r\n\r\n")

        assert "no valid HTTP" in check_error(wire.read_reply(), 400, "bad_request")
        assert wire.read_end() == b""


def test_garbage_after_an_answer_ends_the_connection_in_silence(
    service: RunningService, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    with service.connect() as sock:
        wire = Wire(sock)
        wire.send(head)
        check_error(wire.read_reply(), 404, "not_found")
        wire.send(b"zz\r\n")

        assert wire.read_end() == b""
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_request_in_a_batch_that_hangs_is_told_at_the_end_of_the_drain(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = WatchedBackend(gate_open=False)
    with running_service(backend, drain_timeout_s=0.1) as running, running.connect() as sock:
        sock.sendall(http("POST", "/classify", grey(255)))
        backend.wait_for_batches(1)
        running.server.stop()

        check_error(Wire(sock).read_reply(), 503, "draining")
        backend.gate.set()
    assert "Exception in ASGI application" not in caplog.text


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /classify HT",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nGET /livez HTTP/1.1\r\nHost:",
        b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nthe rest never comes",
    ],
)
def test_a_caller_that_stops_sending_is_cut_off(impatient: RunningService, sent: bytes) -> None:
    with impatient.connect() as sock:
        sock.sendall(sent)
        Wire(sock).read_end()  # fails when nobody closes


def test_a_connection_that_rests_is_not_cut_off_by_impatience(impatient: RunningService) -> None:
    with impatient.connect() as resting, impatient.connect() as silent:
        wire = Wire(resting)
        wire.send(http("GET", "/livez"))
        assert wire.read_reply().status_code == 200
        Wire(silent).read_end()
        with impatient.connect() as another:  # began after the other's reply, and is cut off too
            Wire(another).read_end()

        wire.send(http("GET", "/livez"))
        assert wire.read_reply().status_code == 200


def test_a_connection_that_rests_too_long_is_closed() -> None:
    with running_service(keep_alive_s=0.1) as service, service.connect() as sock:
        wire = Wire(sock)
        wire.send(http("GET", "/livez"))
        reply = wire.read_reply()
        assert "connection" not in reply.headers
        assert sock.recv(1) == b"", "it is closed, not reset"


def test_a_caller_that_does_not_read_its_reply_is_cut_off(impatient: RunningService) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(WAIT_SECONDS)
        sock.connect(impatient.address)
        # Each reply has over a megabyte; together they are more than the kernel holds for us.
        sock.sendall(http("GET", "/static-offline-docs/swagger-ui-bundle.js") * 20)

        def connections() -> int:
            return len(impatient.server.server_state.connections)

        impatient.wait_until(lambda: connections() == 2, "both callers are there")
        impatient.wait_until(lambda: connections() == 1, "the one that does not read is cut off")


@pytest.mark.parametrize(
    ("version", "headers"),
    [
        ("1.0", ""),
        ("1.1", "Connection: close\r\n"),
        ("1.1", "Connection: Close\r\n"),
        ("1.1", "Connection: keep-alive\r\nConnection: close\r\n"),
    ],
)
@pytest.mark.parametrize(
    ("path", "size", "status", "code"),
    [
        ("/classify?top_k=0", 900_000, 400, "bad_request"),
        ("/classify", 5_000_000, 413, "payload_too_large"),
        ("/nowhere", 5_000_000, 404, "not_found"),
    ],
)
def test_an_early_refusal_reaches_a_caller_that_closes_after_it(
    service: RunningService,
    version: str,
    headers: str,
    path: str,
    size: int,
    status: int,
    code: str,
) -> None:
    head = f"POST {path} HTTP/{version}\r\nHost: x\r\n{headers}Content-Length: {size}\r\n"
    for _ in range(3):  # a reset does not come every time
        with service.connect() as sock:
            wire = Wire(sock)
            wire.send(head.encode() + b"\r\n", bytes(size))
            check_error(wire.read_reply(), status, code)


def test_a_body_that_drips_does_not_outlast_the_receive_timeout(impatient: RunningService) -> None:
    with impatient.connect() as sock:
        sock.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        pause = threading.Event()
        for _ in range(400):  # twenty seconds of it
            try:
                sock.sendall(b"x")
            except OSError:
                break
            if select.select([sock], [], [], 0)[0]:
                break
            pause.wait(0.05)

        check_error(Wire(sock).read_reply(), 408, "receive_timeout")


@pytest.mark.parametrize("busy", ["engine", "pool"])
def test_what_cannot_be_answered_need_not_be_sent(busy: str) -> None:
    backend = WatchedBackend(gate_open=False)
    gate = threading.Event()
    with (
        running_service(
            backend, batch_seconds={1: 100.0, 8: 100.0}, queue_budget_ms=10, threads=1
        ) as running,
        running.connect() as first,
        running.connect() as sock,
    ):
        if busy == "engine":
            first.sendall(http("POST", "/classify", grey(255)))
            backend.wait_for_batches(1)
        else:
            pool = running.state.pool
            pool._mean_seconds = 100.0
            pool._executor.submit(gate.wait, WAIT_SECONDS)
            pool._pending += 1
        sock.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")

        check_error(Wire(sock).read_reply(), 503, "overloaded")
        gate.set()
        backend.gate.set()


def test_patience_does_not_end_while_a_request_is_answered() -> None:
    backend = WatchedBackend(gate_open=False)
    with (
        running_service(backend, receive_timeout_ms=50) as running,
        running.connect() as asking,
        running.connect() as silent,
    ):
        asking.sendall(http("POST", "/classify", grey(255)))
        backend.wait_for_batches(1)
        Wire(silent).read_end()  # came later, was cut off: the other's time is up too
        backend.gate.set()

        assert Wire(asking).read_reply().status_code == 200


@given(
    st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=4)
)
@settings(max_examples=150, deadline=None)
def test_a_mutated_request_is_never_our_fault(
    impatient: RunningService, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(VALID)
    for place, value in changes:
        data[place] = value

    with impatient.connect() as sock:
        sock.sendall(data + LAST)
        reply = Wire(sock).read_end()

    statuses = [line.split()[1] for line in reply.split(b"\r\n") if line.startswith(b"HTTP/1.")]
    assert statuses, "there was no reply at all"
    assert all(one < b"500" for one in statuses), reply


def test_the_server_lives_after_all_that(service: RunningService) -> None:
    for data in GARBAGE:
        closes_or_answers_400(service, data)

    reply = service.client.post("/classify", content=grey(255))

    assert best_classes([reply.json()]) == [9]
    metrics = service.client.get("/metrics").text
    assert 'status="500"' not in metrics


# The end of the service.


def test_a_connection_made_just_before_the_end_may_send_its_first_request() -> None:
    with running_service() as service, service.connect() as early, service.connect() as silent:
        service.wait_until(
            lambda: len(service.server.server_state.connections) >= 3, "they are accepted"
        )
        service.server.stop()
        wait_until(lambda: service.state.draining, "it stops")
        early.sendall(http("POST", "/classify", grey(0)))
        answer = b"".join(iter(lambda: early.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer
        assert silent.recv(1) == b"", "it is closed, not reset"


@contextmanager
def ending_under(service: RunningService, sock: socket.socket) -> Iterator[list[bool]]:
    """Hold the service's loop while the block sends; then end the connection, before it is read.

    Gives a list that comes to hold whether that closed it at once.
    """
    address = sock.getsockname()
    (protocol,) = [
        one
        for one in service.server.server_state.connections
        if isinstance(one, PatientProtocol) and one.client == address
    ]
    is_held, has_sent = threading.Event(), threading.Event()
    is_closing: list[bool] = []

    def end() -> None:
        is_held.set()
        has_sent.wait(WAIT_SECONDS)
        service.state.draining = True
        protocol.shutdown()
        is_closing.append(protocol.transport.is_closing())

    protocol.loop.call_soon_threadsafe(end)
    assert is_held.wait(WAIT_SECONDS)
    try:
        yield is_closing
    finally:
        has_sent.set()


@pytest.mark.parametrize("sent", ["all of it", "its head in part", "its body in part"])
def test_a_request_that_arrives_while_its_connection_is_being_closed_is_answered(
    sent: str,
) -> None:
    request = http("POST", "/classify", grey(255))
    length = {"all of it": len(request), "its head in part": 20, "its body in part": -20}[sent]
    with running_service() as service, service.connect() as sock:
        wire = Wire(sock)
        wire.send(http("GET", "/livez"))
        assert wire.read_reply().status_code == 200

        with ending_under(service, sock):
            wire.send(request[:length])
        service.client.get("/livez")  # the loop has turned
        wire.send(request[length:] if length < len(request) else b"")

        reply = wire.read_reply()
        assert best_classes([reply.json()]) == [9]
        assert reply.headers["connection"] == "close"
        assert wire.read_end() == b""


def test_a_request_that_has_begun_is_answered_though_the_service_stops() -> None:
    request = http("POST", "/classify", grey(255))
    with running_service() as service, service.connect() as sock:
        wire = Wire(sock)
        wire.send(http("GET", "/livez") + request[:20])
        assert wire.read_reply().status_code == 200
        with ending_under(service, sock):
            pass
        service.client.get("/livez")
        wire.send(request[20:])

        assert best_classes([wire.read_reply().json()]) == [9]
        assert wire.read_end() == b""


def test_a_refused_body_that_still_arrives_is_read_though_the_service_stops() -> None:
    request = http("POST", "/nope", bytes(300_000))
    with running_service() as service, service.connect() as sock:
        wire = Wire(sock)
        wire.send(request[:200_000])
        check_error(wire.read_reply(), 404, "not_found")
        with ending_under(service, sock):
            wire.send(request[200_000:250_000])
        service.client.get("/livez")
        wire.send(request[250_000:])

        assert sock.recv(1) == b"", "it is closed, not reset"


def test_connections_that_rest_are_closed_at_once_when_the_service_stops() -> None:
    with running_service() as service, service.connect() as resting:
        wire = Wire(resting)
        wire.send(http("GET", "/livez"))
        assert wire.read_reply().status_code == 200
        with ending_under(service, resting) as is_closing:
            pass
        assert wire.read_end() == b""
        assert is_closing == [True], "it was not closed at once"
