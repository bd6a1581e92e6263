"""What a request must carry, and what routes ask for: aliases of `Annotated[..., Depends(...)]`."""

from __future__ import annotations

import hmac
import math
from typing import Annotated

from fastapi import Depends, Request

from app.errors import BadRequest, Unauthenticated
from app.http.context import RequestContext, context_of
from app.http.state import ServiceState

# Plain functions would be sent to a pool of 40 threads; these cost nothing.


async def get_state(request: Request) -> ServiceState:
    """Return the service's state."""
    state: ServiceState = request.app.state.service
    return state


async def get_context(request: Request) -> RequestContext:
    """Return the request's context."""
    return context_of(request.scope)


StateDep = Annotated[ServiceState, Depends(get_state)]
ContextDep = Annotated[RequestContext, Depends(get_context)]


async def require_api_key(state: StateDep, context: ContextDep) -> None:
    """Let a request in that carries a known key."""
    check_api_key(state, context)


def check_api_key(state: ServiceState, context: RequestContext) -> None:
    """Look for a known key, in `Authorization: Bearer` or `X-API-Key`.

    Raises:
        Unauthenticated: no key, or an unknown one.
    """
    if state.api_keys is None:
        return
    scheme, _, token = context.headers.get(b"authorization", b"").partition(b" ")
    is_bearer = scheme.lower() == b"bearer"
    sent = token.strip() if is_bearer else context.headers.get(b"x-api-key", b"")
    # Every key is compared, in constant time: how long it takes tells nothing.
    known = [hmac.compare_digest(sent, key.encode()) for key in state.api_keys]
    if not any(known):
        raise Unauthenticated("send a known API key in the header Authorization: Bearer <key>")


def set_deadline(state: ServiceState, context: RequestContext) -> None:
    """Note until when the request must be answered.

    `X-Request-Timeout-Ms` is the caller's wish, `x-envoy-expected-rq-timeout-ms` a proxy's; the
    server's own timeout is the most either may ask for.

    Raises:
        BadRequest: the caller's header is no positive number.
    """
    timeout_ms = state.settings.request_timeout_ms
    headers = context.headers
    if b"x-request-timeout-ms" in headers:
        wished = context.header(b"x-request-timeout-ms")
        wished_ms = _positive(wished)
        if wished_ms is None:
            raise BadRequest(f"X-Request-Timeout-Ms: {wished[:40]!r} is no positive number")
        timeout_ms = min(timeout_ms, wished_ms)
    elif b"x-envoy-expected-rq-timeout-ms" in headers:
        proxy_ms = _positive(context.header(b"x-envoy-expected-rq-timeout-ms"))
        timeout_ms = min(timeout_ms, proxy_ms or timeout_ms)
    context.deadline = context.started_at + timeout_ms / 1000


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
