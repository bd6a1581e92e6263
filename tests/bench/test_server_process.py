"""A server that is started for a measurement: whole before it, and gone after it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.bench.server_process import SERVE, SERVE_SETTINGS, CannotStart, LogSigns, running_server
from tests.servers import WAIT_SECONDS, wait_until

TWO = {
    **{name: text for name, text in os.environ.items() if "METASERVE_" not in name},
    **SERVE_SETTINGS,
    "METASERVE_BACKEND": "fake",
    "METASERVE_WORKERS": "2",
}


def test_every_process_takes_connections_from_the_first_moment() -> None:
    with running_server(SERVE, TWO) as server, ExitStack() as stack:
        workers = [pid for pid in server.pids() if pid != server.pid]
        assert len(workers) == 2
        before = [sockets(pid) for pid in workers]
        url = httpx.URL(server.url)
        for _ in range(8):
            address = url.host, url.port or 0
            stack.enter_context(socket.create_connection(address, timeout=WAIT_SECONDS))

        def taken() -> list[int]:
            return [sockets(pid) - old for pid, old in zip(workers, before, strict=True)]

        wait_until(lambda: sum(taken()) >= 8, "all connections are taken")
        assert min(taken()) >= 1, taken()
        folder = server.folder
    assert server.pids() == []
    assert not folder.exists()


def sockets(pid: int) -> int:
    """Return how many sockets a process has open."""
    links = Path(f"/proc/{pid}/fd").iterdir()
    return sum(os.readlink(link).startswith("socket:") for link in links)


def test_it_is_not_ready_before_it_has_said_so_as_often_as_it_must() -> None:
    script = (
        "import sys; say = lambda line: print(line, file=sys.stderr, flush=True)\n"
        "say('running on http://127.0.0.1:1 now'); say('ready'); {more}\n"
        "sys.stdin.read() or {end}"
    )
    signs = LogSigns(r"running on (http://\S+)", "ready", 2)
    once = script.format(more="", end="sys.exit('metaserve: one of two')")
    with (
        pytest.raises(CannotStart, match="one of two"),
        running_server([sys.executable, "-c", once], os.environ, signs),
    ):
        pass
    twice = script.format(more="say('ready')", end="__import__('signal').pause()")
    with running_server([sys.executable, "-c", twice], os.environ, signs) as server:
        assert server.url == "http://127.0.0.1:1"


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_workers_and_files_of_a_lost_supervisor_do_not_outlive_the_block(
    number: signal.Signals,
) -> None:
    with running_server(SERVE, TWO, patience=3.0) as server:
        assert len(server.pids()) == 3
        folder = server.folder
        assert list(folder.glob("metaserve.*")), "the runtime folder is elsewhere"
        # It does not answer SIGTERM any more, or is gone before it comes.
        os.kill(server.pid, number)
    assert server.pids() == []
    assert not folder.exists()


def test_a_signal_while_it_is_started_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            started.append(self)
            raise SystemExit(130)

    monkeypatch.setattr("app.bench.server_process.subprocess.Popen", Interrupted)
    with pytest.raises(SystemExit), running_server(SERVE, TWO):
        pass
    (process,) = started
    assert process.wait(WAIT_SECONDS) == -signal.SIGKILL
