"""The Triton repository: read back with Triton's own messages, whole or absent, no foreign plan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from export.triton import BUILD_PLAN, CONFIG, config_text, write_repository
from models.package import PRETRAINED, Package, PackageError, open_package, sha256_file
from models.tolerances import Precision
from tests.required import require

EMBEDDED = PRETRAINED / "caformer_digits"


@pytest.fixture(scope="module")
def package() -> Package:
    return open_package(EMBEDDED)


@pytest.fixture(scope="module")
def messages() -> Any:
    return require("tritonclient.grpc.model_config_pb2")


def parse(text: str) -> Any:
    """Read a configuration as Triton does: unknown fields are errors."""
    message = require("tritonclient.grpc.model_config_pb2").ModelConfig()
    return require("google.protobuf.text_format").Parse(text, message)


def in_precision(package: Package, precision: Precision) -> Package:
    """Return the package as if its graph were of another precision."""
    return Package(package.path, package.manifest.model_copy(update={"precision": precision}))


def without_labels(package: Package) -> Package:
    files = {name: sha for name, sha in package.manifest.files.items() if name != "labels.txt"}
    return Package(package.path, package.manifest.model_copy(update={"files": files}))


def test_config_says_what_the_package_is(package: Package, tmp_path: Path) -> None:
    model = write_repository(package, tmp_path, max_batch_size=8)
    config = parse((model / CONFIG).read_text())
    assert model == tmp_path / "caformer_digits"
    assert (config.name, config.backend) == ("caformer_digits", "onnxruntime")
    assert (config.max_batch_size, config.default_model_filename) == (8, "model.onnx")
    assert [(one.name, list(one.dims)) for one in config.input] == [("images", [32, 32, 3])]
    assert [(one.name, list(one.dims)) for one in config.output] == [
        ("logits", [10]),
        ("embedding", [64]),
    ]
    assert [one.label_filename for one in config.output] == ["labels.txt", ""]
    assert config.version_policy.latest.num_versions == 1


def test_config_batches_refuses_and_warms_up(package: Package, messages: Any) -> None:
    config = parse(config_text(package, "m", 6, "onnxruntime", "auto"))
    batching = config.dynamic_batching
    assert list(batching.preferred_batch_size) == [6]
    assert 0 < batching.max_queue_delay_microseconds <= 1000
    policy = batching.default_queue_policy
    assert policy.timeout_action == messages.ModelQueuePolicy.REJECT
    assert policy.allow_timeout_override, "a request's own deadline must count"
    assert policy.default_timeout_microseconds > 0, "0 would let no request set one"
    assert policy.max_queue_size > 0
    warm = [(one.batch_size, one.inputs["images"].zero_data) for one in config.model_warmup]
    assert warm == [(1, True), (2, True), (4, True), (6, True)]


@pytest.mark.parametrize(
    ("device", "kind"), [("cpu", "KIND_CPU"), ("gpu", "KIND_GPU"), ("auto", "KIND_AUTO")]
)
def test_device_becomes_the_kind_of_the_instances(
    package: Package, messages: Any, device: Any, kind: str
) -> None:
    config = parse(config_text(package, "m", 4, "onnxruntime", device))
    assert config.instance_group[0].kind == messages.ModelInstanceGroup.Kind.Value(kind)
    assert ("cudnn_conv_algo_search" in config.parameters) == (device != "cpu")


@pytest.mark.parametrize(
    ("precision", "device", "options"),
    [("fp32", "gpu", "0"), ("fp32", "auto", "0"), ("fp16", "gpu", None), ("fp32", "cpu", None)],
)
def test_float32_is_not_rounded_to_tf32_on_a_gpu(
    package: Package, precision: Precision, device: Any, options: str | None
) -> None:
    exported = in_precision(package, precision)
    config = parse(config_text(exported, "m", 4, "onnxruntime", device))
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    said = {one.name: one.parameters["use_tf32"] for one in accelerators}
    assert said == ({} if options is None else {"cuda": options})


def test_a_misspelt_field_would_be_caught(package: Package) -> None:
    text = config_text(package, "m", 4, "onnxruntime", "auto")
    error = require("google.protobuf.text_format").ParseError
    with pytest.raises(error, match="max_batch_sise"):
        parse(text.replace("max_batch_size", "max_batch_sise"))


def test_the_version_folder_is_the_package_itself(package: Package, tmp_path: Path) -> None:
    model = write_repository(package, tmp_path)
    copied = open_package(model / "1")
    copied.check_files()
    assert copied.manifest == package.manifest
    assert (model / "labels.txt").read_bytes() == (EMBEDDED / "labels.txt").read_bytes()
    assert {path.name for path in (model / "1").iterdir()} == {
        "manifest.json",
        *package.manifest.files,
    }
    assert os.stat(model / "1" / "model.onnx").st_mode & 0o777 == 0o644


def test_a_package_without_labels_gets_none(package: Package, tmp_path: Path) -> None:
    model = write_repository(without_labels(package), tmp_path)
    assert not (model / "labels.txt").exists()
    assert "label_filename" not in (model / CONFIG).read_text()


def test_a_package_without_a_graph_is_refused(package: Package, tmp_path: Path) -> None:
    files = {name: sha for name, sha in package.manifest.files.items() if name != "model.onnx"}
    bare = Package(package.path, package.manifest.model_copy(update={"files": files}))
    with pytest.raises(PackageError, match=r"holds no model\.onnx"):
        write_repository(bare, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_stays_unless_it_is_to_be_replaced(package: Package, tmp_path: Path) -> None:
    model = write_repository(package, tmp_path, max_batch_size=4)
    with pytest.raises(PackageError, match="exists already"):
        write_repository(package, tmp_path, max_batch_size=8)
    assert "max_batch_size: 4" in (model / CONFIG).read_text()
    write_repository(package, tmp_path, max_batch_size=8, overwrite=True)
    assert "max_batch_size: 8" in (model / CONFIG).read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["caformer_digits"]


def test_a_folder_that_is_no_model_is_never_replaced(package: Package, tmp_path: Path) -> None:
    precious = tmp_path / "caformer_digits" / "precious"
    precious.parent.mkdir()
    precious.touch()
    with pytest.raises(PackageError, match="no model of a Triton repository and stays"):
        write_repository(package, tmp_path, overwrite=True)
    assert precious.exists()


def test_what_fails_on_the_way_leaves_no_trace(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_repository(package, tmp_path, max_batch_size=4)
    copied: list[str] = []

    def copy_some(source: Path, target: Path) -> None:
        copied.append(target.name)
        if len(copied) == 3:
            raise OSError("the disk is full")
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(shutil, "copyfile", copy_some)
    with pytest.raises(OSError, match="the disk is full"):
        write_repository(package, tmp_path, max_batch_size=8, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["caformer_digits"]
    assert "max_batch_size: 4" in (tmp_path / "caformer_digits" / CONFIG).read_text()


def test_a_damaged_package_is_not_passed_on(tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(EMBEDDED, tmp_path / "damaged"))
    (damaged / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(PackageError, match=r"model\.onnx is not the file"):
        write_repository(open_package(damaged), tmp_path / "repository")
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "../up"}, "cannot be a package's name"),
        ({"max_batch_size": 0}, "at least one image"),
        ({"platform": "tensorrt", "device": "cpu"}, "runs on a GPU"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(
    package: Package, tmp_path: Path, arguments: dict[str, Any], says: str
) -> None:
    with pytest.raises(PackageError, match=says):
        write_repository(package, tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cpu", "gpu", "auto"])
def test_a_bf16_package_is_for_tensorrt_alone(
    package: Package, tmp_path: Path, device: Any
) -> None:
    exported = in_precision(package, "bf16")
    with pytest.raises(PackageError, match="onnxruntime does not run; choose --triton-platform te"):
        write_repository(exported, tmp_path, device=device)
    assert list(tmp_path.iterdir()) == []
    write_repository(exported, tmp_path, platform="tensorrt")


@pytest.mark.parametrize("module", ["tritonclient.grpc.model_config_pb2", "google.protobuf"])
def test_without_the_client_the_extra_is_named(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(PackageError, match=r"install metaserve\[triton\]"):
        write_repository(package, tmp_path)


# --- TensorRT: built where it runs


def test_a_tensorrt_model_holds_the_graph_and_no_plan(package: Package, tmp_path: Path) -> None:
    model = write_repository(package, tmp_path, max_batch_size=8, platform="tensorrt")
    config = parse((model / CONFIG).read_text())
    assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
    assert config.optimization.cuda.graphs
    assert [one.batch_size for one in config.optimization.cuda.graph_spec] == [1, 2, 4, 8]
    assert (model / "1" / "model.onnx").exists()
    assert not (model / "1" / "model.plan").exists()
    open_package(model / "1").check_files()


def test_a_plan_of_another_tensorrt_is_not_passed_on(package: Package, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "planned"))
    (folder / "model.plan").write_bytes(b"built elsewhere")
    files = {**package.manifest.files, "model.plan": sha256_file(folder / "model.plan")}
    planned = Package(folder, package.manifest.model_copy(update={"files": files}))
    with pytest.raises(PackageError, match=r"holds a model\.plan, which may fit another"):
        write_repository(planned, tmp_path / "r", platform="tensorrt")
    write_repository(planned, tmp_path / "r", platform="onnxruntime")


def run_build(model: Path, folder: Path, trtexec: str | None) -> subprocess.CompletedProcess[str]:
    tools = folder / "bin"
    tools.mkdir()
    if trtexec is not None:
        (tools / "trtexec").write_text(f"#!/bin/sh\n{trtexec}\n")
        (tools / "trtexec").chmod(0o755)
    script = model / "1" / BUILD_PLAN
    assert os.access(script, os.X_OK)
    return subprocess.run(
        [script, "--verbose"],
        env={"PATH": f"{tools}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=30,
    )


@pytest.mark.parametrize("strongly_typed", [True, False], ids=["TensorRT 10", "TensorRT 11"])
def test_the_script_builds_the_plan_with_one_profile(
    package: Package, tmp_path: Path, strongly_typed: bool
) -> None:
    model = write_repository(package, tmp_path / "r", max_batch_size=8, platform="tensorrt")
    offered = "--stronglyTyped" if strongly_typed else "--onnx"
    trtexec = f'[ "$1" = --help ] && echo {offered} && exit; echo "$@" > model.plan.new'
    done = run_build(model, tmp_path, trtexec)
    assert done.returncode == 0, done.stderr
    said = (model / "1" / "model.plan").read_text().split()
    assert set(said) >= {
        "--onnx=model.onnx",
        "--minShapes=images:1x32x32x3",
        "--optShapes=images:8x32x32x3",
        "--maxShapes=images:8x32x32x3",
        "--verbose",
    }
    assert ("--stronglyTyped" in said) == strongly_typed


@pytest.mark.parametrize(("precision", "is_exact"), [("fp32", True), ("bf16", False)])
def test_the_script_forbids_tf32_where_the_graph_is_float32(
    package: Package, tmp_path: Path, precision: Precision, is_exact: bool
) -> None:
    exported = in_precision(package, precision)
    model = write_repository(exported, tmp_path / "r", platform="tensorrt")
    done = run_build(model, tmp_path, '[ "$1" = --help ] && exit; echo "$@" > model.plan.new')
    assert done.returncode == 0, done.stderr
    assert ("--noTF32" in (model / "1" / "model.plan").read_text().split()) == is_exact


@pytest.mark.parametrize("trtexec", [None, '[ "$1" = --help ] || exit 3'])
def test_a_build_that_fails_leaves_no_plan(
    package: Package, tmp_path: Path, trtexec: str | None
) -> None:
    if trtexec is None and Path("/usr/src/tensorrt/bin/trtexec").exists():
        pytest.skip("this machine has the trtexec whose absence is to be told")
    model = write_repository(package, tmp_path / "r", platform="tensorrt")
    done = run_build(model, tmp_path, trtexec)
    assert done.returncode == (2 if trtexec is None else 3)
    assert ("no trtexec here" in done.stderr) == (trtexec is None)
    assert not (model / "1" / "model.plan").exists()
