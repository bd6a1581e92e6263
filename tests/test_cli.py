"""The command line without a server, and the exit codes scripts rely on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from app.cli import main
from models.variants import CHECKPOINTS
from tests.servers import EMBEDDED, running_service

IMAGES = Path(__file__).parents[1] / "examples/images"


def test_models_lists_the_embedded_package_and_all_55_checkpoints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert "caformer_digits" in shown
    assert len(CHECKPOINTS) == 55
    for entry in CHECKPOINTS.values():
        assert re.search(rf"^  {entry.name} .* {entry.classes} +{entry.input_size} ", shown, re.M)


@pytest.mark.parametrize("route", ["classify", "embed"])
def test_commands_answer_as_the_routes_do(route: str, capsys: pytest.CaptureFixture[str]) -> None:
    paths = sorted(IMAGES.iterdir())
    assert main([route, *map(str, paths)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    with running_service("onnxruntime") as service:
        replies = [service.client.post(f"/{route}", content=path.read_bytes()) for path in paths]
    served = [reply.json() for reply in replies]
    for one in served:
        del one["timing_ms"]
    assert lines == served


def test_example_images_show_what_their_names_say(capsys: pytest.CaptureFixture[str]) -> None:
    named = sorted(IMAGES.glob("*_*.png"))
    assert len(named) >= 4
    assert main(["classify", "--top-k", "1", *map(str, named)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    best = [line["predictions"][0]["label"] for line in lines]
    assert best == [path.stem.split("_")[1] for path in named]


def test_a_bad_image_among_good_ones_is_named_and_the_others_are_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    good = str(IMAGES / "scan_three.png")
    assert main(["classify", good, str(bad), str(tmp_path / "missing.png"), good]) == 2
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    first, second = captured.err.splitlines()
    assert first.startswith(f"metaserve: {bad}: ")
    assert second.startswith(f"metaserve: {tmp_path / 'missing.png'}: cannot be read: No such file")


@pytest.mark.parametrize("name", ["model.onnx", "golden.npz", "labels.txt"])
def test_a_damaged_package_is_not_answered_from(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    package = Path(shutil.copytree(EMBEDDED, tmp_path / "package"))
    content = bytearray((package / name).read_bytes())
    content[len(content) // 2] ^= 1
    (package / name).write_bytes(content)
    image = str(IMAGES / "scan_three.png")
    assert main(["classify", "--model", str(package), image]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{name} is not the file the manifest describes" in captured.err


@pytest.mark.parametrize("top_k", ["0", "-1", "x"])
def test_top_k_below_one_is_refused(top_k: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["classify", "--top-k", top_k, str(IMAGES / "scan_three.png")])
    assert stopped.value.code == 2
    assert "--top-k" in capsys.readouterr().err


def test_export_without_its_tools_names_what_to_install(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "from app.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    for arguments in (
        ["export", "caformer_s18", "--checkpoint", "x.pth", "--out", str(tmp_path / "out")],
        ["verify", "caformer_digits"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, timeout=60, text=True
        )
        assert done.returncode == 2
        assert done.stderr.startswith("metaserve: this needs torch; install metaserve[export,cpu]")
        assert len(done.stderr.splitlines()) == 1


def test_a_flag_is_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--back", "torch"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --back" in capsys.readouterr().err


def test_installed_command_prints_help_and_survives_a_closed_pipe() -> None:
    command = Path(sysconfig.get_path("scripts")) / "metaserve"
    image = IMAGES / "scan_three.png"
    many = " ".join([str(image)] * 50)
    script = (
        f"{command} --help && {command} models | head -n 1 && {command} embed {many} | head -n 1"
    )
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", script], capture_output=True, timeout=60, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for name in ("serve", "export", "verify", "models", "bench", "tune", "classify", "embed"):
        assert f"\n    {name} " in done.stdout
