"""Child: one process of the service, started, listened to, and started again when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from app.processes.seat import FAILED, READY, Seat

FIRST_DELAY_SECONDS = 0.5
LONGEST_DELAY_SECONDS = 10.0


class Child:
    """A process that is to run.

    Args:
        seat: what it is told.
        module: that it runs.
        environment: all of its variables.
        descriptors: that it inherits.
    """

    def __init__(
        self, seat: Seat, module: str, environment: Mapping[str, str], descriptors: Sequence[int]
    ) -> None:
        self.seat = seat
        self.due_at = time.monotonic()
        self.report: int | None = None
        self.has_been_ready = False
        self.failure: str | None = None
        self._module = module
        self._environment = environment
        self._descriptors = descriptors
        self._process: subprocess.Popen[bytes] | None = None
        self._ready_at: float | None = None
        self._deaths = 0
        self._unread = b""

    @property
    def name(self) -> str:
        """Its seat's name."""
        return self.seat.name

    @property
    def pid(self) -> int | None:
        """Its process id, None while it does not run."""
        return self._process.pid if self._process else None

    @property
    def is_ready(self) -> bool:
        """Whether it runs and has said that it serves."""
        return self._ready_at is not None

    def start(self) -> int:
        """Start the process; returns its id."""
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        seat = replace(self.seat, report=writing)
        try:
            self._process = subprocess.Popen(
                # -P: a folder `app` or `models` in the working directory is not ours.
                [sys.executable, "-P", "-m", self._module, seat.as_argument()],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                pass_fds=(*self._descriptors, writing),
                start_new_session=True,  # Ctrl-C comes to the supervisor alone
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
        self.report, self.failure, self._unread = reading, None, b""
        return self._process.pid

    def listen(self) -> bool:
        """Take what the process reports; returns whether it has become ready."""
        became_ready = False
        for line in self._lines():
            if line == READY:
                became_ready = self.has_been_ready = True
                self._ready_at = time.monotonic()
            elif line.startswith(FAILED):
                self.failure = line.removeprefix(FAILED)
        return became_ready

    def poll(self) -> int | None:
        """Return the exit code of a process that has just ended, negative for a signal."""
        code = self._process.poll() if self._process else None
        if code is not None:
            self.listen()
            self._process = None
        return code

    def forget(self) -> float:
        """Plan the next start after an end; returns in how many seconds.

        At once after a first death, then later and later while it keeps dying.
        """
        now = time.monotonic()
        if self.report is not None:
            os.close(self.report)
            self.report = None
        if self._ready_at is not None and now - self._ready_at > LONGEST_DELAY_SECONDS:
            self._deaths = 0
        self._ready_at = None
        delay = delay_seconds(self._deaths)
        self._deaths += 1
        self.due_at = now + delay
        return delay

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if the process runs."""
        if self._process is not None:
            self._process.send_signal(number)

    def _lines(self) -> list[str]:
        assert self.report is not None
        try:
            while chunk := os.read(self.report, 4096):
                self._unread += chunk
        except BlockingIOError:
            pass
        *lines, self._unread = self._unread.split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]


def delay_seconds(deaths: int) -> float:
    """Return how long to wait before the next start.

    Args:
        deaths: that went before the last one, without a long life in between.
    """
    if deaths == 0:
        return 0.0
    return min(FIRST_DELAY_SECONDS * 2.0 ** min(deaths - 1, 10), LONGEST_DELAY_SECONDS)


def in_words(code: int) -> str:
    """Say how a process ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
