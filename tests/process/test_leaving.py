"""SIGTERM with all kinds of callers there, of one process and of several: it leaves in time.

Under load it is tested in `test_life.py`, `test_shapes.py` and `tests/rollout`.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.http.wire import Wire, check_error, http
from tests.process.callers import SHAPES
from tests.servers import WAIT_SECONDS, ServiceProcess, service_process

DELAY, TIMEOUT, GRACE = 0.2, 0.5, 5.0
"""Seconds: of the two settings, and what the documentation adds to them."""
SOON = 5.0
"""Seconds: where nothing is pending; far below a drain timeout of 30 s."""
QUICK = {"METASERVE_BACKEND": "fake", "METASERVE_DRAIN_DELAY_S": str(DELAY)}

pytestmark = pytest.mark.parametrize("shape", SHAPES)


@contextlib.contextmanager
def connection(service: ServiceProcess, sent: bytes = b"") -> Iterator[socket.socket]:
    url = httpx.URL(service.url)
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.settimeout(WAIT_SECONDS)
        sock.connect((url.host, url.port or 0))
        sock.sendall(sent)
        # Whoever answers this has, on a busy machine too, taken the connection before.
        assert httpx.get(f"{service.url}/livez", trust_env=False).is_success
        yield sock


def seconds_to_leave(service: ServiceProcess) -> float:
    """Send SIGTERM; return how long the service takes to exit with 0."""
    asked_at = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    assert service.wait_exit() == 0
    return time.monotonic() - asked_at


def test_idle_it_leaves_soon_though_connections_rest(shape: str) -> None:
    with (
        service_process(QUICK | SHAPES[shape]) as service,
        connection(service, http("GET", "/livez")) as resting,
        connection(service) as silent,
    ):
        assert Wire(resting).read_reply().status_code == 200
        assert seconds_to_leave(service) < SOON
        for one in resting, silent:
            assert one.recv(1) == b"", "it is closed, not reset"


def test_stuck_callers_do_not_hold_it_beyond_its_limits(shape: str) -> None:
    head = http("GET", "/livez") + b"GET /livez HT"
    body = http("POST", "/classify", bytes(100))[:-50]
    # Each reply has over a megabyte; together they are more than the kernel holds for us.
    unread_replies = http("GET", "/static-offline-docs/swagger-ui-bundle.js") * 20
    env = QUICK | SHAPES[shape] | {"METASERVE_DRAIN_TIMEOUT_S": str(TIMEOUT)}
    with (
        service_process(env) as service,
        connection(service, head),
        connection(service, body) as stuck_in_its_body,
        connection(service, unread_replies),
    ):
        assert seconds_to_leave(service) < DELAY + TIMEOUT + GRACE
        check_error(Wire(stuck_in_its_body).read_reply(), 503, "draining")


def test_told_again_and_again_it_still_ends_with_0(shape: str, tmp_path: Path) -> None:
    with service_process(QUICK | SHAPES[shape] | {"TMPDIR": str(tmp_path)}) as service:
        asked_at = time.monotonic()
        while service.process.poll() is None:
            service.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                service.process.wait(0.005)
        assert service.wait_exit() == 0
        assert time.monotonic() - asked_at < SOON
    assert list(tmp_path.iterdir()) == [], "its runtime directory is removed"
