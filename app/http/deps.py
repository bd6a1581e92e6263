"""What routes ask for: the aliases of `Annotated[..., Depends(...)]`."""

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


async def require_api_key(request: Request, state: StateDep) -> None:
    """Let a request in that carries a known key, in `Authorization: Bearer` or `X-API-Key`.

    Raises:
        Unauthenticated: no key, or an unknown one.
    """
    if state.api_keys is None:
        return
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    # Every key is compared, in constant time: how long it takes tells nothing.
    # Headers arrive decoded as Latin-1, whatever they were.
    sent = given.encode("latin-1")
    known = [hmac.compare_digest(sent, key.encode()) for key in state.api_keys]
    if not any(known):
        raise Unauthenticated("send a known API key in the header Authorization: Bearer <key>")


async def get_deadline(request: Request, state: StateDep, context: ContextDep) -> float:
    """Return when the request must be answered, absolute `time.monotonic()` seconds.

    `X-Request-Timeout-Ms` is the caller's wish, `x-envoy-expected-rq-timeout-ms` a proxy's; the
    server's own timeout is the most either may ask for.

    Raises:
        BadRequest: the caller's header is no positive number.
    """
    timeout_ms = state.settings.request_timeout_ms
    wished = request.headers.get("x-request-timeout-ms")
    if wished is not None:
        wished_ms = _positive(wished)
        if wished_ms is None:
            raise BadRequest(f"X-Request-Timeout-Ms: {wished[:40]!r} is no positive number")
        timeout_ms = min(timeout_ms, wished_ms)
    else:
        proxy_ms = _positive(request.headers.get("x-envoy-expected-rq-timeout-ms", ""))
        timeout_ms = min(timeout_ms, proxy_ms or timeout_ms)
    return context.started_at + timeout_ms / 1000


def _positive(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


DeadlineDep = Annotated[float, Depends(get_deadline)]
