"""Engines of other processes: hosts in threads and children, and what tests see of them."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.assemble import WarmCore
from app.engine.base import Profile
from app.engine.core import EngineCore
from app.engine.shared.board import Board
from app.engine.shared.host import EngineHost
from app.engine.shared.remote import RemoteEngine
from app.engine.timing import ServiceTimes
from app.engine.window import BatchWindow
from tests.engine.doubles import FAR_AHEAD, PATIENCE_SECONDS, WatchedBackend

MAX_BATCH_SIZE = 4
PACKAGE = "what all of them serve"


@dataclass
class Place:
    """Where host and workers of one service meet; outlives every host, as a supervisor's does."""

    path: str
    listener: socket.socket
    board: Board
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def remote(self, **options: Any) -> RemoteEngine:
        options.setdefault("queue_budget_seconds", FAR_AHEAD)
        return RemoteEngine(self.path, self.board, 0, PACKAGE, **options)

    def start_host(
        self, *, holds: bool = False, batch_seconds: float = 0.0
    ) -> subprocess.Popen[bytes]:
        """Start a host in a process of its own; `holds` keeps its batches from ending."""
        descriptors = self.listener.fileno(), self.board.descriptor
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.host_process"]
            + [str(number) for number in (*descriptors, int(holds), batch_seconds)],
            pass_fds=descriptors,
            cwd=Path(__file__).parents[2],
        )
        self.children.append(child)
        return child

    def start_worker(self, *, asks: int) -> subprocess.Popen[bytes]:
        """Start a worker in a process of its own, which asks for images and waits for them."""
        board = str(self.board.descriptor)
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.worker_process", self.path, board, str(asks)],
            pass_fds=[self.board.descriptor],
            cwd=Path(__file__).parents[2],
        )
        self.children.append(child)
        return child

    def in_flight(self) -> int:
        return self.board.read(0).in_flight


@contextmanager
def meeting_place() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as directory:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = f"{directory}/engine"
        listener.bind(path)
        listener.listen(64)
        place = Place(path, listener, Board.create(1))
        try:
            yield place
        finally:
            for child in place.children:
                child.kill()
                child.wait(PATIENCE_SECONDS)
            place.board.close()
            place.listener.close()


def warm(
    core: EngineCore, backend: WatchedBackend, batch_seconds: dict[int, float] | None = None
) -> WarmCore:
    lanes = backend.info.batches_in_flight
    return WarmCore(core, backend.info, None, Profile(batch_seconds or {}, MAX_BATCH_SIZE, lanes))


@contextmanager
def hosted(
    place: Place,
    core: EngineCore,
    backend: WatchedBackend,
    batch_seconds: dict[int, float] | None = None,
) -> Iterator[EngineHost]:
    """A host at work in a thread of this process; stopped at the end, when its thread is gone."""
    host = EngineHost(
        warm(core, backend, batch_seconds),
        place.listener,
        place.board,
        0,
        PACKAGE,
        PATIENCE_SECONDS,
    )
    thread = threading.Thread(target=host.serve, name="host")
    thread.start()
    try:
        yield host
    finally:
        backend.gate.set()
        host.stop()
        thread.join(2 * PATIENCE_SECONDS)
        assert not thread.is_alive(), "the host did not stop"


@asynccontextmanager
async def connected(place: Place, **options: Any) -> AsyncIterator[RemoteEngine]:
    """A RemoteEngine with a host; disconnected at the end."""
    engine = place.remote(**options)
    await engine.start()
    try:
        await until(lambda: engine.is_ready, "there is a host")
        yield engine
    finally:
        await engine.aclose()


async def until(is_so: Callable[[], bool], what: str) -> None:
    """Wait until something that is seen from outside only has come about."""
    for _ in _waits(is_so, what):
        await asyncio.sleep(0.001)


def eventually(is_so: Callable[[], bool], what: str) -> None:
    """Do the same where no loop runs."""
    for _ in _waits(is_so, what):
        time.sleep(0.001)


def _waits(is_so: Callable[[], bool], what: str) -> Iterator[None]:
    give_up_at = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < give_up_at, f"it did not come about that {what}"
        yield


def serve_in_this_process() -> None:
    """Be a host: listener, board, whether to hold batches, seconds of a batch."""
    listener_fd, board_fd, holds, seconds = sys.argv[1:]
    backend = WatchedBackend(shut=bool(int(holds)))
    times = ServiceTimes()
    core = EngineCore(backend, BatchWindow(MAX_BATCH_SIZE), times, FAR_AHEAD)
    known = {1: float(seconds)} if float(seconds) else {}
    listener = socket.socket(fileno=int(listener_fd))
    board = Board(int(board_fd), 1)
    EngineHost(warm(core, backend, known), listener, board, 0, PACKAGE).serve()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def slot_maps() -> int:
    """Count the slot memories that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("metaserve-slots")
