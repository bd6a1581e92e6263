"""Caller: who waits for an answer, as the protocol tells it to the application."""

from __future__ import annotations

import asyncio
import time

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

CALLER = "metaserve.caller"
"""The key in a request's scope."""


class Corked:
    """A transport that holds the head of a reply until its body comes: one system call, not two."""

    __slots__ = ("_cycle", "_head", "_transport")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._head: bytes | None = b""

    def write(self, data: bytes) -> None:
        """Write bytes; the first of a reply wait for the second."""
        if not self._cycle.response_started or self._head is None:  # 100 Continue comes before
            self._transport.write(data)
        elif not self._head:
            self._head = data
        else:
            data = self._head + data
            self._head = None
            self._transport.write(data)

    def flush(self) -> None:
        """Write a head that no body follows."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Close when everything is written."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Return whether nothing more can be written."""
        return self._transport.is_closing()


class Caller:
    """The caller of one request.

    Attributes:
        cycle: uvicorn's side of the request.
        arrived_at: `time.monotonic()` when the request's head was there and its turn had come.
        wire: takes the bytes of the reply.
        task: answers it; cancelled when the caller leaves.
    """

    __slots__ = ("arrived_at", "cycle", "task", "wire")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self.cycle = cycle
        self.arrived_at = time.monotonic()
        self.wire = Corked(cycle)
        cycle.transport = self.wire  # type: ignore[assignment]
        self.task: asyncio.Task[object] | None = None

    @property
    def is_gone(self) -> bool:
        """Whether nobody is left to take an answer."""
        return self.cycle.disconnected

    @property
    def has_sent_all(self) -> bool:
        """Whether the whole body is here; who reads it will not wait."""
        return not self.cycle.more_body

    def leave(self) -> None:
        """Note that the caller left, and end the task that answers it."""
        cycle = self.cycle
        if cycle.response_complete or cycle.disconnected:
            return
        cycle.disconnected = True
        cycle.message_event.set()
        if self.task is not None:
            self.task.cancel()


def caller_of(scope: Scope) -> Caller | None:
    """Return the caller of a request; None where another server than ours runs the application."""
    caller: Caller | None = scope.get(CALLER)
    return caller
