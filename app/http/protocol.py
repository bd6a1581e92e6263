"""uvicorn's h11 protocol, with what it lacks: patience that ends, and 400s in our shape.

h11 bounds a request's head to 64 KiB; httptools has no bound.
"""

from __future__ import annotations

import asyncio
import logging
import secrets

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from app.errors import BadRequest
from app.http.errors import error_body

access_log = logging.getLogger("metaserve.access")


class PatientProtocol(H11Protocol):
    """One connection.

    A caller that is slow to send a request's head, or the rest of a body that was refused, or that
    does not read its reply, is cut off after `patience_seconds`. While a request is being answered,
    `LimitBody` watches its body.
    """

    patience_seconds = 30.0

    _patience: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take bytes; they may complete a request's head, or not."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of this one."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._stop_watching()
        self._unstick()
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
        """Close when the server stops: at once where nothing is under way."""
        super().shutdown()
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that rested; one that never took its last reply is cut off."""
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        """Refuse bytes that are no HTTP request, and close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # an answer is under way or given: there is no room for another
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its answer has no place behind this one
            self.cycle.message_event.set()
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
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (b"x-request-id", request_id.encode()),
        ]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        is_sending = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        # A connection that rests between two requests is uvicorn's to close.
        is_resting = self.cycle is not None and not is_sending
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
