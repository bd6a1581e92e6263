"""`python -m app.probe`, as a container's health check runs it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app import probe
from app.settings import Settings
from tests.servers import RunningService, running_service, service_process

ROOT = Path(__file__).parents[1]


def run_probe(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the probe with METASERVE_ variables."""
    others = {name: value for name, value in os.environ.items() if "METASERVE_" not in name}
    return subprocess.run(
        [sys.executable, "-m", "app.probe", *arguments],
        env=others | {f"METASERVE_{name}": value for name, value in variables.items()},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )


def port_of(url: str) -> str:
    return str(httpx.URL(url).port)


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service() as running:
        yield running


@pytest.mark.parametrize("host", ["", "127.0.0.1", "0.0.0.0", "localhost"])
def test_a_ready_service_is_healthy_and_nothing_is_said(service: RunningService, host: str) -> None:
    done = run_probe(PORT=port_of(service.url), HOST=host)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_draining_service_is_unready_and_alive(service: RunningService) -> None:
    service.state.draining = True
    try:
        unready = run_probe(PORT=port_of(service.url))
        alive = run_probe("/livez", PORT=port_of(service.url))
    finally:
        service.state.draining = False
    assert unready.returncode == 1
    (sentence,) = unready.stderr.splitlines()
    assert "/readyz" in sentence
    assert "503" in sentence
    assert "the service is stopping" in sentence
    assert alive.returncode == 0


@pytest.mark.parametrize("host", ["::1", "::"])
def test_a_service_on_ipv6_is_reached(host: str) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with running_service(host=host) as service:
        assert run_probe(PORT=port_of(service.url), HOST=host).returncode == 0


def test_several_processes_with_keys_are_probed_without_one(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n")
    env = {"METASERVE_WORKERS": "2", "METASERVE_BACKEND": "fake", "METASERVE_HOST": "0.0.0.0"}
    with service_process(env | {"METASERVE_API_KEYS_FILE": str(keys)}) as service:
        done = run_probe(PORT=port_of(service.url), HOST="0.0.0.0")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("variables", "says"),
    [({"PORT": "http"}, "port http"), ({"PORT": "99999"}, "99999"), ({"HOST": "not.a.host"}, "")],
)
def test_what_cannot_be_asked_is_unhealthy_in_one_sentence(
    variables: dict[str, str], says: str
) -> None:
    done = run_probe(**variables)
    assert done.returncode == 1
    (sentence,) = done.stderr.splitlines()
    assert sentence.startswith("metaserve: /readyz on ")
    assert says in sentence


def test_a_port_that_nobody_listens_on_is_unhealthy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = run_probe(PORT=str(port))
    assert done.returncode == 1
    assert "Connection refused" in done.stderr


def test_a_service_that_says_nothing_is_unhealthy_before_docker_gives_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe, "TIMEOUT_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("METASERVE_HOST", "127.0.0.1")
        monkeypatch.setenv("METASERVE_PORT", str(silent.getsockname()[1]))
        assert probe.main([]) == 1
    assert "timed out" in capsys.readouterr().err


def test_a_server_that_is_none_is_unhealthy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def hang_up() -> None:
            connection, _ = other.accept()
            connection.recv(65536)
            connection.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        monkeypatch.setenv("METASERVE_PORT", str(other.getsockname()[1]))
        assert probe.main(["/livez"]) == 1
        thread.join(10)
    assert "/livez on 127.0.0.1" in capsys.readouterr().err


def test_the_probe_looks_where_the_service_listens_by_default() -> None:
    fields = Settings.model_fields
    assert fields["host"].default == probe.HOST
    assert str(fields["port"].default) == probe.PORT


def test_the_probe_loads_nothing_that_is_slow_to_start() -> None:
    # What an editable install has imported before counts for nothing here.
    script = "import sys; before = set(sys.modules); import app.probe\n"
    script += "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    loaded = set(done.stdout.split())
    assert "app" in loaded, done.stderr
    assert loaded <= {"app"} | sys.stdlib_module_names, "only the standard library"
    assert not loaded & {"asyncio", "email", "http", "json", "logging", "ssl", "urllib"}
