"""Pure ASGI middleware: request id, metrics and log line; body limits while the body streams.

`BaseHTTPMiddleware` is not used: one of it makes a caller's leaving invisible to the routes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import DRAINING, BodyTooLarge, Draining, ReceiveTimeout, ServiceError
from app.http.context import PROBES, RequestContext, context_of, new_context
from app.http.errors import error_response
from app.http.state import ServiceState

access_log = logging.getLogger("metaserve.access")
log = logging.getLogger("metaserve.http")

CALLER_LEFT = 499
"""What the log and the metrics show where nobody was left to answer; nginx's number for it."""

DISCARD_SECONDS = 5.0
"""How long a refused body is read on."""

_QUIET_ROUTES = PROBES | {"/metrics"}


class ObserveRequests:
    """Gives each request an id, measures it, logs one line, and answers faults of ours with 500."""

    def __init__(self, app: ASGIApp, state: ServiceState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and look at what comes back."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = new_context(scope)
        status = CALLER_LEFT

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = context.request_id
                if self._state.draining:  # the next request should go to another instance
                    headers["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except asyncio.CancelledError:
            # The server's last word at the end of a drain: the caller is still there.
            context.error_code = Draining.code
            if status == CALLER_LEFT:
                refusal = Draining(DRAINING)
                await error_response(refusal, context.request_id)(scope, receive, send_marked)
        except Exception:
            log.exception("request %s hit a fault of ours", context.request_id)
            context.error_code = ServiceError.code
            if status == CALLER_LEFT:
                fault = ServiceError("this is a fault of the service; its log says more")
                await error_response(fault, context.request_id)(scope, receive, send_marked)
        finally:
            self._record(scope, context, status)

    def _record(self, scope: Scope, context: RequestContext, status: int) -> None:
        seconds = time.monotonic() - context.started_at
        route = getattr(scope.get("route"), "path", "unmatched")
        self._state.metrics.request_duration.labels(route, str(status)).observe(seconds)
        level = logging.DEBUG if route in _QUIET_ROUTES and status < 400 else logging.INFO
        if access_log.isEnabledFor(level):
            access_log.log(
                level, "request", extra={"fields": _fields(scope, context, status, seconds)}
            )


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
        self._closes = scope["http_version"] == "1.0" or "close" in headers.get("connection", "")
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


def _fields(
    scope: Scope, context: RequestContext, status: int, seconds: float
) -> dict[str, object]:
    """Return what the log line says, in the order it says it."""
    client = scope.get("client")
    fields: dict[str, object] = {
        "request_id": context.request_id,
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "duration_ms": round(seconds * 1e3, 3),
        "received_bytes": context.received_bytes,
        "client": client[0] if client else None,
    }
    if context.images:
        fields["images"] = context.images
        fields.update({f"{stage}_ms": ms for stage, ms in context.stage_ms.items()})
    if context.error_code:
        fields["error"] = context.error_code
    return fields
