"""LimitBody: bounds a body's size and time while it streams, and minds early replies; pure ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import BodyTooLarge, DeadlineExceeded, ReceiveTimeout
from app.http.caller import caller_of
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

    __slots__ = (
        "_caller",
        "_context",
        "_is_asked_for",
        "_is_complete",
        "_is_late",
        "_receive",
        "_scope",
        "_send",
        "_state",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send, state: ServiceState) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._state = state
        self._context = context_of(scope)
        self._caller = caller_of(scope)
        self._is_asked_for = False
        self._is_complete = False
        self._is_late = False

    async def receive(self) -> Message:
        """Return the next part of the body, or that the caller left.

        Raises:
            BodyTooLarge: it is, or announces to be, over the limit.
            ReceiveTimeout: it takes too long.
            DeadlineExceeded: the request's deadline passed before it was there.
        """
        if self._is_complete:  # what may still come is the caller's leaving
            return await self._receive()
        if not self._is_asked_for:
            self._refuse_announced()
            self._is_asked_for = True
        if self._caller is not None and self._caller.has_sent_all:
            message = await self._receive()
        else:
            message = await self._receive_in_time()
        if message["type"] == "http.request":
            self._context.received_bytes += len(message.get("body", b""))
            self._is_complete = not message.get("more_body", False)
            if self._context.received_bytes > self._state.settings.body_limit_bytes:
                raise self._too_large(self._context.received_bytes)
        return message

    async def send(self, message: Message) -> None:
        """Pass on a part of the reply; one that comes before the whole body needs care."""
        if message["type"] == "http.response.start" and not self._is_complete:
            if self._waits_for_leave():
                # Whether a body or the next request follows the reply, nobody could tell.
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            elif not self._is_late and (self._state.draining or self._closes()):
                await self._discard_rest()
        await self._send(message)

    async def _receive_in_time(self) -> Message:
        settings, context = self._state.settings, self._context
        patience_ends = context.started_at + settings.receive_timeout_ms / 1000
        until = min(patience_ends, context.deadline)
        try:
            async with asyncio.timeout(until - time.monotonic()):
                return await self._receive()
        except TimeoutError:
            if context.deadline < patience_ends:
                raise DeadlineExceeded("the deadline passed before the body had arrived") from None
            self._is_late = True
            raise ReceiveTimeout(
                f"the body did not arrive within {settings.receive_timeout_ms / 1000:g} s; "
                "send it faster"
            ) from None

    def _refuse_announced(self) -> None:
        length = self._context.headers.get(b"content-length", b"")
        # The server refuses a length that is no number.
        announced = int(length) if length.isdigit() else 0
        if announced > self._state.settings.body_limit_bytes:
            raise self._too_large(announced)

    def _waits_for_leave(self) -> bool:
        """Tell whether the caller asked before it sends the body, and was not answered yet."""
        expected = self._context.headers.get(b"expect", b"")
        return not self._is_asked_for and expected.lower() == b"100-continue"

    def _closes(self) -> bool:
        """Tell whether the connection ends with this request."""
        connection = ",".join(Headers(scope=self._scope).getlist("connection")).lower()
        return self._scope["http_version"] == "1.0" or "close" in connection

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
        limit = self._state.settings.body_limit_bytes
        return BodyTooLarge(
            f"the body has {size} bytes or more, {limit} are allowed; send a smaller "
            "image or fewer of them"
        )
