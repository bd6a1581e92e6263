"""Caller: who waits for an answer, as the protocol tells it to the application."""

from __future__ import annotations

import asyncio

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

CALLER = "metaserve.caller"
"""The key in a request's scope."""


class Caller:
    """The caller of one request.

    Attributes:
        cycle: uvicorn's side of the request.
        task: answers it; cancelled when the caller leaves.
    """

    __slots__ = ("cycle", "task")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self.cycle = cycle
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
