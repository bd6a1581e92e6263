"""ObserveRequests: an id, a measurement and a log line for each request; pure ASGI.

`BaseHTTPMiddleware` is not used: one of it makes a caller's leaving invisible to the routes.
"""

from __future__ import annotations

import asyncio
import logging
import time

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.errors import DRAINING, Draining, NotReady
from app.http.caller import caller_of
from app.http.context import PROBES, RequestContext, new_context
from app.http.errors import answer_fault, error_response
from app.http.state import ServiceState

access_log = logging.getLogger("metaserve.access")
log = logging.getLogger("metaserve.http")

CALLER_LEFT = 499
"""What the log and the metrics show where nobody was left to answer; nginx's number for it."""

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
        caller = caller_of(scope)
        status = CALLER_LEFT

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (b"x-request-id", context.request_id.encode())]
                if self._state.draining:  # the next request should go to another instance
                    headers = [one for one in headers if one[0] != b"connection"]
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        try:
            if caller is not None:
                if caller.is_gone:
                    raise ClientDisconnect
                caller.task = asyncio.current_task()
            await self._app(scope, receive, send_marked)
        except ClientDisconnect:
            self._state.metrics.requests_cancelled.inc()
        except asyncio.CancelledError:
            if caller is not None and caller.is_gone:
                status = CALLER_LEFT
                self._state.metrics.requests_cancelled.inc()
                return
            # The server's last word at the end of a drain: the caller is still there.
            context.error_code = Draining.code
            if status == CALLER_LEFT:
                refusal = Draining(DRAINING)
                await error_response(refusal, context.request_id)(scope, receive, send_marked)
        except Exception as fault:
            if isinstance(fault, MemoryError):
                log.error("request %s found too little memory", context.request_id)
            else:
                log.exception("request %s hit a fault of ours", context.request_id)
            if status == CALLER_LEFT:
                await answer_fault(self._state, scope, fault)(scope, receive, send_marked)
        finally:
            self._record(scope, context, status)

    def _record(self, scope: Scope, context: RequestContext, status: int) -> None:
        seconds = time.monotonic() - context.started_at
        route = getattr(scope.get("route"), "path", "unmatched")
        self._state.metrics.observe_request(route, status, seconds)
        as_it_should = status < 400 or context.error_code == NotReady.code  # it still loads
        level = logging.DEBUG if route in _QUIET_ROUTES and as_it_should else logging.INFO
        if access_log.isEnabledFor(level):
            access_log.log(
                level, "request", extra={"fields": _fields(scope, context, status, seconds)}
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
