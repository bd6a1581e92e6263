"""A real `metaserve serve` on a free port, under the load generator."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from app.bench.plan import Plan, parse_url
from app.bench.recording import summarise
from app.bench.run import measure
from app.tune.search import CannotServe, OutOfTime
from app.tune.trial import Configuration, Trial, trial_of

START_SECONDS = 300.0
"""How long a model may take to load."""

FEWEST_CALLERS = 32
FEWEST_REQUESTS = 200
"""Of a trial: its p99 is then the second worst or better."""

# Of the user's own that must not reach a trial: ports, and keys that the generator does not have.
_NOT_INHERITED = {"METASERVE_METRICS_PORT", "METASERVE_API_KEYS_FILE"}


@dataclass(frozen=True)
class LoadedService:
    """A service that is ready, and the load for it.

    Attributes:
        plan: requests and target; rates and times are filled in.
        callers: of the closed loop; enough to fill one batch while another runs.
        seconds: of a trial, at least.
        until: `time.monotonic()` at which nothing new begins.
    """

    plan: Plan
    callers: int
    seconds: float
    until: float

    def capacity(self) -> float:
        """Return good replies per second of a closed loop."""
        plan = replace(self.plan, connections=self.callers, seconds=self.seconds)
        return self._run(plan).goodput

    def try_rate(self, rate: float) -> Trial:
        """Put an open loop on it, for long enough to tell a percentile."""
        seconds = min(max(self.seconds, FEWEST_REQUESTS / rate), 5 * self.seconds)
        return self._run(replace(self.plan, rates=(rate,), seconds=seconds))

    def _run(self, plan: Plan) -> Trial:
        if time.monotonic() > self.until:
            raise OutOfTime
        recording = measure(plan)
        if recording.interrupted:
            raise KeyboardInterrupt
        (phase,) = summarise(recording, plan).phases
        return trial_of(phase)


@contextlib.contextmanager
def serving(
    configuration: Configuration, requests: tuple[bytes, ...], *, seconds: float, until: float
) -> Iterator[LoadedService]:
    """Serve a configuration until the block ends; no process is left behind.

    Args:
        configuration: the settings; the others are the environment's.
        requests: built for any port: the Host header is not looked at.
        seconds: of a trial.
        until: `time.monotonic()` at which nothing new begins.

    Raises:
        CannotServe: it ends instead of getting ready.
        OutOfTime: it is too late to begin.
    """
    if time.monotonic() > until:
        raise OutOfTime
    port = _free_port()
    kept = {name: text for name, text in os.environ.items() if name not in _NOT_INHERITED}
    own = {"METASERVE_HOST": "127.0.0.1", "METASERVE_PORT": str(port)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", "serve"],
            env=kept | own | configuration.variables(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            # A group of its own: Ctrl-C is for us, and its workers end with it.
            start_new_session=True,
        )
        try:
            _wait_ready(process, port, Path(f"/proc/self/fd/{log.fileno()}"))
            target = parse_url(f"http://127.0.0.1:{port}", "classify")
            plan = Plan(target, requests, warmup_seconds=0.5, timeout_seconds=10.0)
            callers = max(FEWEST_CALLERS, 3 * configuration.max_batch_size * configuration.workers)
            yield LoadedService(plan, callers, seconds, until)
        finally:
            _end(process)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while not _is_ready(port):
        if process.poll() is not None:
            raise CannotServe(_last_word(log))
        if time.monotonic() > give_up_at:
            raise CannotServe(f"it is not ready after {START_SECONDS:g} s")
        time.sleep(0.05)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_word(log: Path) -> str:
    lines = log.read_text("utf-8", "replace").splitlines()
    words = [line.removeprefix("metaserve: ") for line in lines if line.startswith("metaserve: ")]
    return words[-1] if words else "it ended without a word"


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to end, then make it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(5)
