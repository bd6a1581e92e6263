"""A worker in a process of its own, which a test may kill: asks for some images and waits."""

from __future__ import annotations

import asyncio
import sys
import time

from app.engine.shared.board import Board
from app.engine.shared.remote import RemoteEngine
from tests.engine.doubles import FAR_AHEAD, pixels_of
from tests.engine.processes import PACKAGE, until


async def ask(path: str, descriptor: int, count: int) -> None:
    engine = RemoteEngine(path, Board(descriptor, 1), 0, PACKAGE, queue_budget_seconds=FAR_AHEAD)
    await engine.start()
    await until(lambda: engine.is_ready, "there is a host")
    deadline = time.monotonic() + 60
    await asyncio.gather(
        *(engine.infer(pixels_of(value), deadline=deadline) for value in range(count))
    )


if __name__ == "__main__":
    asyncio.run(ask(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
