"""LocalEngine: an EngineCore in this process, seen from asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import deque
from functools import partial

from app.engine.base import EngineStatus
from app.engine.core import EngineCore
from app.engine.window import Request
from app.errors import DeadlineExceeded, ServiceError
from app.types import Pixels, Row

# Deadlines are looked at this often at most; one is kept within it.
SWEEP_SECONDS = 0.005


class LocalEngine:
    """Keeps the Engine promise with a core of its own.

    Args:
        core: with its backend warm; closed with the engine.
        close_timeout_seconds: how long `aclose` lets admitted requests finish.
    """

    def __init__(self, core: EngineCore, close_timeout_seconds: float = 1.0) -> None:
        self._core = core
        self._close_timeout_seconds = close_timeout_seconds
        self._desk: _Desk | None = None

    async def infer(self, pixels: Pixels, *, deadline: float) -> Row:
        """Answer one image; see `Engine.infer`. A cancelled call frees its place at once."""
        loop, desk = asyncio.get_running_loop(), self._desk
        if desk is None or desk.loop is not loop:
            desk = self._desk = _Desk(loop, self._core)
        return await desk.ask(pixels, deadline)

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


class _Desk:
    """Where one event loop and the core's threads meet.

    What would cost each image a wake-up or a timer costs a turn of the loop, or a batch, one:
    requests of one turn are announced together at its end, answers of one batch wake the loop
    once, and one timer looks after all deadlines.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, core: EngineCore) -> None:
        self.loop = loop
        self._core = core
        # Future of every request that has no answer yet; touched by the loop alone.
        self._asked: dict[asyncio.Future[Row], Request] = {}
        self._is_announcing = False
        self._sweep_at = math.inf
        self._sweep_timer: asyncio.TimerHandle | None = None
        # Filled by the core's threads, emptied by the loop.
        self._answers: deque[tuple[asyncio.Future[Row], Row | ServiceError]] = deque()
        self._is_woken = False

    async def ask(self, pixels: Pixels, deadline: float) -> Row:
        """Answer one image.

        Raises:
            ServiceError: as `Engine.infer`.
        """
        now = time.monotonic()
        future: asyncio.Future[Row] = self.loop.create_future()
        request = Request(pixels, deadline, now, partial(self._take_answer, future), self._wake)
        self._core.submit(request, announce=False)
        if not self._is_announcing:
            self._is_announcing = True
            self.loop.call_soon(self._announce)
        self._asked[future] = request
        if deadline < self._sweep_at:
            self._sweep_after(deadline - now)
        try:
            return await future
        except asyncio.CancelledError:
            self._core.cancel(request)
            raise
        finally:
            self._asked.pop(future, None)

    def _announce(self) -> None:
        self._is_announcing = False
        self._core.announce()

    def _take_answer(self, future: asyncio.Future[Row], answer: Row | ServiceError) -> None:
        """Keep an answer until the loop comes; on an engine thread."""
        self._answers.append((future, answer))

    def _wake(self) -> None:
        """Have the loop come for the answers; on an engine thread.

        The loop says that it is not woken before it looks, so no answer is left lying: whoever
        finds it woken came before that look. Two threads may wake it twice, which does no harm.
        """
        if self._is_woken:
            return
        self._is_woken = True
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to answer
            self.loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        self._is_woken = False
        while self._answers:
            future, answer = self._answers.popleft()
            if future.done():  # the caller left
                continue
            if isinstance(answer, ServiceError):
                future.set_exception(answer)
            else:
                future.set_result(answer)

    def _sweep_after(self, seconds: float) -> None:
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        seconds = max(seconds, 0.0)
        self._sweep_at = time.monotonic() + seconds
        self._sweep_timer = self.loop.call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        """Answer those whose deadline has passed, the core's hanging backend or not."""
        self._sweep_at, self._sweep_timer = math.inf, None
        now, earliest = time.monotonic(), math.inf
        for future, request in self._asked.items():
            if request.deadline > now:
                earliest = min(earliest, request.deadline)
            elif not future.done():
                self._core.cancel(request)
                future.set_exception(
                    DeadlineExceeded("the deadline passed before the answer was there")
                )
        if earliest < math.inf:
            self._sweep_after(max(earliest - now, SWEEP_SECONDS))
