"""A server in processes of its own: started, waited for until all of them serve, and ended whole.

    start --> "listening on URL" --> "ready" --> the block --> SIGTERM --> drained, or killed
                      read from its log            members: by the TMPDIR in their environment

`/readyz` is not asked: it says 200 as soon as the first of several processes is ready, and what is
measured from then on is measured with less than the whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 300.0
"""How long a model may take to load."""
PATIENCE_SECONDS = 15.0
"""Of a drain: 2 s for what is under way; then a supervisor gives workers and engine 5 s each."""
PAUSE_SECONDS = 0.05

# -P: a folder `app` in the working directory is not ours.
SERVE = (sys.executable, "-P", "-m", "app", "serve")
SERVE_SETTINGS = {
    "METASERVE_HOST": "127.0.0.1",
    "METASERVE_PORT": "0",
    "METASERVE_DRAIN_DELAY_S": "0",
    "METASERVE_DRAIN_TIMEOUT_S": "2",
    # What is waited for is logged as information, and read as JSON.
    "METASERVE_LOG_LEVEL": "info",
    "METASERVE_LOG_FORMAT": "json",
}
"""For `SERVE`: a free port, a log as `OURS` reads it, and no long end."""


class CannotStart(Exception):
    """A server ends instead of getting ready; the message says why."""


@dataclass(frozen=True)
class LogSigns:
    """What a server says of itself.

    Attributes:
        listening: a pattern whose group is the URL.
        ready: a pattern; so often, every process serves.
        times: how often.
    """

    listening: str
    ready: str
    times: int = 1


OURS = LogSigns(r'"message":"listening on (http://[^\s,]+),', r'"message":"ready: ')
"""With several processes the supervisor says the second once all of them are ready."""


@dataclass(frozen=True)
class ServerProcess:
    """A server that serves.

    Attributes:
        url: its base.
        pid: of the process that was started.
        folder: its temporary directory, gone at the end.
    """

    url: str
    pid: int
    folder: Path

    def pids(self) -> list[int]:
        """Return all of its processes that live."""
        return _members(self.folder)


@contextlib.contextmanager
def running_server(
    command: Sequence[str],
    environment: Mapping[str, str],
    signs: LogSigns = OURS,
    patience: float = PATIENCE_SECONDS,
) -> Iterator[ServerProcess]:
    """Run a server until the block ends; no process and no file is left behind.

    Args:
        command: what to run.
        environment: all of its variables; TMPDIR is replaced.
        signs: what its log says.
        patience: seconds for its end, and once more for the end of its orphans.

    Raises:
        CannotStart: it ends instead of getting ready.
    """
    with tempfile.TemporaryDirectory(prefix="served.", ignore_cleanup_errors=True) as name:
        folder, log = Path(name), Path(name) / "log"
        process: subprocess.Popen[bytes] | None = None
        try:
            with log.open("wb") as stderr:
                process = subprocess.Popen(
                    command,
                    env={**environment, "TMPDIR": name},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,  # Ctrl-C is for us
                )
            yield ServerProcess(_wait_ready(process, log, signs), process.pid, folder)
        finally:
            if process is not None:
                _end(process, patience)
            # Workers of ours finish and go once their supervisor is gone. A signal that came while
            # a process was started has left us nothing to wait for.
            _end_members(folder, patience if process is not None else 0.0)


def _wait_ready(process: subprocess.Popen[bytes], log: Path, signs: LogSigns) -> str:
    """Return the URL once every process serves."""
    give_up_at = time.monotonic() + START_SECONDS
    while True:
        has_ended = process.poll() is not None
        text = log.read_text("utf-8", "replace")
        if has_ended:
            raise CannotStart(_last_word(text))
        found = re.search(signs.listening, text)
        if found and len(re.findall(signs.ready, text)) >= signs.times:
            return found[1]
        if time.monotonic() > give_up_at:
            raise CannotStart(f"it is not ready after {START_SECONDS:g} s")
        time.sleep(PAUSE_SECONDS)


def _last_word(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    words = [line.removeprefix("metaserve: ") for line in lines if line.startswith("metaserve: ")]
    return (words or lines or ["it ended without a word"])[-1]


def _end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Let it drain; kill it when that takes too long.

    Its children have sessions of their own: a signal to its group would not reach them.
    """
    process.terminate()
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    finally:  # a second Ctrl-C must not leave it
        process.kill()
        process.wait()


def _end_members(folder: Path, patience: float) -> None:
    """Wait until all are gone, and kill those that take too long."""
    kill_at = time.monotonic() + patience
    while pids := _members(folder):
        if time.monotonic() >= kill_at:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(PAUSE_SECONDS)


def _members(folder: Path) -> list[int]:
    """Return the processes whose temporary directory it is; orphans have no other mark."""
    mark = f"TMPDIR={folder}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # not ours, or gone
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found
