"""What is known of one request while it is on its way; the middleware makes it and logs it."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field

from starlette.datastructures import Headers
from starlette.types import Scope

PROBES = frozenset({"/livez", "/readyz", "/startupz"})
"""What orchestrators ask every few seconds: a good answer is logged at debug, none is counted as a
refused request."""

_KEY = "metaserve.context"
_CLEAN_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass
class RequestContext:
    """One request.

    Attributes:
        request_id: the caller's, or made here.
        started_at: `time.monotonic()` when the headers were there.
        received_bytes: of the body, so far.
        images: how many it carried.
        stage_ms: stage -> milliseconds, of the slowest image where there are several.
        error_code: of the error it was answered with.
    """

    request_id: str
    started_at: float = field(default_factory=time.monotonic)
    received_bytes: int = 0
    images: int = 0
    stage_ms: dict[str, float] = field(default_factory=dict)
    error_code: str | None = None


def new_context(scope: Scope) -> RequestContext:
    """Make a request's context and keep it in its scope."""
    given = Headers(scope=scope).get("x-request-id", "")
    request_id = given if _CLEAN_ID.fullmatch(given) else secrets.token_hex(16)
    context = RequestContext(request_id)
    scope[_KEY] = context
    return context


def context_of(scope: Scope) -> RequestContext:
    """Return the context that the middleware made."""
    context: RequestContext = scope[_KEY]
    return context
