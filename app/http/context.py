"""What is known of one request while it is on its way; the middleware makes it and logs it."""

from __future__ import annotations

import math
import random
import re
import time
from dataclasses import dataclass, field

from starlette.types import Scope

from app.http.caller import caller_of

PROBES = frozenset({"/livez", "/readyz", "/startupz"})
"""What orchestrators ask every few seconds: a good answer is logged at debug, none is counted as a
refused request."""

_KEY = "metaserve.context"
_CLEAN_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


@dataclass(slots=True)
class RequestContext:
    """One request.

    Attributes:
        request_id: the caller's, or made here.
        headers: name in lower case -> value; of several with one name, the first.
        started_at: `time.monotonic()` when the headers were there.
        lag_seconds: from then until the event loop came to it.
        deadline: likewise absolute; the body is waited for no longer.
        received_bytes: of the body, so far.
        images: how many it carried.
        stage_ms: stage -> milliseconds, of the slowest image where there are several.
        error_code: of the error it was answered with.
    """

    request_id: str
    headers: dict[bytes, bytes]
    started_at: float = field(default_factory=time.monotonic)
    lag_seconds: float = 0.0
    deadline: float = math.inf
    received_bytes: int = 0
    images: int = 0
    stage_ms: dict[str, float] = field(default_factory=dict)
    error_code: str | None = None

    def header(self, name: bytes) -> str:
        """Return a header's text, empty where it was not sent."""
        return self.headers.get(name, b"").decode("latin-1")


def new_context(scope: Scope) -> RequestContext:
    """Make a request's context and keep it in its scope."""
    headers = dict(reversed(scope["headers"]))
    given = headers.get(b"x-request-id", b"")
    # Ids tell requests apart and open nothing: no need for randomness that cannot be foretold.
    is_clean = _CLEAN_ID.fullmatch(given)
    request_id = given.decode() if is_clean else f"{random.getrandbits(128):032x}"
    context = RequestContext(request_id, headers)
    caller = caller_of(scope)
    if caller is not None:
        context.lag_seconds = context.started_at - caller.arrived_at
        context.started_at = caller.arrived_at
    scope[_KEY] = context
    return context


def context_of(scope: Scope) -> RequestContext:
    """Return the context that the middleware made."""
    context: RequestContext = scope[_KEY]
    return context
