"""The built image, run for real: confined, healthy, ended by a signal, and small."""

from __future__ import annotations

import json
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.image.conftest import ENGINE
from tests.servers import wait_until

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
IMAGE = f"metaserve:{VERSION}"
EXPORT = f"{IMAGE}-export"
IMAGES = {
    IMAGE: {"onnxruntime", "tritonclient", "cykooz_resizer"},
    f"{IMAGE}-gpu": {"onnxruntime", "tritonclient", "cykooz_resizer", "torch"},
    EXPORT: {"onnxruntime", "tritonclient", "torch", "onnx", "onnxscript", "huggingface_hub"},
}
"""Each with the libraries that tell it from the others."""
BASE = "docker.io/library/python:3.11-slim-bookworm"
MB = 1_000_000
CONFINED = (
    "--read-only",
    "--tmpfs=/tmp",
    "--cap-drop=ALL",
    "--security-opt=no-new-privileges",
    "--memory=1g",
)


def engine(*arguments: str, check: bool = True) -> str:
    """Run the container engine; return what it prints."""
    done = subprocess.run(
        [*ENGINE.split(), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stdout.strip()


def inspect(name: str) -> Any:
    return json.loads(engine("inspect", name))[0]


class Container:
    """A container of the image, which is removed at the end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = int(inspect(name)["State"]["Pid"])
        address = engine("port", name, "8000/tcp").splitlines()[0]
        self.client = httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=20)

    def get(self, path: str) -> int:
        try:
            return self.client.get(path).status_code
        except httpx.TransportError:
            return 0

    def classify(self, image: str) -> Any:
        body = (ROOT / "examples/images" / image).read_bytes()
        return self.client.post("/classify", content=body).json()

    def stop(self) -> int:
        """Stop it as an engine does; return its exit code."""
        engine("stop", "--time", "45", self.name)
        return int(inspect(self.name)["State"]["ExitCode"])


@contextmanager
def container(*options: str, command: tuple[str, ...] = ()) -> Iterator[Container]:
    name = engine("run", "--detach", "--publish=127.0.0.1::8000", *options, IMAGE, *command)
    try:
        running = Container(name)
        with running.client:
            wait_until(lambda: running.get("/readyz") == 200, "it is ready", seconds=60)
            yield running
    finally:
        engine("rm", "--force", name, check=False)


@pytest.fixture(scope="module")
def confined() -> Iterator[Container]:
    with container(*CONFINED) as running:
        yield running


def test_it_answers_a_sample_from_a_read_only_root(confined: Container) -> None:
    assert confined.classify("scan_three.png")["predictions"][0]["label"] == "three"
    assert confined.get("/metrics") == 200
    assert confined.get("/docs") == 200


def test_the_service_is_process_1_of_a_user_without_rights(confined: Container) -> None:
    status = Path(f"/proc/{confined.pid}/status").read_text()
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert fields["NSpid"].split()[-1] == "1"
    assert set(fields["Uid"].split()) == {"10001"}
    assert set(fields["Gid"].split()) == {"10001"}
    assert int(fields["CapEff"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    argv = Path(f"/proc/{confined.pid}/cmdline").read_bytes().split(b"\0")
    assert argv[1].endswith(b"/metaserve"), argv


def test_its_root_cannot_be_written(confined: Container) -> None:
    mounts = Path(f"/proc/{confined.pid}/mountinfo").read_text().splitlines()
    (root,) = (line.split() for line in mounts if line.split()[4] == "/")
    assert "ro" in root[5].split(",")


def test_it_stops_on_sigterm_with_0(confined: Container) -> None:
    with container(*CONFINED, "--env=METASERVE_DRAIN_DELAY_S=1") as other:
        assert other.classify("scan_three.png")["predictions"]
        assert other.stop() == 0


def test_several_workers_serve_and_stop_there_too() -> None:
    with container(*CONFINED, "--env=METASERVE_WORKERS=2") as running:
        assert running.classify("scan_three.png")["predictions"][0]["label"] == "three"
        assert running.stop() == 0


def test_a_setting_that_cannot_be_met_ends_it_with_2() -> None:
    name = engine("run", "--detach", *CONFINED, "--env=METASERVE_MODEL=nosuch", IMAGE)
    try:
        assert engine("wait", name) == "2"
        done = subprocess.run([*ENGINE.split(), "logs", name], capture_output=True, text=True)
        assert "one of: caformer_digits" in done.stdout + done.stderr
    finally:
        engine("rm", "--force", name, check=False)


def probe(*options: str) -> subprocess.CompletedProcess[str]:
    """Run what HEALTHCHECK runs, in a container of its own."""
    run = ("run", "--rm", *CONFINED, *options, "--entrypoint=python3", IMAGE, "-m", "app.probe")
    return subprocess.run([*ENGINE.split(), *run], capture_output=True, text=True, timeout=60)


def test_the_probe_of_its_health_check_tells_ready_from_not(confined: Container) -> None:
    image = inspect(IMAGE)  # podman has it outside of the configuration, docker within
    assert (image | image["Config"])["Healthcheck"]["Test"][-1] == "app.probe"
    done = probe(f"--network=container:{confined.name}")
    assert done.returncode == 0, done.stderr
    done = probe()  # nobody listens there
    assert done.returncode == 1
    said = [line for line in done.stderr.splitlines() if line.startswith("metaserve: ")]
    assert len(said) == 1, done.stderr


def run_python(image: str, program: str, python: str = "python3") -> str:
    return engine("run", "--rm", f"--entrypoint={python}", *CONFINED, image, "-c", program)


def test_it_is_small() -> None:
    size, base = inspect(IMAGE)["Size"], inspect(BASE)["Size"]
    print(f"{IMAGE}: {size / MB:.0f} MB, {(size - base) / MB:.0f} MB beyond its base")
    assert size - base < 400 * MB


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_holds_nothing_to_build_or_install_with(image: str) -> None:
    tools = "import shutil; print([n for n in ('pip', 'pip3', 'gcc', 'cc', 'g++', 'make', 'ld') "
    assert run_python(image, tools + "if shutil.which(n)])") == "[]"
    modules = (
        "import importlib.util as u; print([n for n in ('pip', 'ensurepip') if u.find_spec(n)])"
    )
    for python in "python3", run_python(image, "import sys; print(sys._base_executable)"):
        assert run_python(image, modules, python) == "[]", python


@pytest.mark.parametrize(("image", "has"), IMAGES.items())
def test_an_image_has_what_it_is_for(image: str, has: set[str]) -> None:
    config = inspect(image)["Config"]
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.version"] == VERSION
    look = "import importlib.util as u; print(*[n for n in {} if u.find_spec(n)])"
    names = sorted(set().union(*IMAGES.values(), {"app.probe"}))
    found = run_python(image, look.format(names)).split()
    assert set(found) == has | {"app.probe"}


def test_the_image_that_exports_exports() -> None:
    said = engine("run", "--rm", *CONFINED, EXPORT, "export", "--help")
    assert "--checkpoint" in said
