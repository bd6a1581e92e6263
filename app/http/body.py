"""LimitBody: bounds a body's size and time while it streams, and minds early replies; pure ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge, ReceiveTimeout
from app.http.context import context_of
from app.http.state import ServiceState

DISCARD_SECONDS = 5.0
"""How long a refused body is read on."""


class LimitBody:
    """Bounds a body's size and the time it may take, where it is read and nowhere else.

    What is over the limit raises from `receive`, so that the route's error handling answers it; a
    body that nobody reads costs nothing.
    """

    def __init__(self, app: ASGIApp, state: ServiceState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with a watched body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _WatchedBody(scope, receive, send, self._state)
        await self._app(scope, body.receive, body.send)


class _WatchedBody:
    """The two ends of one request, between the server and the application."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, state: ServiceState) -> None:
        headers = Headers(scope=scope)
        length = headers.get("content-length", "")
        self._receive = receive
        self._send = send
        self._state = state
        self._context = context_of(scope)
        self._limit_bytes = state.settings.body_limit_bytes
        self._timeout_seconds = state.settings.receive_timeout_ms / 1000
        # The server refuses a length that is no number.
        self._announced = int(length) if length.isdecimal() else 0
        connection = ",".join(headers.getlist("connection")).lower()
        self._closes = scope["http_version"] == "1.0" or "close" in connection
        self._waits_for_leave = headers.get("expect", "").lower() == "100-continue"
        self._is_complete = False
        self._is_late = False

    async def receive(self) -> Message:
        """Return the next part of the body, or that the caller left.

        Raises:
            BodyTooLarge: it is, or announces to be, over the limit.
            ReceiveTimeout: it takes too long.
        """
        if self._is_complete:  # what may still come is the caller's leaving
            return await self._receive()
        if self._announced > self._limit_bytes:
            raise self._too_large(self._announced)
        self._waits_for_leave = False  # the server gives it now
        until = self._context.started_at + self._timeout_seconds
        try:
            async with asyncio.timeout(until - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            self._is_late = True
            raise ReceiveTimeout(
                f"the body did not arrive within {self._timeout_seconds:g} s; send it faster"
            ) from None
        if message["type"] == "http.request":
            self._context.received_bytes += len(message.get("body", b""))
            self._is_complete = not message.get("more_body", False)
            if self._context.received_bytes > self._limit_bytes:
                raise self._too_large(self._context.received_bytes)
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the reply; one that comes before the whole body needs care."""
        if message["type"] == "http.response.start" and not self._is_complete:
            if self._waits_for_leave:
                # Whether a body or the next request follows the reply, nobody could tell.
                MutableHeaders(scope=message)["connection"] = "close"
            elif (self._closes or self._state.draining) and not self._is_late:
                await self._discard_rest()
        await self._send(message)

    async def _discard_rest(self) -> None:
        """Read what the caller still sends, for a while.

        Where the connection closes after the reply, the kernel answers unread bytes with a reset,
        and the caller may never see the reply. On a connection that stays the server does this.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect" or not message.get("more_body", False):
                        return

    def _too_large(self, size: int) -> BodyTooLarge:
        return BodyTooLarge(
            f"the body has {size} bytes or more, {self._limit_bytes} are allowed; send a smaller "
            "image or fewer of them"
        )
