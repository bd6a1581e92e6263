"""Servers under measurement: ours and the hand-written one, and what they take."""

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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving_loads import Load, float_graph

ROOT = Path(__file__).parents[1]
START_SECONDS = 120.0


class CannotStart(Exception):
    """A server ended instead of answering; the message says why."""


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        name: in tables.
        url: its base.
        pid: of the process that was started; others descend from it.
    """

    name: str
    url: str
    pid: int

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its processes so far."""
        ticks = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """Return the resident memory of all its processes; pages they share count in each."""
        pages = 0
        for pid in self.pids():
            with contextlib.suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def counts(self) -> tuple[int, int]:
        """Return open descriptors and threads of all its processes."""
        pids = self.pids()
        return tuple(  # type: ignore[return-value]
            sum(len(os.listdir(f"/proc/{pid}/{kind}")) for pid in pids) for kind in ("fd", "task")
        )

    def pids(self) -> list[int]:
        """Return the process and all that descend from it."""
        parents: dict[int, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                parents[int(folder.name)] = int(fields[1])
        found = [self.pid]
        for pid in found:  # grows while it is walked
            found += [child for child, parent in parents.items() if parent == pid]
        return found


@contextlib.contextmanager
def ours(load: Load, mode: str, workers: int, **settings: str) -> Iterator[Server]:
    """Serve a load's package with `metaserve serve`."""
    port = _free_port()
    environment = {
        "METASERVE_MODEL": str(load.package.path),
        "METASERVE_BACKEND": load.backend,
        "METASERVE_DECODE": mode,
        "METASERVE_WORKERS": str(workers),
        "METASERVE_HOST": "127.0.0.1",
        "METASERVE_PORT": str(port),
        **settings,
    }
    command = [sys.executable, "-m", "app", "serve"]
    with _running(f"ours, {mode}, {workers} proc.", command, environment, port) as server:
        yield server


@contextlib.contextmanager
def theirs(load: Load, workers: int) -> Iterator[Server]:
    """Serve a load's network with the hand-written service."""
    port = _free_port()
    environment = {
        "HANDWRITTEN_MODEL": str(float_graph(load)),
        "HANDWRITTEN_INPUT": load.package.manifest.input.model_dump_json(),
    }
    # No access log: ours writes one, the comparison is kind.
    command = [sys.executable, "-m", "uvicorn", "benchmarks.handwritten:app", "--no-access-log"]
    command += ["--workers", str(workers), "--port", str(port)]
    with _running(f"hand-written, {workers} proc.", command, environment, port) as server:
        yield server


@contextlib.contextmanager
def _running(
    name: str, command: list[str], environment: Mapping[str, str], port: int
) -> Iterator[Server]:
    inherited = {key: text for key, text in os.environ.items() if "METASERVE_" not in key}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**inherited, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            start_new_session=True,
        )
        try:
            _wait_ready(process, port, Path(f"/proc/self/fd/{log.fileno()}"))
            yield Server(name, f"http://127.0.0.1:{port}", process.pid)
        finally:
            _end(process)


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    give_up_at = time.monotonic() + START_SECONDS
    while not _is_ready(port):
        if process.poll() is not None or time.monotonic() > give_up_at:
            lines = log.read_text("utf-8", "replace").splitlines()
            raise CannotStart(lines[-1] if lines else "not a word")
        time.sleep(0.1)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
