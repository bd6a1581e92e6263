"""RemoteEngine: the engine's promise, kept by another process.

infer --> Call --> a free slot --> SUBMIT ... DONE --> the caller's future
                       |
  the host dies: --> kept --> once more on the next host --> the caller's future
                       |
         no time, no host, or the second time: backend_unavailable
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
import random
import time
from collections.abc import Callable

from app.engine.admission import check_deadline, check_wait
from app.engine.base import EngineStatus
from app.engine.shared.board import Board
from app.engine.shared.link import Call, Link, connect
from app.engine.shared.wire import Greeting, WireError
from app.errors import (
    DRAINING,
    BackendUnavailable,
    DeadlineExceeded,
    Draining,
    ServiceError,
)
from app.types import Pixels, Row

log = logging.getLogger("metaserve.engine")

AWAY = "the engine process is away and will be back; send the request again"
# Somebody who comes back sooner would mostly find it loading still.
RETRY_AFTER_SECONDS = 2.0
# The first try after a host's end finds the supervisor's socket, which a next host takes over.
FIRST_PAUSE_SECONDS = 0.02
LONGEST_PAUSE_SECONDS = 0.5
DISCONNECT_SECONDS = 1.0


class RemoteEngine:
    """Keeps the Engine promise through an `EngineHost`; belongs to one event loop.

    Args:
        path: of the host's listening unix socket, which outlives any one host.
        board: where the host publishes its status.
        row: of the engine on the board.
        package: the key of what the host must serve.
        on_greeting: told what each host says of itself, before it is sent anything.
        queue_budget_seconds: longest predicted wait at which an image is handed over.
        close_timeout_seconds: how long `aclose` lets admitted requests finish.
        patience_seconds: how long the requests of a host that died wait for the next one.
    """

    def __init__(
        self,
        path: str,
        board: Board,
        row: int,
        package: str,
        *,
        on_greeting: Callable[[Greeting], None] = lambda _: None,
        queue_budget_seconds: float,
        close_timeout_seconds: float = 1.0,
        patience_seconds: float = 10.0,
    ) -> None:
        self._path = path
        self._board = board
        self._row = row
        self._package = package
        self._on_greeting = on_greeting
        self._queue_budget_seconds = queue_budget_seconds
        self._close_timeout_seconds = close_timeout_seconds
        self._patience_seconds = patience_seconds
        self._ids = itertools.count(1)
        self._link: Link | None = None
        self._kept: dict[int, Call] = {}
        self._closing = False
        self._drained = asyncio.Event()
        self._connecting: asyncio.Task[None] | None = None
        self._lingering: asyncio.Task[None] | None = None
        self._failure: str | None = None

    async def start(self) -> None:
        """Connect in the background, and again whenever the host is gone."""
        self._connecting = asyncio.create_task(self._stay_connected(), name="engine-link")

    @property
    def is_ready(self) -> bool:
        """Whether a host answers now."""
        return self._link is not None and self._link.is_open and not self._closing

    async def infer(self, pixels: Pixels, *, deadline: float) -> Row:
        """Answer one image; see `Engine.infer`. A cancelled call frees its place at once.

        Raises:
            ValueError: the pixels have another shape or type than the backend takes.
            Refused: also when there is no host, or it died and no other came in time.
        """
        now = time.monotonic()
        link = self._link_for(deadline, now)
        future: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        call = Call(next(self._ids), pixels, deadline, now, future)
        if not link.hand_over(call):
            self._check_wait(link, deadline - now, is_full=True)  # raises
        try:
            async with asyncio.timeout(deadline - now):
                return await future
        except TimeoutError:
            if call.id in self._kept:
                self._leave(call)
                raise _away() from None
            self._leave(call)
            raise DeadlineExceeded("the deadline passed before the answer was there") from None
        except asyncio.CancelledError:
            self._leave(call)
            raise

    def check_admission(self, deadline: float, *, ahead_seconds: float = 0.0) -> None:
        """Raise what `infer` would raise now, as far as the board tells.

        The board is some milliseconds old; the core itself decides again on each image.
        """
        now = time.monotonic()
        link = self._link_for(deadline, now)
        self._check_wait(link, deadline - now, ahead_seconds, is_full=link.pool.is_full)

    def status(self) -> EngineStatus:
        """Return how the engine fares, which the host's silence is part of."""
        link = self._link
        if link is None:
            # It refuses and does not stall; what it had is on the board until somebody wipes it.
            return EngineStatus(len(self._kept), 0, 0, 0.0, 0.0, self._failure)
        status = self._board.read(self._row)
        if not link.calls:
            return status
        # A host that is stopped while idle promised nothing on the board; these calls know better.
        silence = self._board.age_seconds(self._row)
        unanswered = min(time.monotonic() - link.progress_at, silence)
        return dataclasses.replace(status, stalled_seconds=max(status.stalled_seconds, unanswered))

    def refuse_waiting(self) -> None:
        """Answer everything of this process that waits with Draining."""
        if self._link is not None:
            self._link.refuse_waiting()
        self._settle_kept(list(self._kept.values()), lambda: Draining(DRAINING))

    async def aclose(self) -> None:
        """Refuse new images, answer the admitted ones, disconnect.

        After the timeout what waits is refused; the connection stays for what runs in a batch.
        """
        self._closing = True
        self._note_answers()
        try:
            async with asyncio.timeout(self._close_timeout_seconds):
                await self._drained.wait()
        except TimeoutError:
            self.refuse_waiting()
            if self._lingering is None:
                self._lingering = asyncio.create_task(self._linger(), name="engine-linger")
            return
        await self._disconnect()

    def _link_for(self, deadline: float, now: float) -> Link:
        """Return what a request is handed to, or raise why it cannot be."""
        if self._closing:
            raise Draining(DRAINING)
        link = self._link
        if link is None or not link.is_open:
            raise _away()
        check_deadline(deadline - now)
        return link

    def _check_wait(
        self, link: Link, time_left: float, ahead_seconds: float = 0.0, *, is_full: bool
    ) -> None:
        status = self._board.read(self._row)
        is_pending = bool(status.queue_depth or status.in_flight or link.calls)
        check_wait(
            ahead_seconds + status.predicted_wait_seconds,
            budget_seconds=self._queue_budget_seconds,
            time_left_seconds=time_left,
            own_seconds=_one_batch(link) if is_pending else 0.0,
            waiting=max(status.queue_depth, len(link.calls) if is_full else 0),
            is_full=is_full,
        )

    def _leave(self, call: Call) -> None:
        """Forget a call that nobody waits for."""
        self._kept.pop(call.id, None)
        if call.future.done() and not call.future.cancelled():
            call.future.exception()  # it came in the moment its caller left: nobody reads it
        if self._link is not None:
            self._link.cancel(call)
        self._note_answers()

    def _note_answers(self) -> None:
        """Look after every change whether the link is lost, and whether all is answered."""
        link = self._link
        if link is not None and link.lost.done():
            self._link = None
            self._keep(link)
        if self._closing and not self._kept and not (self._link and self._link.is_awaited):
            self._drained.set()

    async def _stay_connected(self) -> None:
        pause = FIRST_PAUSE_SECONDS
        while True:
            link: Link | None = None
            try:
                link = await connect(
                    self._path, self._package, self._queue_budget_seconds, self._note_answers
                )
                self._begin(link)
                pause = FIRST_PAUSE_SECONDS
                await asyncio.shield(link.lost)
                self._note_failure("it closed the connection")
            except (OSError, WireError) as error:
                self._note_failure(str(error))
            except Exception as error:  # a fault of ours: it must not be the last try
                log.exception("connecting to the engine process hit a fault of ours")
                self._note_failure(repr(error))
                if link is not None:
                    link.abort()
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _begin(self, link: Link) -> None:
        """Use a link, first of all for what an earlier host left unanswered."""
        if not link.is_open:  # lost already
            return
        self._on_greeting(link.greeting)
        self._link = link
        self._failure = None
        log.info("connected to the engine process, with %d slots", link.pool.count)
        for call in list(self._kept.values()):
            can_go = link.takes(call.pixels) and self._has_time(call, link)
            if not can_go or not link.hand_over(call):
                call.settle(_away())
            call.retried = True
            del self._kept[call.id]

    def _keep(self, link: Link) -> None:
        """Keep a lost link's calls for the next host, those that can wait for it."""
        calls = [call for call in link.calls.values() if not call.future.done()]
        link.calls.clear()
        kept = []
        for call in calls:
            if not call.retried and self._has_time(call, link):
                kept.append(call)
            else:
                call.settle(_away())
        self._kept |= {call.id: call for call in kept}
        if not self._closing or calls:
            refused = len(calls) - len(kept)
            log.warning(
                "the engine process is gone; of %d requests %d wait for the next, %d are refused",
                *(len(calls), len(kept), refused),
            )
        if kept:
            asyncio.get_running_loop().call_later(
                self._patience_seconds, self._settle_kept, kept, _away
            )

    def _settle_kept(self, calls: list[Call], error: Callable[[], ServiceError]) -> None:
        for call in calls:
            if self._kept.pop(call.id, None) is not None:
                call.settle(error())
        self._note_answers()

    def _has_time(self, call: Call, link: Link) -> bool:
        return call.deadline - time.monotonic() > _one_batch(link)

    def _note_failure(self, words: str) -> None:
        if words != self._failure:
            log.warning("no connection to the engine process: %s", words)
        self._failure = words

    async def _linger(self) -> None:
        try:
            await self._drained.wait()
        finally:
            await self._disconnect()

    async def _disconnect(self) -> None:
        connecting, self._connecting = self._connecting, None
        if connecting is not None:
            connecting.cancel()
            await asyncio.wait((connecting,))
        if self._link is not None:
            await self._link.close(DISCONNECT_SECONDS)


def _one_batch(link: Link) -> float:
    seconds = link.greeting.profile.batch_seconds
    return seconds[min(seconds)] if seconds else 0.0


def _away() -> BackendUnavailable:
    return BackendUnavailable(AWAY, RETRY_AFTER_SECONDS)
