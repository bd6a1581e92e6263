"""Servers under measurement: ours and the hand-written one, and what they take."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from app.bench.server_process import (
    SERVE,
    SERVE_SETTINGS,
    LogSigns,
    ServerProcess,
    running_server,
)
from benchmarks.serving_loads import Load, float_graph

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        name: in tables.
        process: that serves; others may descend from it.
    """

    name: str
    process: ServerProcess

    @property
    def url(self) -> str:
        """Its base."""
        return self.process.url

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its processes so far."""
        ticks = 0
        for pid in self.process.pids():
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory_mb(self) -> float:
        """Return the resident memory of all its processes; pages they share count in each."""
        pages = 0
        for pid in self.process.pids():
            with contextlib.suppress(OSError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def counts(self) -> tuple[int, int]:
        """Return open descriptors and threads of all its processes."""
        pids = self.process.pids()
        return tuple(  # type: ignore[return-value]
            sum(len(os.listdir(f"/proc/{pid}/{kind}")) for pid in pids) for kind in ("fd", "task")
        )


@contextlib.contextmanager
def ours(load: Load, mode: str, workers: int, **settings: str) -> Iterator[Server]:
    """Serve a load's package with `metaserve serve`."""
    environment = {
        "METASERVE_MODEL": str(load.package.path),
        "METASERVE_BACKEND": load.backend,
        "METASERVE_DECODE": mode,
        "METASERVE_WORKERS": str(workers),
        **SERVE_SETTINGS,
        **settings,
    }
    with running_server(SERVE, _inherited() | environment) as process:
        yield Server(f"ours, {mode}, {workers} proc.", process)


@contextlib.contextmanager
def theirs(load: Load, workers: int) -> Iterator[Server]:
    """Serve a load's network with the hand-written service."""
    environment = {
        "HANDWRITTEN_MODEL": str(float_graph(load)),
        "HANDWRITTEN_INPUT": load.package.manifest.input.model_dump_json(),
    }
    # No access log: ours writes one, the comparison is kind.
    command = [sys.executable, "-m", "uvicorn", "benchmarks.handwritten:app", "--no-access-log"]
    command += ["--workers", str(workers), "--port", "0"]
    signs = LogSigns(r"Uvicorn running on (http://\S+)", "Application startup complete", workers)
    with running_server(command, _inherited() | environment, signs) as process:
        yield Server(f"hand-written, {workers} proc.", process)


def _inherited() -> dict[str, str]:
    """Return this process's variables without settings, and with our folder to import from."""
    kept = {key: text for key, text in os.environ.items() if "METASERVE_" not in key}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path}
