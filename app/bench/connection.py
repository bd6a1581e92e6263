"""One keep-alive connection of the load generator."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

import httptools
import orjson


class Load(Protocol):
    """What a connection reports to."""

    def on_ready(self, connection: Connection) -> None:
        """It can take a request."""

    def on_reply(
        self, connection: Connection, outcome: str, retry_after: float | None, reusable: bool
    ) -> None:
        """Its request was answered; it can take another where it is reusable."""

    def on_end(self, connection: Connection, outcome: str) -> None:
        """It is closed; a request that was under way ended with this outcome."""


class Connection(asyncio.Protocol):
    """Sends prebuilt bytes and reads one reply at a time.

    Attributes:
        intended: when the request under way was to start; None between requests.
        sent: when it was sent.
        resting_since: the loop's time of the last reply.
    """

    __slots__ = (
        "_body",
        "_load",
        "_outcome",
        "_parser",
        "_retry_after",
        "intended",
        "resting_since",
        "sent",
        "transport",
    )

    def __init__(self, load: Load) -> None:
        self._load = load
        self._parser = httptools.HttpResponseParser(self)
        self._body: list[bytes] = []
        self._retry_after: float | None = None
        self._outcome = "reset"
        self.intended: float | None = None
        self.sent = 0.0
        self.resting_since = 0.0
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Offer the connection."""
        # uvloop's transports have no class in common with asyncio's.
        self.transport = cast(asyncio.Transport, transport)
        self._load.on_ready(self)

    def send(self, request: bytes, intended: float, now: float) -> None:
        """Send a request."""
        self.intended, self.sent = intended, now
        self.transport.write(request)

    def give_up(self, outcome: str) -> None:
        """Cut the connection off."""
        self._outcome = outcome
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        """Read on; a reply that is complete calls `on_message_complete`."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.give_up("malformed reply")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Notice one header (called by the parser)."""
        if len(name) == 11 and name.lower() == b"retry-after" and value.isdigit():
            self._retry_after = float(value)

    def on_body(self, body: bytes) -> None:
        """Keep the body, which may name an error (called by the parser)."""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """Report a reply (called by the parser)."""
        status = self._parser.get_status_code()
        body, self._body = self._body, []
        retry_after, self._retry_after = self._retry_after, None
        if status < 200:
            return  # 100 Continue
        if self.intended is None:
            self.give_up("malformed reply")  # nobody asked
            return
        outcome = "200" if status == 200 else _outcome(status, b"".join(body))
        # A server that answers before it has read the whole body may close; so do we.
        reusable = self._parser.should_keep_alive() and not self.transport.get_write_buffer_size()
        self._load.on_reply(self, outcome, retry_after, reusable)

    def connection_lost(self, exc: Exception | None) -> None:
        """Report the end."""
        self._load.on_end(self, self._outcome)


def _outcome(status: int, body: bytes) -> str:
    """Return the status with the error's code, where the body has one of our shape."""
    try:
        code = orjson.loads(body)["error"]["code"]
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return str(status)
    return f"{status} {code}"
