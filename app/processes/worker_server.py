"""WorkerServer: the HTTP server of one process among several."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace

from starlette.types import ASGIApp

from app.engine.base import EngineStatus
from app.engine.shared.board import Board
from app.http.state import ServiceState
from app.metrics import with_wait
from app.processes.acceptor import Acceptor, lead_beyond_chance
from app.processes.roster import Roster
from app.processes.seat import Seat
from app.server import Server

log = logging.getLogger("metaserve.server")

# Beyond the drain timeout, when nobody is left to kill this process.
GRACE_SECONDS = 5.0


class WorkerServer(Server):
    """A `Server` that shares its port, publishes how it fares, and goes when the supervisor goes.

    Args:
        app: the application.
        state: of this process.
        seat: its place among the processes.
        board: where all of them publish how they fare.
        roster: where all of them count their connections.
        on_start: run once the loop turns.
    """

    def __init__(
        self,
        app: ASGIApp,
        state: ServiceState,
        seat: Seat,
        board: Board,
        roster: Roster,
        on_start: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(app, state)
        self._seat = seat
        self._board = board
        self._roster = roster
        self._on_start = on_start
        self._acceptor: Acceptor | None = None
        self._starting: asyncio.Future[None] | None = None
        self._has_reported = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept from the shared port, in turn with the other processes."""
        await super().startup(sockets=[])
        assert sockets is not None
        (listener,) = sockets
        listener.setblocking(False)
        self._acceptor = Acceptor(
            listener, self.new_protocol, self._may_accept, self._lead, self._count_connections
        )
        asyncio.get_running_loop().add_reader(self._seat.life, self._outlive_supervisor)
        if self._on_start is not None:
            self._starting = asyncio.ensure_future(self._on_start())

    async def on_tick(self, counter: int) -> bool:
        """Publish how this process fares, and that it is ready; called ten times a second."""
        self.publish()
        if self._acceptor is not None:
            self._count_connections()
            self._acceptor.update()
        if self.state.loaded is not None and not self._has_reported:
            self._has_reported = True
            self._seat.report_ready()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve the callers that were let in, cease to accept, then as any server."""
        if self._acceptor is not None:
            await self._acceptor.close()
        if self._starting is not None:
            self._starting.cancel()
        beating = asyncio.create_task(self._beat())  # the drain may take long: keep publishing
        await super().shutdown()
        beating.cancel()

    def publish(self) -> None:
        """Write this process's row of the board."""
        loaded = self.state.loaded
        if loaded is None:
            return
        status = with_wait(loaded.engine.status(), self.state.pool.wait_seconds())
        if self._seat.shares_engine:  # what waits there is in the engine's own row
            status = _without_queue(status)
        self._board.publish(
            self._seat.row, status, ready=loaded.is_connected(), draining=self.state.draining
        )

    def _may_accept(self) -> bool:
        """Tell whether callers should come here: not while another process is ready and we not."""
        if self.state.loaded is not None and self.state.loaded.is_connected():
            return True
        return not self._others_ready()

    def _lead(self) -> int:
        """Return how far this process is ahead of one that could take the next connection."""
        counts = [self._roster.connections(row) for row in self._others_ready()]
        return lead_beyond_chance(self._connections(), min(counts)) if counts else 0

    def _others_ready(self) -> list[int]:
        """Return the other workers that are ready, and not stuck since."""
        rows = (row for row in range(self._seat.workers) if row != self._seat.row)
        return [row for row in rows if self._board.answers(row)]

    def _connections(self) -> int:
        arriving = self._acceptor.arriving if self._acceptor else 0
        return len(self.server_state.connections) + arriving

    def _count_connections(self) -> None:
        self._roster.count_connections(self._seat.row, self._connections())

    def _outlive_supervisor(self) -> None:
        """Finish what was admitted and go: nobody would start or end this process any more."""
        asyncio.get_running_loop().remove_reader(self._seat.life)
        log.error("the supervisor is gone: stopping")
        self.state.draining = True
        self.stop_without_delay()
        patience = self.state.settings.drain_timeout_s + GRACE_SECONDS
        last = threading.Timer(patience, os._exit, (1,))
        last.daemon = True
        last.start()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(0.1)
            self.publish()


def _without_queue(status: EngineStatus) -> EngineStatus:
    return replace(status, queue_depth=0, in_flight=0, running_batches=0)
