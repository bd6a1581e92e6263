"""ForwardedOnly: whose word on the caller's address and scheme is taken."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from app.http.proxied import ForwardedOnly
from tests.http.wire import grey
from tests.servers import running_service

PROXY = "10.0.0.7"
HEADERS = [(b"x-forwarded-for", b"203.0.113.7"), (b"x-forwarded-proto", b"https")]


def seen(peer: str, headers: list[tuple[bytes, bytes]]) -> Scope:
    """Return what the application sees of a request from a peer."""
    scopes: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        scopes.append(scope)

    async def nothing(*_: Any) -> Any:
        raise AssertionError("nobody reads or writes")

    scope = {"type": "http", "scheme": "http", "client": (peer, 5), "headers": headers}
    asyncio.run(ForwardedOnly(app, PROXY)(scope, nothing, nothing))
    (one,) = scopes
    return one


@pytest.mark.parametrize(
    ("peer", "headers", "client", "scheme"),
    [
        (PROXY, HEADERS, "203.0.113.7", "https"),
        (PROXY, HEADERS[:1], "203.0.113.7", "http"),
        (PROXY, HEADERS[1:], PROXY, "https"),
        (PROXY, [], PROXY, "http"),
        ("198.51.100.1", HEADERS, "198.51.100.1", "http"),  # anybody can write a header
    ],
)
def test_only_a_trusted_proxy_is_believed(
    peer: str, headers: list[tuple[bytes, bytes]], client: str, scheme: str
) -> None:
    scope = seen(peer, headers)
    assert (scope["client"][0], scope["scheme"]) == (client, scheme)


def test_the_server_trusts_whom_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", PROXY)
    with caplog.at_level("INFO", "metaserve.access"), running_service() as service:
        service.client.post("/classify", content=grey(0), headers=dict(HEADERS))
        service.wait_until(
            lambda: any(one.name == "metaserve.access" for one in caplog.records), "it is logged"
        )
    (line,) = (vars(one) for one in caplog.records if one.name == "metaserve.access")
    assert line["fields"]["client"] == "127.0.0.1"
