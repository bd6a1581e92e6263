"""uvicorn's httptools protocol, with what it lacks: bounds, patience, and news of who left.

A request's head is bounded in bytes, headers and length of its URL; a caller that is slow is cut
off; what is no HTTP gets 400 in our shape; and the task that answers a caller hears at once when it
leaves, without another task that waits for it. `heads.py` says which heads are refused.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import select
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from app.errors import BadRequest
from app.http.caller import CALLER, Caller
from app.http.errors import error_body
from app.http.heads import MAX_HEAD_BYTES, MAX_HEADERS, MAX_URL_BYTES, BadHead, check_head

access_log = logging.getLogger("metaserve.access")

# How long the first request of a connection that was made just before the server stops may take to
# begin; how often is looked whether a request that has begun is there when it stops.
FIRST_REQUEST_SECONDS = 0.5


class PatientProtocol(HttpToolsProtocol):
    """One connection.

    A caller that is slow to send a request's head, or the rest of a body that was refused, or that
    does not read its reply, is cut off after `patience_seconds`. While a request is being answered,
    `LimitBody` watches its body.
    """

    patience_seconds = 30.0

    _patience: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None
    _caller: Caller | None = None  # of the request that is being answered, or was last
    _in_message = False  # its first byte came, its last did not
    _in_head = True  # the next byte belongs to a head
    _heads = 0  # that were complete
    _head_bytes = 0  # of reads that held nothing else
    _awaits_first = False  # the server stops and has waited for a first request
    _ended = False  # nothing that comes now is a request

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes; they may complete a request's head, or not."""
        self._unset_keepalive_if_required()
        was_in_head, heads = self._in_head, self._heads
        try:
            self._feed(data)
            if was_in_head and self._in_head and self._heads == heads:
                self._head_bytes += len(data)
                if self._head_bytes > MAX_HEAD_BYTES:
                    raise BadHead
        except (httptools.HttpParserError, BadHead):
            if not self._ended:
                self._ended = True
                self._refuse_rest()
        self._watch()

    def on_message_begin(self) -> None:
        """Begin a request."""
        if self._ended:
            raise BadHead
        super().on_message_begin()
        self._in_message = True
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Take a part of the URL."""
        super().on_url(url)
        if len(self.url) > MAX_URL_BYTES:
            raise BadHead

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header."""
        if len(self.headers) >= MAX_HEADERS:
            raise BadHead
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Begin to answer, while the body may still be on its way."""
        check_head(self.parser.get_method(), self.parser.get_http_version(), self.url, self.headers)
        if not self.parser.should_upgrade():
            self._in_head = False
            self._heads += 1
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that the body is whole."""
        if self.parser.should_upgrade():
            return  # it comes again; see `_feed`
        super().on_message_complete()
        self._in_message = False
        self._in_head = True
        self._ended = not self.cycle.keep_alive
        if not self.pipeline:
            # uvicorn pauses at large bodies until they are read; whether the caller leaves is seen
            # on a connection that is read.
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of this one."""
        if self._caller is not None:
            self._caller.wire.flush()
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the request that is being answered; those behind it will never begin."""
        self._stop_watching()
        self._unstick()
        self.pipeline.clear()
        if self._caller is not None:
            self._caller.leave()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The caller does not read: give it some time."""
        super().pause_writing()
        if self._stuck is None:
            self._stuck = self.loop.call_later(self.patience_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The caller reads on."""
        self._unstick()
        super().resume_writing()

    def shutdown(self) -> None:
        """Close when the server stops: at once where nothing is under way.

        To close while a request is coming would reset the connection, and the request be lost.
        """
        if self.transport.is_closing():
            return
        if self._is_request_coming():
            self._awaits_first = True
            self.loop.call_later(FIRST_REQUEST_SECONDS, self.shutdown)
            return
        super().shutdown()
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that rested; one that never took its last reply is cut off."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def _is_request_coming(self) -> bool:
        """Return whether a request may be on its way, has begun, or waits to be read."""
        if self.cycle is not None and not self.cycle.response_complete:
            return False  # the server waits for its reply
        awaits_first = self._heads == 0 and not self._awaits_first
        return awaits_first or self._in_message or self._has_unread_bytes()

    def _has_unread_bytes(self) -> bool:
        """Return whether the kernel holds what the loop has not come to read yet."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._caller = Caller(cycle)
        cycle.scope[CALLER] = self._caller  # type: ignore[literal-required]
        super()._start_asgi_task(cycle, app)

    def _feed(self, data: bytes) -> None:
        """Parse bytes; a wish for another protocol is ignored, as RFC 9110 allows.

        The parser takes what follows such a head for that protocol, a body too. So the head goes
        to a new parser once more, without the wish, and what followed it comes behind.
        """
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                version = self.parser.get_http_version().encode()
                lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
                lines += [b"%s: %s" % one for one in self.headers if one[0] != b"upgrade"]
                data = b"\r\n".join([*lines, b"", data[upgrade.args[0] :]])
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)

    def _refuse_rest(self) -> None:
        """Answer 400 to bytes that are no HTTP request, where there is room for an answer."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete:
            if self._in_message and cycle is not None and not self._in_head:
                self.transport.close()  # the body of a request that has its answer
            else:
                self._send_400()
        elif self._in_head:
            cycle.keep_alive = False  # what came before gets its answer, and then it is over
        elif self.pipeline:
            self.pipeline.popleft()  # broken in its body before its turn came
            (self.pipeline[0][0] if self.pipeline else self._answering()).keep_alive = False
        elif cycle.response_started:
            self.transport.close()
        else:
            assert self._caller is not None
            self._caller.leave()  # its answer has no place behind this one
            self._send_400()

    def _answering(self) -> RequestResponseCycle:
        assert self._caller is not None
        return self._caller.cycle

    def _send_400(self) -> None:
        """Refuse bytes that are no HTTP request, and close."""
        error = BadRequest("what was sent is no valid HTTP/1.1 request, or its head is over 64 KiB")
        request_id = secrets.token_hex(16)
        fields = {
            "request_id": request_id,
            "status": 400,
            "client": self.client[0] if self.client else None,
            "error": error.code,
        }
        access_log.info("request", extra={"fields": fields})
        body = error_body(error, request_id)
        self.transport.write(
            STATUS_LINE[400]
            + b"content-type: application/json\r\nconnection: close\r\n"
            + b"content-length: %d\r\nx-request-id: %s\r\n\r\n" % (len(body), request_id.encode())
            + body
        )
        self.transport.close()

    def _watch(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        # A connection that rests between two requests is uvicorn's to close.
        is_resting = self.cycle is not None and not self._in_message
        # One that is being closed has yet to take its last reply.
        if (is_answering or is_resting) and not self.transport.is_closing():
            self._stop_watching()
        elif self._patience is None:
            self._patience = self.loop.call_later(self.patience_seconds, self.transport.abort)

    def _unstick(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _stop_watching(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def protocol_class(patience_seconds: float) -> type[PatientProtocol]:
    """Return the protocol with a patience of its own; uvicorn makes the instances."""
    return type("Protocol", (PatientProtocol,), {"patience_seconds": patience_seconds})
