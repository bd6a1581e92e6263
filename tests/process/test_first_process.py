"""The service as process 1, as it runs in a container: no init, no shell, nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.process.callers import SHAPES, processes_of, send
from tests.required import missing
from tests.servers import ServiceProcess, service_process, wait_until

ALONE = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child")
COMMAND = (*ALONE, sys.executable, "-m", "app")
QUICK = {"METASERVE_BACKEND": "fake", "METASERVE_DRAIN_TIMEOUT_S": "5"}


@pytest.fixture(scope="module", autouse=True)
def _a_namespace_of_its_own() -> None:
    try:
        tried = subprocess.run([*ALONE, "true"], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        missing("there is no unshare here, which makes a process the first of its own")
    if tried.returncode:
        missing(f"no process can be made the first of its own: {tried.stderr.strip()}")


def first_process(service: ServiceProcess) -> int:
    """Return the process id of the service, which is 1 where it runs itself."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    wait_until(lambda: bool(children.read_text()), "unshare has begun the service")
    (pid,) = map(int, children.read_text().split())
    return pid


def hears_sigterm(pid: int) -> bool:
    """Return whether a process has a handler for SIGTERM."""
    (line,) = (
        one for one in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigCgt" in one
    )
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def zombies(parent: int) -> list[int]:
    """Return the children of a process that have ended and that nobody has taken note of."""
    found = []
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state == "Z":
            found.append(int(pid))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_sigterm_ends_the_first_process_with_0(shape: str) -> None:
    with service_process(QUICK | SHAPES[shape], command=COMMAND) as service:
        asked_at = time.monotonic()
        send(first_process(service), signal.SIGTERM)
        assert service.wait_exit() == 0
        assert time.monotonic() - asked_at < 5, "nothing was pending"


@pytest.mark.parametrize("shape", SHAPES)
def test_sigterm_while_the_model_loads_ends_the_first_process_with_0(shape: str) -> None:
    # The fake backend warms up for tens of seconds.
    env = QUICK | SHAPES[shape] | {"METASERVE_FAKE_BATCH_MS": "20000"}
    with service_process(env, command=COMMAND, wait="listening") as service:
        send(first_process(service), signal.SIGTERM)
        assert service.wait_exit(10) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_sigterm_is_heard_before_anything_is_loaded(shape: str) -> None:
    with service_process(QUICK | SHAPES[shape], command=COMMAND, wait="nothing") as service:
        pid = first_process(service)
        wait_until(lambda: hears_sigterm(pid), "it hears SIGTERM")
        send(pid, signal.SIGTERM)
        # As any process that SIGTERM ends, or as the service that it was about to be.
        assert service.wait_exit(10) in (128 + signal.SIGTERM, 0)


@pytest.mark.parametrize("shape", ["own", "shared"])
def test_a_worker_that_dies_leaves_no_zombie_and_no_orphan(shape: str) -> None:
    with service_process(QUICK | SHAPES[shape], command=COMMAND) as service:
        supervisor = first_process(service)
        before = processes_of(supervisor)
        for name in sorted(before):
            send(before[name], signal.SIGKILL)
            service.wait_for_log(f"{name} was ended by SIGKILL")
        wait_until(lambda: len(again(service)) == len(before), "all serve again")
        assert zombies(supervisor) == []
        send(supervisor, signal.SIGTERM)
        assert service.wait_exit() == 0


def test_orphans_that_come_to_the_supervisor_leave_no_zombies() -> None:
    with service_process(QUICK | SHAPES["own"], command=COMMAND) as service:
        supervisor = first_process(service)
        inside = ["nsenter", "--target", str(supervisor), "--pid", "--", "sh", "-c"]
        for _ in range(3):  # a shell ends, what it began is left
            subprocess.run([*inside, "sleep 60 >/dev/null 2>&1 &"], check=True, timeout=30)
        wait_until(lambda: len(orphans(supervisor)) == 3, "they came to process 1")
        for pid in orphans(supervisor):
            os.kill(pid, signal.SIGKILL)

        wait_until(lambda: not orphans(supervisor), "their ends are taken note of")
        assert set(processes_of(supervisor)) == {"worker-0", "worker-1"}


def orphans(supervisor: int) -> list[int]:
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return [int(pid) for pid in children if int(pid) not in processes_of(supervisor).values()]


def again(service: ServiceProcess) -> list[str]:
    return [one["message"] for one in service.records if "serves again" in one["message"]]
