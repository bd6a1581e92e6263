"""The service as a process: its last words at a failed start, and a SIGTERM that loses nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from examples.digits.data import held_out
from tests.process.callers import reconnect_through_sigterm, sample
from tests.servers import EMBEDDED, ServiceProcess, service_process, wait_until

PNG, _ = held_out()[0]
SLOW = {
    "METASERVE_BACKEND": "fake",
    "METASERVE_FAKE_BATCH_MS": "300",
    "METASERVE_MAX_BATCH_SIZE": "4",
}


@contextlib.contextmanager
def refusing_start(env: dict[str, str], *args: str) -> Iterator[tuple[int, str]]:
    """Start a service that cannot start; gives its exit code and its last word."""
    with service_process(env, args, wait="nothing") as service:
        code = service.wait_exit()
        sentences = [line for line in service.lines if line.startswith("metaserve: ")]
        assert len(sentences) == 1, "\n".join(service.lines)
        assert "Traceback" not in "".join(service.lines)
        yield code, sentences[0]


@pytest.mark.parametrize(
    ("env", "args", "says"),
    [
        ({"METASERVE_MODLE": "x"}, (), "no setting METASERVE_MODLE; did you mean METASERVE_MODEL?"),
        ({"METASERVE_PORT": "http"}, (), "METASERVE_PORT='http' cannot be used"),
        ({}, ("--max-batch-size", "0"), "--max-batch-size='0' cannot be used"),
        ({"METASERVE_MODEL": "nosuch"}, (), "one of: caformer_digits"),
        ({"METASERVE_WORKERS": "0"}, (), "METASERVE_WORKERS='0' cannot be used"),
        (
            {"METASERVE_BACKEND": "triton", "METASERVE_TRITON_URL": "127.0.0.1:1"},
            ("--triton-wait-s", "0"),
            "Triton at 127.0.0.1:1 cannot be used",
        ),
        ({"METASERVE_DEVICE": "cuda"}, (), "has no CUDAExecutionProvider"),
        ({"METASERVE_ORT_PROVIDER": "tensorrt"}, (), "has no TensorrtExecutionProvider"),
        ({"METASERVE_BACKEND": "torch", "METASERVE_DEVICE": "cuda"}, (), "torch sees no GPU"),
        ({"METASERVE_API_KEYS_FILE": "/nowhere"}, (), "METASERVE_API_KEYS_FILE /nowhere"),
        ({"METASERVE_HOST": "192.0.2.1"}, (), "no address of this machine"),
    ],
)
def test_what_cannot_start_says_why_in_one_sentence_and_exits_with_2(
    env: dict[str, str], args: tuple[str, ...], says: str
) -> None:
    if env.get("METASERVE_DEVICE") == "cuda" and Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has the GPU whose absence is to be told")
    with refusing_start(env, *args) as (code, sentence):
        assert code == 2
        assert says in sentence


def test_a_busy_port_is_named_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with refusing_start({"METASERVE_PORT": str(port)}) as (code, sentence):
            assert code == 2
            assert f"port {port} is in use" in sentence


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "labels.txt"])
def test_a_damaged_package_stops_the_start_and_is_named(tmp_path: Path, name: str) -> None:
    package = Path(shutil.copytree(EMBEDDED, tmp_path / "package"))
    (package / name).write_bytes(b"damaged")
    with refusing_start({"METASERVE_MODEL": str(package)}) as (code, sentence):
        assert code == 2
        assert f"{name} is not the file the manifest describes" in sentence


def test_served_process_holds_no_torch() -> None:
    with service_process() as service:
        assert httpx.post(f"{service.url}/classify", content=PNG, trust_env=False).is_success
        maps = Path(f"/proc/{service.process.pid}/maps").read_text()
        assert "libonnxruntime" in maps or "onnxruntime_pybind" in maps
        assert "torch" not in maps


def test_sigterm_when_idle_ends_with_0() -> None:
    with service_process() as service:
        service.process.send_signal(signal.SIGTERM)
        assert service.wait_exit() == 0


def test_sigint_ends_at_once_in_spite_of_a_long_drain_delay() -> None:
    with service_process({"METASERVE_DRAIN_DELAY_S": "600"}) as service:
        service.process.send_signal(signal.SIGINT)
        assert service.wait_exit() == 0


def test_a_second_sigterm_skips_the_drain_delay() -> None:
    with service_process({"METASERVE_DRAIN_DELAY_S": "600"}) as service:
        service.process.send_signal(signal.SIGTERM)
        service.wait_for_log("serving for 600 s more")
        service.process.send_signal(signal.SIGTERM)
        assert service.wait_exit() == 0


def test_sigterm_turns_readiness_off_at_once_and_keeps_serving() -> None:
    with service_process({"METASERVE_DRAIN_DELAY_S": "600"}) as service:
        service.process.send_signal(signal.SIGTERM)
        service.wait_for_log("unready")
        with httpx.Client(base_url=service.url, trust_env=False) as client:
            unready = client.get("/readyz")
            assert (unready.status_code, unready.json()["error"]["code"]) == (503, "draining")
            assert client.get("/livez").status_code == 200
            served = client.post("/classify", content=PNG)
            assert served.status_code == 200
            assert served.headers["connection"] == "close"


def test_sigterm_under_load_loses_no_admitted_request() -> None:
    callers = 24
    with service_process({**SLOW, "METASERVE_DRAIN_DELAY_S": "6"}) as service:
        statuses = Load(service, callers).run_through_sigterm()
        assert service.wait_exit() == 0
    # Every caller had one in flight at the signal, sent more while readiness was off, and got a
    # good answer to each.
    assert set(statuses) == {200}
    assert len(statuses) >= 2 * callers
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.url}/livez", trust_env=False)


def test_admitted_requests_are_answered_after_the_port_has_closed() -> None:
    env = {**SLOW, "METASERVE_MAX_BATCH_SIZE": "1", "METASERVE_DRAIN_TIMEOUT_S": "60"}
    with service_process(env) as service, ThreadPoolExecutor(10) as pool:
        calls = [pool.submit(classify, service) for _ in range(10)]
        wait_for_admitted(service, 10)
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not listens(service), "the port closes")
        waiting = [call for call in calls if not call.done()]
        assert len(waiting) >= 4, "the port closed too late to show anything"
        assert {call.result(timeout=60).status_code for call in calls} == {200}
        assert service.wait_exit() == 0


def test_callers_that_reconnect_through_sigterm_are_answered_or_refused() -> None:
    env = {"METASERVE_BACKEND": "fake", "METASERVE_DRAIN_DELAY_S": "0.3"}
    with service_process(env) as service:
        answers = reconnect_through_sigterm(service)
    assert set(answers) <= {"200", "503"}, answers


def classify(service: ServiceProcess) -> httpx.Response:
    return httpx.post(f"{service.url}/classify", content=PNG, timeout=60, trust_env=False)


def listens(service: ServiceProcess) -> bool:
    url = httpx.URL(service.url)
    with socket.socket() as sock:
        return sock.connect_ex((url.host, url.port or 0)) == 0


class Load:
    """Callers that ask again and again until the service says that it is going."""

    def __init__(self, service: ServiceProcess, callers: int) -> None:
        self._service = service
        self._callers = callers
        self._going = threading.Event()
        self._started = threading.Barrier(callers + 1, timeout=60)

    def run_through_sigterm(self) -> list[int]:
        """Return every status that any caller got."""
        with ThreadPoolExecutor(self._callers) as pool:
            calls = [pool.submit(self._call) for _ in range(self._callers)]
            self._started.wait()
            self._service.process.send_signal(signal.SIGTERM)
            self._service.wait_for_log("unready")
            self._going.set()
            return [status for call in calls for status in call.result(timeout=60)]

    def _call(self) -> list[int]:
        statuses = []
        with httpx.Client(base_url=self._service.url, timeout=60, trust_env=False) as client:
            self._started.wait()
            statuses.append(client.post("/classify", content=PNG).status_code)
            assert self._going.wait(60)
            # As a balancer does that has not yet heard of it.
            statuses.append(client.post("/classify", content=PNG).status_code)
        return statuses


def test_what_does_not_finish_in_the_drain_timeout_is_refused_not_dropped() -> None:
    env = {**SLOW, "METASERVE_FAKE_BATCH_MS": "2000", "METASERVE_MAX_BATCH_SIZE": "1"}
    env |= {"METASERVE_DRAIN_TIMEOUT_S": "1", "METASERVE_QUEUE_BUDGET_MS": "100000"}
    env |= {"METASERVE_REQUEST_TIMEOUT_MS": "100000"}
    with service_process(env) as service:
        with ThreadPoolExecutor(6) as pool:
            calls = [pool.submit(classify, service) for _ in range(6)]
            wait_for_queue(service, 5)
            service.process.send_signal(signal.SIGTERM)
            replies = [call.result(timeout=60) for call in calls]
        assert service.wait_exit() == 0
    refused = [reply for reply in replies if reply.status_code == 503]
    assert {reply.json()["error"]["code"] for reply in refused} == {"draining"}
    assert {reply.status_code for reply in replies} <= {200, 503}
    assert len(refused) >= 4


def wait_for_queue(service: ServiceProcess, depth: int) -> None:
    def depth_now() -> float:
        metrics = httpx.get(f"{service.url}/metrics", trust_env=False).text
        (line,) = (one for one in metrics.splitlines() if one.startswith("metaserve_queue_depth "))
        return float(line.split()[1])

    wait_until(lambda: depth_now() >= depth, f"the queue holds {depth} images")


def wait_for_admitted(service: ServiceProcess, count: int) -> None:
    def admitted() -> float:
        text = httpx.get(f"{service.url}/metrics", trust_env=False).text
        answered = sample(
            text, "metaserve_request_duration_seconds_count", route="/classify", status="200"
        )
        waiting = sample(text, "metaserve_queue_depth")
        return answered + waiting + sample(text, "metaserve_inflight_batches")

    wait_until(lambda: admitted() >= count, f"{count} images are admitted, one a batch")


def test_sigterm_while_the_model_loads_ends_with_0() -> None:
    # The fake backend warms up for tens of seconds.
    env = {**SLOW, "METASERVE_FAKE_BATCH_MS": "20000"}
    with service_process(env, wait="listening") as service:
        with httpx.Client(base_url=service.url, trust_env=False) as client:
            for path in ("/readyz", "/startupz", "/models"):
                assert client.get(path).json()["error"]["code"] == "not_ready"
            refused = client.post("/classify", content=PNG)
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert client.get("/livez").status_code == 200
        service.process.send_signal(signal.SIGTERM)
        assert service.wait_exit(10) == 0


def test_sigterm_with_a_caller_stuck_in_its_body_leaves_within_the_timeout() -> None:
    with service_process({"METASERVE_DRAIN_TIMEOUT_S": "1"}) as service:
        url = httpx.URL(service.url)
        with socket.create_connection((url.host, url.port or 0), timeout=20) as stuck:
            stuck.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
            assert httpx.get(f"{service.url}/livez", trust_env=False).is_success
            service.process.send_signal(signal.SIGTERM)
            assert service.wait_exit(30) == 0


def test_a_second_sigint_cuts_a_stuck_caller_off_without_an_error() -> None:
    with service_process() as service:
        url = httpx.URL(service.url)
        with socket.create_connection((url.host, url.port or 0), timeout=20) as stuck:
            stuck.sendall(b"POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
            assert httpx.get(f"{service.url}/livez", trust_env=False).is_success
            service.process.send_signal(signal.SIGINT)
            wait_until(lambda: not listens(service), "the port is closed")
            service.process.send_signal(signal.SIGINT)
            assert service.wait_exit(30) == 0
        assert not [one for one in service.records if one["level"] == "error"]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_too_few_descriptors_end_the_start_in_one_sentence(workers: str) -> None:
    command = [sys.executable, "-m", "app", "serve", "--workers", workers, "--backend", "fake"]
    command = ["sh", "-c", 'ulimit -n 20; exec "$@"', "sh", *command, "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr == (
        "metaserve: only 20 open files are allowed, and every connection is one; "
        "allow at least 64, better thousands (ulimit -n)\n"
    )


def test_log_lines_are_json_and_one_a_request() -> None:
    with service_process() as service:
        with httpx.Client(base_url=service.url, trust_env=False) as client:
            client.post("/classify", content=PNG, headers={"X-Request-ID": "mine"})
            client.get("/livez")
        record = service.wait_for_log("request")
        assert record["request_id"] == "mine"
        assert record["status"] == 200
        service.process.send_signal(signal.SIGTERM)
        service.wait_exit()
        requests = [one for one in service.records if one["message"] == "request"]
        assert [one["path"] for one in requests] == ["/classify"]  # probes are quiet


def test_nothing_is_written_to_the_home_directory_and_nothing_sent_out(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    with service_process({"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}) as service:
        assert classify(service).status_code == 200
        files = sorted(home.rglob("*"))
        # Listening on its port, and talking to this test: no other socket.
        sockets = []
        for one in Path(f"/proc/{service.process.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # it has just been closed
                if one.readlink().name.startswith("socket:"):
                    sockets.append(one)
        service.process.send_signal(signal.SIGTERM)
        assert service.wait_exit() == 0
    assert files == []
    assert len(sockets) <= 5  # the listener, the loop's own pairs, a connection being closed


def test_a_package_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "manifest.json").mkdir()
    with refusing_start({"METASERVE_MODEL": str(tmp_path / "package")}) as (code, sentence):
        assert code == 2
        assert "manifest.json cannot be read" in sentence or "no model package" in sentence


def test_a_log_reader_that_stops_reading_stops_nothing() -> None:
    reading, writing = os.pipe()
    command = [str(Path(sysconfig.get_path("scripts")) / "metaserve"), "serve"]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["--port", str(port), "--log-format", "json", "--drain-delay-s", "0"]
    process = subprocess.Popen([*command, *arguments], stderr=writing)
    os.close(writing)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            wait_until(lambda: answers(client, "/readyz"), "it is ready", seconds=60)
            for _ in range(600):  # several times what a pipe holds
                assert client.get("/nowhere/" + "x" * 200).status_code == 404
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)
        os.close(reading)


def answers(client: httpx.Client, path: str) -> bool:
    try:
        return client.get(path).is_success
    except httpx.TransportError:
        return False
