"""Sends requests by a plan, in one thread on one event loop, as cheaply as it can."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import cycle

from app.bench.alarm import Alarm
from app.bench.connection import Connection
from app.bench.plan import Plan
from app.bench.recording import Recording, is_good

# Below the 5 seconds after which uvicorn closes a connection that rests: sending on one that is
# being closed would look like a reset.
RESTING_SECONDS = 2.0
SWEEP_SECONDS = 0.05
CONNECTS_AT_ONCE = 100

Progress = Callable[[float, int, int], None]
"""Seconds since the start, requests that ended, good ones among them."""


def generate(
    plan: Plan, start_at: float | None = None, progress: Progress | None = None
) -> Recording:
    """Run a plan to its end, or to SIGINT or SIGTERM.

    Args:
        plan: what to send and when.
        start_at: `time.monotonic()` of the run's start, so that several processes agree.
        progress: told about twice a second.
    """
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_Generator(plan, progress).run(start_at))


class _Generator:
    def __init__(self, plan: Plan, progress: Progress | None) -> None:
        self._plan = plan
        self._progress = progress
        self._requests = cycle(plan.requests)
        self._recording = Recording()
        self._resting: deque[Connection] = deque()
        self._busy: set[Connection] = set()
        self._waiting: deque[float] = deque()  # intended starts without a connection
        self._opening = 0
        self._open = 0
        self._connects: set[asyncio.Task[None]] = set()
        self._starts: deque[float] = deque()
        self._closed_loop = not plan.rates
        self._limit = plan.connections if self._closed_loop else plan.max_connections
        self._good = 0
        self._ssl = plan.target.ssl_context()

    async def run(self, start_at: float | None) -> Recording:
        self._loop = asyncio.get_running_loop()
        self._finished = asyncio.Event()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._loop.add_signal_handler(number, self._interrupt)
        if not self._closed_loop:
            self._starts.extend(self._plan.intended_starts())
        self._zero = time.monotonic() if start_at is None else start_at
        self._alarm = Alarm(self._loop, self._send_due)
        await asyncio.sleep(self._zero - time.monotonic())
        cpu = time.process_time()
        if self._closed_loop:
            self._waiting.extend([0.0] * self._limit)
            self._connect_for_waiting()
        else:
            self._send_due()
        self._sweep()
        await self._finished.wait()
        self._alarm.close()
        self._recording.cpu_seconds = time.process_time() - cpu
        self._recording.wall_seconds = self._now()
        self._recording.unfinished = len(self._busy) + len(self._waiting)
        for connection in (*self._busy, *self._resting):
            connection.transport.abort()
        for task in self._connects:
            task.cancel()
        return self._recording

    def _now(self) -> float:
        return time.monotonic() - self._zero

    def _interrupt(self) -> None:
        self._recording.interrupted = True
        self._finished.set()

    # Sending.

    def _send_due(self) -> None:
        """Start every request whose time has come, and wake for the next."""
        starts, now = self._starts, self._now()
        while starts and starts[0] <= now:
            self._start(starts.popleft(), now)
        if starts:
            self._alarm.set(self._zero + starts[0])

    def _start(self, intended: float, now: float) -> None:
        if self._resting:
            # The one that rested least: few connections stay in use when few are needed.
            connection = self._resting.pop()
            self._busy.add(connection)
            connection.send(next(self._requests), intended, now)
        else:
            self._waiting.append(intended)
            self._connect_for_waiting()
            self._recording.held_back += len(self._waiting) > self._opening

    def _connect_for_waiting(self) -> None:
        while (
            self._opening < min(len(self._waiting), CONNECTS_AT_ONCE)
            and self._open + self._opening < self._limit
        ):
            self._opening += 1
            task = self._loop.create_task(self._connect())
            self._connects.add(task)
            task.add_done_callback(self._connects.discard)

    async def _connect(self) -> None:
        target = self._plan.target
        try:
            async with asyncio.timeout(self._plan.timeout_seconds):
                await self._loop.create_connection(
                    lambda: Connection(self), target.host, target.port, ssl=self._ssl
                )
        except OSError:  # TimeoutError is one
            self._opening -= 1
            if self._waiting:
                self._note(self._waiting.popleft(), self._now(), "cannot connect")
                # A closed loop's caller tries again, but not as fast as it can.
                if self._closed_loop:
                    self._loop.call_later(0.1, self._next_of_caller)
            self._check_end()

    def on_ready(self, connection: Connection) -> None:
        """Use a new connection."""
        self._opening -= 1
        self._open += 1
        self._use(connection)

    def _use(self, connection: Connection) -> None:
        if self._waiting:
            self._busy.add(connection)
            connection.send(next(self._requests), self._waiting.popleft(), self._now())
        else:
            connection.resting_since = self._now()
            self._resting.append(connection)

    # Ends of requests.

    def on_reply(
        self, connection: Connection, outcome: str, retry_after: float | None, reusable: bool
    ) -> None:
        """Note a reply and go on."""
        now, intended = self._now(), connection.intended
        assert intended is not None
        connection.intended = None
        self._busy.discard(connection)
        if retry_after is not None and intended >= self._plan.warmup_seconds:
            self._recording.add_retry_after(outcome, retry_after)
        self._note(intended, connection.sent, outcome, now)
        if self._closed_loop:
            self._next_of_caller()
        if reusable:
            self._use(connection)
        else:
            connection.transport.abort()
        self._check_end()

    def on_end(self, connection: Connection, outcome: str) -> None:
        """Note what a closed connection leaves unanswered."""
        self._open -= 1
        if connection.intended is not None:
            intended, connection.intended = connection.intended, None
            self._busy.discard(connection)
            self._note(intended, connection.sent, outcome)
            if self._closed_loop:
                self._next_of_caller()
        else:
            with contextlib.suppress(ValueError):
                self._resting.remove(connection)
        self._connect_for_waiting()
        self._check_end()

    def _next_of_caller(self) -> None:
        """A caller of a closed loop asks again, while the run lasts."""
        now = self._now()
        if now < self._plan.total_seconds and not self._finished.is_set():
            self._waiting.append(now)
            self._loop.call_soon(self._connect_for_waiting)

    def _note(self, intended: float, sent: float, outcome: str, now: float | None = None) -> None:
        self._good += is_good(outcome)
        self._recording.add(intended, sent, self._now() if now is None else now, outcome)

    def _check_end(self) -> None:
        if not (self._starts or self._waiting or self._busy):
            lasts = self._closed_loop and self._now() < self._plan.total_seconds
            if not lasts:
                self._finished.set()

    # Twenty times a second.

    def _sweep(self) -> None:
        if self._finished.is_set():
            return
        now = self._now()
        give_up = now - self._plan.timeout_seconds
        for connection in [one for one in self._busy if (one.intended or now) < give_up]:
            connection.give_up("timeout")
        while self._waiting and self._waiting[0] < give_up:
            self._note(self._waiting.popleft(), now, "timeout")
        while self._resting and self._resting[0].resting_since < now - RESTING_SECONDS:
            self._resting.popleft().transport.close()
        if self._progress is not None:
            self._progress(now, len(self._recording.outcomes), self._good)
        if now >= self._plan.total_seconds:
            self._check_end()
        self._loop.call_later(SWEEP_SECONDS, self._sweep)
