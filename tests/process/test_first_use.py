"""A published checkpoint named to `serve`: fetched, exported by a child process, and served."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import save

from app.cli import main
from app.errors import StartupError
from app.first_use import locate_package, remove_leftovers
from app.settings import Settings
from models.classes import shipped_names
from models.package import open_package
from tests.export.hub_server import COMMIT, Hub, running_hub
from tests.reference import randomise, timm_model
from tests.servers import WAIT_SECONDS, ServiceProcess, service_process, wait_until

NAME = "poolformerv2_s12.sail_in1k"  # the smallest of the catalogue, 48 MB
IMAGE = Path(__file__).parents[2] / "examples/images/china.jpg"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    content = save(randomise(timm_model(NAME), 3).state_dict())
    with running_hub({f"timm/{NAME}": {"model.safetensors": content}}) as running:
        yield running


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    """Return variables with every cache in a folder of the test's own."""
    cache = {"XDG_CACHE_HOME": str(folder / "cache"), "METASERVE_THREADS": "1"}
    return hub.environment(folder / "home") | cache


def started(env: dict[str, str], *args: str, log_format: str = "json") -> tuple[int, list[str]]:
    """Run `metaserve serve` to its end, which is to come; returns exit code and lines."""
    env = env | {"METASERVE_LOG_FORMAT": log_format}
    with service_process(env, ["--model", NAME, *args], wait="nothing") as service:
        code = service.wait_exit()
        wait_until(lambda: bool(service.lines), "the service says why it ended")
    return code, service.lines


@contextmanager
def stalled(hub: Hub) -> Iterator[None]:
    """Have the hub take questions and answer none."""
    hub.stalls = True
    try:
        yield
    finally:
        hub.stalls = False


def sentences(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("metaserve: ")]


def children_of(process: subprocess.Popen[str]) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


@pytest.fixture(scope="module")
def used(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where two services have started at once, and served."""
    folder = tmp_path_factory.mktemp("first use")
    hub.together = threading.Barrier(2)
    env = environment(hub, folder)
    arguments = ["--model", f"timm/{NAME}"]
    with (
        # Two caches of downloads, or the library would have the second wait for the first.
        service_process(env, arguments, wait="nothing") as one,
        service_process(env | {"HF_HOME": str(folder / "other")}, arguments, wait="nothing") as two,
    ):
        replies = []
        for service in (one, two):
            service.wait_ready()
            replies.append(classify(service))
            said = [record["message"] for record in service.records]
            assert f"fetching model.safetensors of timm/{NAME}" in said
            assert "libtorch" not in Path(f"/proc/{service.process.pid}/maps").read_text()
    hub.together = None
    assert replies[0] == replies[1]
    names = shipped_names("imagenet-1k")
    assert names.wordnet_ids is not None
    for found in replies[0]:
        index = int(found["index"])
        assert (found["label"], found["wordnet_id"]) == (
            names.labels[index],
            names.wordnet_ids[index],
        )
    return folder


def classify(service: ServiceProcess) -> list[dict[str, str | int | float]]:
    reply = httpx.post(
        f"{service.url}/classify",
        content=IMAGE.read_bytes(),
        timeout=WAIT_SECONDS,
        trust_env=False,
    )
    assert reply.status_code == 200, reply.text
    predictions: list[dict[str, str | int | float]] = reply.json()["predictions"]
    return predictions


def test_two_services_that_start_at_once_export_one_package_and_serve_it(used: Path) -> None:
    store = used / "cache/metaserve/models"
    assert [path.name for path in store.iterdir()] == [NAME], "something half done was left"
    manifest = open_package(store / NAME).manifest
    assert manifest.name == manifest.variant == NAME
    assert (manifest.source.repository, manifest.source.commit) == (f"timm/{NAME}", COMMIT)
    assert manifest.head_norm_eps == 1e-6


@pytest.mark.parametrize("name", [NAME, f"timm/{NAME}"])
def test_a_package_from_a_first_use_is_found_later_without_a_network(
    used: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(used / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert main(["classify", "--model", name, "--threads", "1", str(IMAGE)]) == 0
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert answer["model"] == NAME
    assert answer["predictions"][0]["wordnet_id"].startswith("n")
    assert captured.err == ""


def test_what_there_is_from_first_uses_is_listed(
    used: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(used / "cache"))
    assert main(["classify", "--model", "caformer", str(IMAGE)]) == 2
    assert f"one of: caformer_digits, {NAME}" in capsys.readouterr().err


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_without_a_network_the_start_ends_in_one_sentence(
    hub: Hub, tmp_path: Path, log_format: str
) -> None:
    env = environment(hub, tmp_path) | {"HF_HUB_OFFLINE": "1"}
    code, lines = started(env, log_format=log_format)
    assert code == 2
    (sentence,) = sentences(lines)
    assert f"model.safetensors of timm/{NAME} cannot be fetched: HF_HUB_OFFLINE is set" in sentence
    place = tmp_path / "cache/metaserve/models" / NAME
    instead = f"`metaserve export {NAME} --checkpoint FILE --labels imagenet-1k --out {place}`"
    assert instead in sentence
    assert "Traceback" not in "".join(lines)


def test_without_the_export_tools_the_start_says_what_to_install(hub: Hub, tmp_path: Path) -> None:
    broken = tmp_path / "path"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('not installed', name='torch')\n")
    path = os.pathsep.join([str(broken), *filter(None, [os.environ.get("PYTHONPATH")])])
    code, lines = started(environment(hub, tmp_path) | {"PYTHONPATH": path})
    assert code == 2
    (sentence,) = sentences(lines)
    assert "cannot be exported on first use: this needs torch; install metaserve[export" in sentence


def test_without_an_exporter_nobody_is_sent_to_look_for_a_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("app.first_use.EXPORTER", ("onnx", "no_such_library"))
    assert main(["classify", "--model", NAME, "--model-store", "/proc", str(IMAGE)]) == 2
    *_, sentence = capsys.readouterr().err.splitlines()
    assert f"there is no package {NAME} yet, and nothing to export it with" in sentence
    assert "(no no_such_library)" in sentence


@pytest.mark.parametrize("place", ["store", "cache"])
def test_a_place_that_cannot_be_written_is_named(
    tmp_path: Path,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ("file" if place == "cache" else "empty")))
    # In /proc not even root can make a directory.
    store = ["--model-store", "/proc"] if place == "store" else []
    assert main(["classify", "--model", NAME, *store, str(IMAGE)]) == 2
    *_, sentence = capsys.readouterr().err.splitlines()
    assert sentence.startswith("metaserve: ")
    assert "set METASERVE_MODEL_STORE to a directory that can be written" in sentence


@contextmanager
def exporting(hub: Hub, folder: Path, store: Path) -> Iterator[tuple[ServiceProcess, int]]:
    """Hold a service in its first use's download; gives it and the pid of its child."""
    store.mkdir()
    env = environment(hub, folder) | {"METASERVE_MODEL_STORE": str(store)}
    before = len(hub.asked)
    with stalled(hub), service_process(env, ["--model", NAME], wait="nothing") as service:
        wait_until(lambda: len(hub.asked) > before, "the child asks the hub", seconds=60)
        (child,) = children_of(service.process)
        yield service, child


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_the_export_ends_it_and_leaves_nothing(
    hub: Hub, tmp_path: Path, sent: signal.Signals, code: int
) -> None:
    store = tmp_path / "store"
    with exporting(hub, tmp_path, store) as (service, child):
        service.process.send_signal(sent)
        assert service.wait_exit(seconds=30) == code
    assert not Path(f"/proc/{child}").exists()
    assert list(store.iterdir()) == []
    assert "Traceback" not in "".join(service.lines)


def test_an_export_that_is_killed_is_reported_with_what_it_needs(hub: Hub, tmp_path: Path) -> None:
    before = len(hub.asked)
    env = environment(hub, tmp_path)
    with stalled(hub), service_process(env, ["--model", NAME], wait="nothing") as service:
        wait_until(lambda: len(hub.asked) > before, "the child asks the hub", seconds=60)
        (child,) = children_of(service.process)
        os.kill(child, signal.SIGKILL)
        assert service.wait_exit(seconds=30) == 2
        wait_until(lambda: bool(sentences(service.lines)), "the service says why it ended")
    (sentence,) = sentences(service.lines)
    assert "was ended by SIGKILL; it needs about 2 GB of memory" in sentence


def test_a_folder_in_the_way_of_imports_is_not_imported(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "app").mkdir()
    (tmp_path / "app/__init__.py").write_text("raise SystemExit('the wrong app')\n")
    command = [sys.executable, "-P", "-m", "app", "classify", "--model", NAME, str(IMAGE)]
    env = os.environ | environment(hub, tmp_path) | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "the wrong app" not in done.stderr
    assert len(sentences(done.stderr.splitlines())) == 1


def test_a_folder_that_is_no_package_is_named_before_anything_is_fetched(tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / NAME).mkdir(parents=True)
    (store / NAME / "thesis.tex").write_text("years of work")
    given: dict[str, Any] = {"model": NAME, "model_store": store}
    with pytest.raises(StartupError, match="is there and is no model package; move it away"):
        locate_package(Settings(**given), lambda line: None, relay=True)
    assert (store / NAME / "thesis.tex").read_text() == "years of work"


def test_a_service_that_is_killed_takes_its_export_with_it(hub: Hub, tmp_path: Path) -> None:
    with exporting(hub, tmp_path, tmp_path / "store") as (service, child):
        service.process.kill()
        wait_until(lambda: not runs(child), "the child ends")


def runs(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_leftovers_of_killed_services_are_removed_once_they_are_old(tmp_path: Path) -> None:
    old, young = tmp_path / ".first_use.old", tmp_path / ".first_use.young"
    for folder in (old, young):
        (folder / "deep").mkdir(parents=True)
    day_before_yesterday = time.time() - 2 * 24 * 3600
    os.utime(old, (day_before_yesterday, day_before_yesterday))
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [young]
