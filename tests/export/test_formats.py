"""`metaserve export --format`: an engine or a Triton model from a name, a file or a package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

import export.plan
from app.cli import main
from models.package import open_package
from tests.required import require
from tests.servers import EMBEDDED


def run(*arguments: str | Path) -> int:
    return main(["export", *map(str, arguments)])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build with tensorrt_rtx, which needs no GPU."""
    builder = require("tensorrt_rtx")
    monkeypatch.setattr(export.plan, "load_builder", lambda: builder)


@pytest.mark.usefixtures("stand_in")
def test_an_engine_is_added_to_a_package_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "with_engine"
    assert run(EMBEDDED, "--format", "tensorrt", "--out", out, "--max-batch-size", "4") == 0
    package = open_package(out)
    package.check_files()
    assert package.manifest.plan is not None
    assert package.manifest.plan.max_batch_size == 4
    assert package.manifest.files.keys() - open_package(EMBEDDED).manifest.files.keys() == {
        "model.plan"
    }
    assert "metaserve verify --backends tensorrt" in capsys.readouterr().out


@pytest.mark.usefixtures("stand_in")
def test_an_engine_is_built_from_a_checkpoint_in_one_command(tmp_path: Path) -> None:
    out, cache = tmp_path / "new", tmp_path / "cache"
    weights = EMBEDDED / "weights.safetensors"
    arguments = ("--checkpoint", weights, "--precision", "fp16", "--engine-cache", cache)
    code = run("caformer_digits", *arguments, "--format", "tensorrt", "--out", out)
    assert code == 0
    manifest = open_package(out).manifest
    assert manifest.plan is not None
    assert manifest.plan.precision == manifest.precision == "fp16"
    assert [path.suffix for path in cache.iterdir() if path.suffix == ".plan"] == [".plan"]


@pytest.mark.usefixtures("stand_in")
def test_a_package_keeps_its_place_unless_overwriting_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package = Path(shutil.copytree(EMBEDDED, tmp_path / "digits"))
    arguments = (package, "--format", "tensorrt", "--out", package)
    assert run(*arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert open_package(package).manifest.plan is None
    assert run(*arguments, "--overwrite") == 0
    assert open_package(package).manifest.plan is not None


def test_without_a_gpu_an_engine_is_refused_before_anything_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    weights = EMBEDDED / "weights.safetensors"
    out = tmp_path / "new"
    arguments = ("--checkpoint", weights, "--format", "tensorrt", "--out", out)
    assert run("caformer_digits", *arguments) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "TensorRT builds an engine on the GPU it is for" in sentence
    assert list(tmp_path.iterdir()) == []


def test_a_triton_model_is_written_from_a_package_and_from_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "repository"
    assert run(EMBEDDED, "--format", "triton", "--out", root) == 0
    weights = EMBEDDED / "weights.safetensors"
    again = ("--checkpoint", weights, "--name", "second", "--max-batch-size", "4")
    assert run("caformer_digits", *again, "--format", "triton", "--out", root) == 0
    assert sorted(path.name for path in root.iterdir()) == ["caformer_digits", "second"]
    for name in ("caformer_digits", "second"):
        open_package(root / name / "1").check_files()
        assert f'name: "{name}"' in (root / name / "config.pbtxt").read_text()
    assert "max_batch_size: 4\n" in (root / "second/config.pbtxt").read_text()
    shown = capsys.readouterr().out
    assert f"--model-repository={root}" in shown
    assert f"--triton-model second --model {root / 'second' / '1'}" in shown


def test_a_triton_model_that_is_there_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (EMBEDDED, "--format", "triton", "--out", tmp_path)
    assert run(*arguments) == 0
    config = tmp_path / "caformer_digits/config.pbtxt"
    config.write_text("mine")
    assert run(*arguments) == 2
    assert "exists already" in capsys.readouterr().err
    assert config.read_text() == "mine"
    assert run(*arguments, "--overwrite") == 0
    assert config.read_text() != "mine"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([EMBEDDED], "is a package already"),
        ([EMBEDDED, "--format", "triton", "--precision", "fp16"], "is in fp32"),
        ([EMBEDDED, "--format", "triton", "--labels", "x.txt"], "--labels has no effect on a pack"),
        ([EMBEDDED, "--format", "triton", "--mean", "0", "0", "0"], "--mean has no effect"),
        ([EMBEDDED, "--format", "triton", "--no-weights"], "--no-weights has no effect"),
        ([EMBEDDED, "--format", "triton", "--sha256", "0"], "--sha256 has no effect"),
        ([EMBEDDED, "--format", "tensorrt", "--name", "other"], "--name has no effect"),
        (["caformer_s18", "--max-batch-size", "4"], "--max-batch-size has no effect with --format"),
        (["caformer_s18", "--triton-device", "cpu"], "or choose --format triton"),
        ([EMBEDDED, "--format", "triton", "--engine-cache", "x"], "or choose --format tensorrt"),
    ],
)
def test_what_would_have_no_effect_is_refused_by_name(
    arguments: list[str | Path], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert complaint in sentence


def test_a_place_that_is_taken_is_told_before_anything_is_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(EMBEDDED, "--format", "triton", "--out", tmp_path) == 0
    capsys.readouterr()
    arguments = ("--checkpoint", tmp_path / "nowhere.pth", "--format", "triton")
    assert run("caformer_digits", *arguments, "--out", tmp_path) == 2
    assert "exists already" in capsys.readouterr().err
    assert run("caformer_digits", *arguments, "--out", tmp_path, "--precision", "bf16") == 2
    assert "is in bf16, which onnxruntime does not run" in capsys.readouterr().err


def test_a_refused_repository_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("nosuchthing", "--format", "triton", "--out", tmp_path / "new") == 2
    assert "no variant 'nosuchthing'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_published_name_means_the_published_weights_whatever_is_in_the_store(
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    shutil.copytree(EMBEDDED, store / "caformer_s18")
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    command: list[str | Path] = [Path(sysconfig.get_path("scripts")) / "metaserve"]
    command += ["export", "caformer_s18"]
    command += ["--model-store", store, "--out", tmp_path / "out", "--format"]

    def said(*arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            [*command, *arguments], env=offline, capture_output=True, text=True, timeout=120
        )
        return done.returncode, done.stdout + done.stderr

    code, text = said("triton")
    assert code == 0, text  # what is there serves as it is
    for arguments in (
        ("onnx",),
        ("triton", "--input-size", "256"),
        ("triton", "--precision", "fp16"),
        ("triton", "--version", "v2", "--no-weights"),
    ):
        code, text = said(*arguments, "--overwrite")
        assert code == 2
        assert "caformer_s18.pth of sail/dl cannot be fetched" in text, arguments
    (store / "caformer_s18" / "manifest.json").write_text("{}")
    code, text = said("triton", "--overwrite")
    assert "cannot be fetched" in text, "a package that cannot be read is none"
