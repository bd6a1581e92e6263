"""LocalEngine: an EngineCore in this process, seen from asyncio."""

from __future__ import annotations

import asyncio
import time

from app.engine.base import EngineStatus
from app.engine.core import EngineCore
from app.engine.window import Request
from app.errors import DeadlineExceeded, ServiceError
from app.types import Pixels, Row


class LocalEngine:
    """Keeps the Engine promise with a core of its own.

    Args:
        core: with its backend warm; closed with the engine.
        close_timeout_seconds: how long `aclose` lets admitted requests finish.
    """

    def __init__(self, core: EngineCore, close_timeout_seconds: float = 1.0) -> None:
        self._core = core
        self._close_timeout_seconds = close_timeout_seconds

    async def infer(self, pixels: Pixels, *, deadline: float) -> Row:
        """Answer one image; see `Engine.infer`. A cancelled call frees its place at once."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Row] = loop.create_future()

        def reply(answer: Row | ServiceError) -> None:
            try:
                loop.call_soon_threadsafe(_settle, future, answer)
            except RuntimeError:  # the loop has closed: nobody is left to answer
                return

        now = time.monotonic()
        request = Request(pixels, deadline, now, reply)
        self._core.submit(request)
        try:
            async with asyncio.timeout(deadline - now):
                return await future
        except TimeoutError:
            self._core.cancel(request)
            raise DeadlineExceeded("the deadline passed before the answer was there") from None
        except asyncio.CancelledError:
            self._core.cancel(request)
            raise

    def check_admission(self, deadline: float, *, ahead_seconds: float = 0.0) -> None:
        """Raise what `infer` would raise now."""
        self._core.check_admission(deadline, ahead_seconds=ahead_seconds)

    def status(self) -> EngineStatus:
        """Return how the engine fares."""
        return self._core.status()

    def refuse_waiting(self) -> None:
        """Answer everything that waits with Draining."""
        self._core.refuse_waiting()

    async def aclose(self) -> None:
        """Refuse new images, answer the admitted ones, stop."""
        await asyncio.to_thread(self._core.close, self._close_timeout_seconds)


def _settle(future: asyncio.Future[Row], answer: Row | ServiceError) -> None:
    if future.done():  # the caller left
        return
    if isinstance(answer, ServiceError):
        future.set_exception(answer)
    else:
        future.set_result(answer)
