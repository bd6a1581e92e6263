"""Several processes are one service: connections, metrics, probes, deaths and ends."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from models.package import MANIFEST
from tests.process.callers import (
    Caller,
    Load,
    caller_of_each,
    lives,
    processes,
    reconnect_through_sigterm,
    sample,
    send,
)
from tests.servers import EMBEDDED, ServiceProcess, service_process, wait_until

PAIR = {
    "METASERVE_WORKERS": "2",
    "METASERVE_BACKEND": "fake",
    "METASERVE_FAKE_BATCH_MS": "20",
    "METASERVE_MAX_BATCH_SIZE": "4",
    "METASERVE_STALL_SECONDS": "0.5",
}
SHAPES = {"own": {"METASERVE_ENGINE": "own"}, "shared": {"METASERVE_ENGINE": "shared"}}
WORKERS = {"worker-0", "worker-1"}


@pytest.fixture(scope="module", params=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def service(shape: str) -> Iterator[ServiceProcess]:
    with service_process(PAIR | SHAPES[shape]) as service:
        yield service


@contextlib.contextmanager
def everybody_back(service: ServiceProcess) -> Iterator[None]:
    """Wait at the end until all processes that there were are there, and ready, again."""
    before = processes(service)
    said = len(again(service))
    yield
    wait_until(lambda: len(again(service)) > said, "a process serves again")
    wait_until(lambda: set(processes(service)) == set(before), "all processes are back")


def again(service: ServiceProcess) -> list[str]:
    return [one["message"] for one in service.records if "serves again" in one["message"]]


def test_the_shape_has_the_processes_it_should(service: ServiceProcess, shape: str) -> None:
    expected = WORKERS | ({"engine"} if shape == "shared" else set())
    assert set(processes(service)) == expected


def test_connections_that_are_opened_at_once_are_shared_out(service: ServiceProcess) -> None:
    callers = [Caller(service) for _ in range(32)]

    names = [caller.served_by() for caller in callers]

    for caller in callers:
        caller.close()
    # Half each, where the machine is not too busy to wake both.
    assert min(names.count(name) for name in WORKERS) >= 4, names


def test_metrics_are_whole_whichever_process_is_asked(service: ServiceProcess) -> None:
    served = "metaserve_request_duration_seconds_count"
    with caller_of_each(service) as callers:
        first, second = callers.values()
        before = first.metric(served, route="/classify", status="200")
        images = first.metric("metaserve_batch_size_sum")
        for caller in (first, first, second):
            assert caller.classify()[0] == 200

        for caller in (first, second):

            def counts(caller: Caller = caller) -> tuple[float, float]:
                requests = caller.metric(served, route="/classify", status="200")
                return requests, caller.metric("metaserve_batch_size_sum")

            # A reply may be here before the process that sent it has counted it.
            wait_until(lambda: counts() == (before + 3, images + 3), "all three are counted")
            assert caller.metric("metaserve_model_info") == 1
            assert caller.metric("metaserve_processes", role="worker") == 2
            assert caller.metric("metaserve_processes") == 1 + len(processes(service))
            assert caller.metric("metaserve_ready") == 1
            # Each process publishes its gauges ten times a second.
            wait_until(partial(queue_is_empty, caller), "nothing waits")
    text = httpx.get(f"{service.url}/metrics", trust_env=False).text
    assert 'metaserve_requests_refused_total{reason="not_ready"} 0.0' in text


def queue_is_empty(caller: Caller) -> bool:
    return caller.metric("metaserve_queue_depth") == 0


def test_process_metrics_are_sums(service: ServiceProcess) -> None:
    pids = [*processes(service).values(), service.process.pid]
    with contextlib.closing(Caller(service)) as caller:
        size = caller.metric("process_resident_memory_bytes")

    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    assert size == pytest.approx(sum(pages) * 4096, rel=0.1)


def test_a_killed_worker_costs_its_own_connections_and_nothing_else(
    service: ServiceProcess,
) -> None:
    served = "metaserve_request_duration_seconds_count"
    with caller_of_each(service) as callers, Load(service, threads=6) as load:
        before = callers["worker-1"].metric(served, route="/classify")
        restarts = callers["worker-1"].metric("metaserve_process_restarts_total")
        with everybody_back(service):
            send(processes(service)["worker-0"], signal.SIGKILL)
            load.wait_for_more(100)
        load.wait_for_more(100)

        after = callers["worker-1"].metric(served, route="/classify")
        assert callers["worker-1"].metric("metaserve_process_restarts_total") == restarts + 1
    assert after >= before + 200, "counters went back"
    assert set(load.answers) <= {"200", "reset"}, load.answers
    assert load.answers["reset"] <= 6, load.answers
    ended = service.wait_for_log("worker-0 was ended by SIGKILL")
    assert "starting it again in 0 s" in ended["message"]


def test_a_process_that_is_started_again_takes_over_what_was_measured(
    service: ServiceProcess, shape: str
) -> None:
    with caller_of_each(service) as callers:
        before = [caller.get("/models")[1] for caller in callers.values()]
    with everybody_back(service):
        send(processes(service)["engine" if shape == "shared" else "worker-0"], signal.SIGKILL)
    with caller_of_each(service) as callers:
        after = [caller.get("/models")[1] for caller in callers.values()]

    # Two measurements never agree to the microsecond.
    assert len(before) == len(after) == 2
    assert all(one == before[0] for one in before + after)


def test_counters_of_cpu_time_do_not_go_back_when_a_process_dies(
    service: ServiceProcess,
) -> None:
    with caller_of_each(service) as callers:
        before = callers["worker-1"].metric("process_cpu_seconds_total")
        with everybody_back(service):
            send(processes(service)["worker-0"], signal.SIGKILL)
            service.wait_for_log("worker-0 was ended")
            assert callers["worker-1"].metric("process_cpu_seconds_total") >= before


def test_an_engine_that_stops_is_seen_by_liveness_wherever_it_is_asked(
    service: ServiceProcess, shape: str
) -> None:
    with caller_of_each(service) as callers:
        owner = processes(service)["engine" if shape == "shared" else "worker-0"]
        callers["worker-0"].send_images(30)  # eight batches at least
        wait_until(lambda: callers["worker-1"].metric("metaserve_queue_depth") > 0, "images wait")

        send(owner, signal.SIGSTOP)
        try:
            wait_until(lambda: callers["worker-1"].get("/livez")[0] == 503, "liveness fails")
            _, body = callers["worker-1"].get("/livez")
            assert callers["worker-1"].metric("metaserve_stalled_seconds") > 0.5
            assert callers["worker-1"].metric("metaserve_ready") == 1
        finally:
            send(owner, signal.SIGCONT)

        assert body["error"]["code"] == "backend_unavailable"
        assert callers["worker-0"].answer()[0] == 200
        wait_until(lambda: callers["worker-1"].get("/livez")[0] == 200, "liveness is back")


# Where each worker has its own engine, the worker's death is the engine's.
@pytest.mark.parametrize("shape", ["shared"], indirect=True, scope="module")
def test_a_killed_engine_is_answered_for_and_comes_back(service: ServiceProcess) -> None:
    with Load(service, threads=6) as load, contextlib.closing(Caller(service)) as prober:
        with everybody_back(service):
            send(processes(service)["engine"], signal.SIGKILL)
            wait_until(lambda: prober.get("/readyz")[0] == 503, "readiness goes off")
            wait_until(lambda: prober.metric("metaserve_ready") == 0, "the gauge follows")
            assert prober.get("/livez")[0] == 200
        load.wait_for_more(20)
        wait_until(lambda: prober.get("/readyz")[0] == 200, "it is ready again")
        wait_until(lambda: prober.metric("metaserve_ready") == 1, "the gauge follows")
    assert set(load.answers) <= {"200", "503 backend_unavailable"}, load.answers


def test_sigterm_drains_every_process_and_leaves_nothing(shape: str, tmp_path: Path) -> None:
    env = PAIR | SHAPES[shape] | {"METASERVE_DRAIN_DELAY_S": "600", "TMPDIR": str(tmp_path)}
    with service_process(env) as service:
        pids = processes(service)
        (folder,) = tmp_path.glob("metaserve.*")
        assert folder.stat().st_mode & 0o777 == 0o700
        with caller_of_each(service) as callers:
            service.process.send_signal(signal.SIGTERM)
            for caller in callers.values():
                wait_until(lambda c=caller: c.get("/readyz")[0] == 503, "it is unready")  # type: ignore[misc]
                wait_until(lambda c=caller: c.metric("metaserve_ready") == 0, "the gauge follows")  # type: ignore[misc]
            with contextlib.closing(Caller(service)) as late:
                assert late.classify()[0] == 200, "nobody serves during the drain delay"
            service.process.send_signal(signal.SIGTERM)
            assert service.wait_exit() == 0
    assert not any(lives(pid) for pid in pids.values())
    assert list(tmp_path.glob("metaserve.*")) == []
    ends = [one["process"] for one in service.records if one["message"] == "stopped"
            and "process" in one]  # fmt: skip
    assert set(ends) == WORKERS


def test_callers_that_reconnect_through_sigterm_are_answered_or_refused(shape: str) -> None:
    env = PAIR | SHAPES[shape] | {"METASERVE_DRAIN_DELAY_S": "0.3"}
    with service_process(env) as service:
        answers = reconnect_through_sigterm(service)
    assert set(answers) <= {"200", "503"}, answers


def test_requests_in_flight_are_answered_when_the_supervisor_is_killed(shape: str) -> None:
    env = PAIR | SHAPES[shape] | {"METASERVE_FAKE_BATCH_MS": "100"}
    with service_process(env) as service:
        pids = processes(service)
        with caller_of_each(service) as callers, contextlib.closing(Caller(service)) as prober:
            for caller in callers.values():
                caller.send_images(30)
            # A request hands in eight of its images at a time: more than one waits.
            wait_until(lambda: prober.metric("metaserve_queue_depth") >= 8, "both wait")
            send(service.process.pid, signal.SIGKILL)
            for caller in callers.values():
                status, body = caller.answer()
                assert status == 200
                assert all("predictions" in result for result in body["results"])
        wait_until(lambda: not any(lives(pid) for pid in pids.values()), "all processes have ended")
        url = httpx.URL(service.url)
        with socket.create_server((url.host, url.port or 0)):
            pass  # the port is free
        said = [one["message"] for one in service.records]
        assert not any("SIGTERM" in message for message in said), "nobody sent one"


def test_a_start_that_fails_in_every_process_is_said_once(shape: str, tmp_path: Path) -> None:
    package = Path(shutil.copytree(EMBEDDED, tmp_path / "package"))
    (package / "model.onnx").write_bytes(b"damaged")
    env = PAIR | SHAPES[shape] | {"METASERVE_MODEL": str(package)}
    with service_process(env, wait="nothing") as service:
        assert service.wait_exit() == 2
    sentences = [line for line in service.lines if line.startswith("metaserve: ")]
    assert len(sentences) == 1, "\n".join(service.lines)
    assert "model.onnx is not the file the manifest describes" in sentences[0]
    assert "Traceback" not in "".join(service.lines)


def test_a_restart_that_fails_is_tried_again_while_the_others_serve(tmp_path: Path) -> None:
    package = Path(shutil.copytree(EMBEDDED, tmp_path / "package"))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    env = PAIR | {"METASERVE_MODEL": str(package), "METASERVE_METRICS_PORT": str(port)}
    with service_process(env) as service:
        (package / "labels.txt").rename(tmp_path / "labels.txt")
        send(processes(service)["worker-0"], signal.SIGKILL)
        service.wait_for_log("starting it again in 0.5 s")
        with contextlib.closing(Caller(service)) as caller:
            assert caller.served_by() == "worker-1"
            assert caller.get("/readyz")[0] == 200
        (tmp_path / "labels.txt").rename(package / "labels.txt")
        service.wait_for_log("worker-0 serves again")

        # The supervisor's port for metrics shows them all.
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        assert sample(text, "metaserve_process_restarts_total", role="worker") >= 2
        assert sample(text, "metaserve_processes", role="worker") == 2
        assert sample(text, "metaserve_request_duration_seconds_count", status="200") >= 1
        service.process.send_signal(signal.SIGINT)
        assert service.wait_exit() == 0


def test_a_package_that_is_replaced_while_it_is_served_is_not_mixed_with_it(
    shape: str, tmp_path: Path
) -> None:
    package = Path(shutil.copytree(EMBEDDED, tmp_path / "package"))
    manifest = package / MANIFEST
    old = manifest.read_text()
    env = PAIR | SHAPES[shape] | {"METASERVE_MODEL": str(package)}
    with service_process(env) as service, caller_of_each(service) as callers:
        killed = set(processes(service)) - {"worker-1"}
        manifest.write_text(json.dumps(json.loads(old) | {"version": "next"}))
        for name in killed:
            send(processes(service)[name], signal.SIGKILL)
            service.wait_for_log(f"{name} ended with exit code 2: {package} holds another package")
        said = service.wait_for_log("restart the service to serve it")["message"]
        assert "(caformer_digits next)" in said
        status, body = callers["worker-1"].classify()
        if shape == "own":
            assert (status, body["version"]) == (200, json.loads(old)["version"])
        else:
            assert (status, body["error"]["code"]) == (503, "backend_unavailable")

        manifest.write_text(old)
        for name in killed:
            service.wait_for_log(f"{name} serves again")
        wait_until(lambda: callers["worker-1"].classify()[0] == 200, "it is whole again")


def test_a_wedged_backend_is_seen_by_liveness_in_a_process_without_a_backend() -> None:
    slow = {"METASERVE_FAKE_BATCH_MS": "700", "METASERVE_MAX_BATCH_SIZE": "1"}
    env = PAIR | SHAPES["shared"] | slow | {"METASERVE_STALL_SECONDS": "0.2"}
    with service_process(env) as service, caller_of_each(service) as callers:
        callers["worker-0"].send_images(1)
        wait_until(lambda: callers["worker-1"].get("/livez")[0] == 503, "liveness fails")
        assert callers["worker-0"].answer()[0] == 200
        wait_until(lambda: callers["worker-1"].get("/livez")[0] == 200, "liveness is back")


def test_sigterm_while_the_models_load_ends_with_0(shape: str) -> None:
    # The fake backend warms up for tens of seconds.
    env = PAIR | SHAPES[shape] | {"METASERVE_FAKE_BATCH_MS": "20000"}
    with service_process(env, wait="listening") as service:
        with contextlib.closing(Caller(service)) as caller:
            assert caller.get("/readyz")[1]["error"]["code"] == "not_ready"
            assert caller.classify()[0] == 503
        pids = processes(service)
        service.process.send_signal(signal.SIGTERM)
        assert service.wait_exit(20) == 0
    assert not any(lives(pid) for pid in pids.values())


def test_processes_that_do_not_end_are_killed_within_one_limit() -> None:
    env = PAIR | SHAPES["shared"] | {"METASERVE_DRAIN_TIMEOUT_S": "0"}
    with service_process(env) as service:
        pids = processes(service)
        send(pids["worker-0"], signal.SIGSTOP)
        send(pids["engine"], signal.SIGSTOP)
        asked_at = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        service.wait_for_log("worker-0 does not end: killing it")
        service.wait_for_log("engine does not end: killing it")
        assert service.wait_exit(30) == 0
        assert "".join(service.lines).count("does not end: killing it") == 2
        # The five seconds that the docs promise, and some for a busy machine.
        assert time.monotonic() - asked_at < 8
    assert not any(lives(pid) for pid in pids.values())
