"""A process dies with work pending and does not come back: the others are not to blame."""

from __future__ import annotations

import contextlib
import shutil
import signal
from pathlib import Path

import pytest

from tests.process.callers import Caller, caller_of_each, processes, send
from tests.servers import EMBEDDED, service_process, wait_until

STALL_SECONDS = 0.3


@pytest.mark.parametrize(("engine", "dies"), [("own", "worker-0"), ("shared", "engine")])
def test_liveness_holds_while_the_restart_of_one_that_had_work_fails(
    engine: str, dies: str, tmp_path: Path
) -> None:
    package = Path(shutil.copytree(EMBEDDED, tmp_path / "package"))
    env = {
        "METASERVE_WORKERS": "2",
        "METASERVE_ENGINE": engine,
        "METASERVE_BACKEND": "fake",
        "METASERVE_FAKE_BATCH_MS": "50",
        "METASERVE_MAX_BATCH_SIZE": "4",
        "METASERVE_STALL_SECONDS": str(STALL_SECONDS),
        "METASERVE_MODEL": str(package),
    }
    with service_process(env) as service, caller_of_each(service) as callers:
        prober = callers["worker-1"]
        callers["worker-0"].send_images(60)  # fifteen batches
        wait_until(lambda: prober.metric("metaserve_queue_depth") > 0, "images wait")
        (package / "labels.txt").rename(tmp_path / "labels.txt")
        send(processes(service)[dies], signal.SIGKILL)

        seen: list[int] = []
        wait_until(
            # The third end: 0.5 s at least, and two starts, after the first.
            lambda: any("starting it again in 1 s" in one["message"] for one in service.records),
            "the restart has failed twice",
            seconds=60,
            between=lambda: seen.append(prober.get("/livez")[0]),
        )
        assert set(seen) == {200}, f"{seen.count(503)} of {len(seen)} probes failed"

        (tmp_path / "labels.txt").rename(package / "labels.txt")
        service.wait_for_log(f"{dies} serves again")
        with contextlib.closing(Caller(service)) as caller:
            wait_until(lambda: caller.classify()[0] == 200, "it answers again")
