"""`metaserve tune` over real servers: what it writes, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from xml.etree import ElementTree

import pytest

from app.tune.report import Sweep, draw_plot
from app.tune.trial import Configuration, Measured, Slo, Trial
from tests.servers import wait_until

COMMAND = str(Path(sysconfig.get_path("scripts")) / "metaserve")
SHORT = [
    "--try-workers",
    "1",
    "--try-threads",
    "2",
    "--try-max-wait-ms",
    "0",
    "--trial-seconds",
    "0.2",
]
ENV = {
    **{name: text for name, text in os.environ.items() if "METASERVE_" not in name},
    "METASERVE_BACKEND": "fake",
    "METASERVE_FAKE_BATCH_MS": "20",
}


def tune(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [COMMAND, "tune", *SHORT, "--out", str(folder), *arguments]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=120)


def test_the_larger_batch_is_recommended_with_every_measurement(tmp_path: Path) -> None:
    # A batch takes 20 ms whatever its size: 50 a second one by one, 400 by eights.
    done = tune(tmp_path, "--slo", "p99=200ms", "--try-max-batch-size", "1,8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("p99=200ms holds up to ")
    lines = (tmp_path / "metaserve.env").read_text().splitlines()
    settings = dict(line.split("=") for line in lines if not line.startswith("#"))
    assert settings == {
        "METASERVE_WORKERS": "1",
        "METASERVE_THREADS": "2",
        "METASERVE_MAX_BATCH_SIZE": "8",
        "METASERVE_MAX_WAIT_MS": "0",
    }
    figures = json.loads((tmp_path / "tune.json").read_text())
    assert figures["recommended"]["max_batch_size"] == 8
    assert 50 < figures["rate"] <= 480
    by_batch = {one["configuration"]["max_batch_size"]: one for one in figures["configurations"]}
    assert by_batch.keys() == {1, 8}
    assert by_batch[1]["capacity"] < 55
    assert all(one["trials"] for one in by_batch.values())
    page = (tmp_path / "tune.md").read_text()
    assert page.count("\n| 1 | 2 | 8 | 0 |") == len(by_batch[8]["trials"])
    plot = ElementTree.parse(tmp_path / "tune.svg").getroot()
    assert plot.tag == "{http://www.w3.org/2000/svg}svg"
    assert f"{tmp_path / 'tune.svg'}" in done.stderr + done.stdout


def test_a_promise_that_cannot_be_kept_says_so_and_ends_with_1(tmp_path: Path) -> None:
    (tmp_path / "metaserve.env").write_text("METASERVE_WORKERS=9\n")  # of an earlier run
    done = tune(tmp_path, "--slo", "p50=1ms", "--try-max-batch-size", "8")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("p50=1ms cannot be promised here: the best p50 was ")
    assert not (tmp_path / "metaserve.env").exists()
    assert json.loads((tmp_path / "tune.json").read_text())["recommended"] is None


def test_a_service_that_cannot_start_is_one_sentence_and_exit_code_2(tmp_path: Path) -> None:
    arguments = ("--slo", "p99=50ms", "--try-max-batch-size", "8", "--model", "nosuch")
    done = tune(tmp_path / "out", *arguments)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("metaserve: ")
    assert "nosuch" in last
    assert "Traceback" not in done.stderr


def test_a_place_that_cannot_be_written_is_named_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").touch()
    done = tune(tmp_path / "file/out", "--slo", "p99=50ms")
    assert done.returncode == 2
    assert done.stderr.startswith("metaserve: --out ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_no_server_behind_and_keeps_what_was_measured(
    tmp_path: Path, number: signal.Signals
) -> None:
    # The variable marks every process that descends from this run.
    mark = f"tune-{os.getpid()}-{threading.get_native_id()}-{number}"
    (tmp_path / "metaserve.env").write_text("METASERVE_WORKERS=9\n")  # of an earlier run
    command = [COMMAND, "tune", *SHORT, "--slo", "p99=200ms", "--out", str(tmp_path)]
    command += ["--try-max-batch-size", "8,1"]
    process = subprocess.Popen(
        command,
        env={**ENV, "TUNE_TEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        first = process.stderr.readline()  # said at the end of the first configuration
        assert "batch 8" in first
        wait_until(lambda: len(marked(mark)) >= 3, "server and generator run", seconds=60)
        process.send_signal(number)
        shown, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + number
        wait_until(lambda: not marked(mark), f"processes are left: {marked(mark)}")
    finally:
        process.kill()
        process.communicate(timeout=10)
    assert shown == f"written: {tmp_path}/tune.json, {tmp_path}/tune.md\n"
    figures = json.loads((tmp_path / "tune.json").read_text())
    assert figures["ended_early"]
    done, cut = figures["configurations"]
    assert done["trials"]
    assert cut["words"] == "ended early"
    assert "**It was ended early**" in (tmp_path / "tune.md").read_text()
    assert (tmp_path / "metaserve.env").read_text() == "METASERVE_WORKERS=9\n"


def marked(mark: str) -> list[int]:
    """Return the processes that carry a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def test_latency_over_rate_is_drawn(tmp_path: Path) -> None:
    trials = [Trial(10, 10, 1.0, {"p99": 5.0}), Trial(20, 20, 1.0, {"p99": 60.0})]
    measured = [Measured(Configuration(1, 2, 8, 0), 30, trials)]
    assert draw_plot(Sweep(Slo("p99", 50), measured, ""), tmp_path / "plot.svg")
    assert "</svg>" in (tmp_path / "plot.svg").read_text()


def test_without_matplotlib_everything_else_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert not draw_plot(Sweep(Slo("p99", 50), [], ""), tmp_path / "plot.svg")
    assert not (tmp_path / "plot.svg").exists()
