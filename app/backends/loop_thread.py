"""An event loop in a thread of its own, for libraries that speak asyncio to callers that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

T = TypeVar("T")

CLOSE_SECONDS = 5.0


class LoopThread:
    """Runs coroutines for other threads until it is closed.

    Every call ends, one that comes while the loop closes too: calls enter under a lock and never
    after `close`, and the loop goes on until each that entered has its answer.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._lock = threading.Lock()
        self._is_closed = False
        # A daemon: a process that leaves without closing its backend does not hang here.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def call(self, coroutine: Coroutine[Any, Any, T], timeout_seconds: float | None = None) -> T:
        """Run a coroutine to its end, from any other thread; blocks.

        Raises:
            TimeoutError: it took longer; it is cancelled.
            CancelledError: of concurrent.futures; the loop was closed before or meanwhile.
        """
        with self._lock:
            if self._is_closed:
                coroutine.close()
                raise CancelledError("the loop is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result(timeout_seconds)
        finally:
            future.cancel()

    def close(self) -> None:
        """Refuse further calls, cancel what runs and end the thread; again, it only waits."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            self._loop.run_forever()
            # Somebody blocks on each of these: a loop that merely stops would leave them waiting.
            # One that ends may leave another behind.
            while left := self._tasks_left():
                for task in left:
                    task.cancel()
                self._loop.run_until_complete(asyncio.wait(left))
        finally:
            self._loop.close()

    def _tasks_left(self) -> set[asyncio.Task[Any]]:
        # First a turn for those that have ended: their callers have not been told yet.
        self._loop.run_until_complete(asyncio.sleep(0))
        return asyncio.all_tasks(self._loop)
