"""`metaserve export` and `metaserve verify`: what is published is proven, or nothing is."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file

import export.publish
from app.cli import main
from export.onnx import export_onnx
from models.build import load_served_model
from models.golden import golden_images
from models.metaformer import MetaFormer
from models.package import (
    MANIFEST,
    PRETRAINED,
    PackageError,
    find_package,
    hash_files,
    open_package,
)
from models.serving import ServedModel
from models.variants import Architecture, find_variant
from tests.reference import randomise, to_official_layout

DIGITS, _ = find_variant("caformer_digits")
GOLDEN_SHA256 = "bd65f4da62f554862ad1304f42920860fa6c94475c8c6fccfc5f2036cf3e358f"


def checkpoint(folder: Path, architecture: Architecture = DIGITS, classes: int = 10) -> Path:
    """Write a random network's weights."""
    path = folder / "weights.safetensors"
    save_file(randomise(MetaFormer(architecture, classes), 3).state_dict(), path)
    return path


def rehash(package: Path) -> None:
    """Have the manifest describe the files as they are."""
    manifest = json.loads((package / MANIFEST).read_text())
    manifest["files"] = dict(hash_files(package))
    (package / MANIFEST).write_text(json.dumps(manifest))


def run(*arguments: str | Path) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of random weights."""
    folder = tmp_path_factory.mktemp("export")
    out = folder / "random_digits"
    labels = folder / "labels.txt"
    labels.write_text("".join(f"label {index}\n" for index in range(10)))
    code = run(
        "export",
        "caformer_digits",
        "--checkpoint",
        checkpoint(folder),
        "--out",
        out,
        "--labels",
        labels,
    )
    assert code == 0
    return out


@pytest.fixture
def copy(package: Path, tmp_path: Path) -> Path:
    """A copy of the package that may be damaged."""
    return Path(shutil.copytree(package, tmp_path / "copy"))


def test_graph_takes_bytes_and_gives_both_outputs_at_any_batch(package: Path) -> None:
    graph = onnx.load(package / "model.onnx").graph

    def shape(value: onnx.ValueInfoProto) -> list[str | int]:
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    assert [(one.name, shape(one)) for one in graph.input] == [("images", ["batch", 32, 32, 3])]
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    outputs = {one.name: shape(one) for one in graph.output}
    assert outputs == {"logits": ["batch", 10], "embedding": ["batch", 64]}
    assert {one.type.tensor_type.elem_type for one in graph.output} == {onnx.TensorProto.FLOAT}


def test_graph_is_one_file_without_traces_of_the_machine_that_made_it(package: Path) -> None:
    names = {path.name for path in package.iterdir()}
    assert names == {"model.onnx", "weights.safetensors", "labels.txt", "golden.npz", MANIFEST}
    model = onnx.load(package / "model.onnx", load_external_data=False)
    assert all(not one.external_data for one in model.graph.initializer)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not any(value.metadata_props for value in model.graph.value_info)
    for name in names - {"golden.npz"}:
        content = (package / name).read_bytes()
        here = (str(place).encode() for place in (Path.home(), Path.cwd(), sys.prefix))
        for trace in (b"/home/", b"site-packages", b'.py"', b'File "', *here):
            assert trace not in content, f"{name} holds {trace!r}"


def test_manifest_states_what_is_in_the_package_and_its_proof(package: Path) -> None:
    manifest = json.loads((package / MANIFEST).read_text())
    assert manifest["name"] == "random_digits"
    assert re.fullmatch("[0-9a-f]{12}", manifest["version"])
    assert manifest["source"]["sha256"].startswith(manifest["version"])
    assert manifest["files"].keys() == {
        "model.onnx", "weights.safetensors", "labels.txt", "golden.npz"
    }  # fmt: skip
    assert manifest["opset"] == onnx.load(package / "model.onnx").opset_import[0].version == 20
    assert manifest["tools"]["torch"] == torch.__version__
    proof = manifest["verification"]
    assert 0 < proof["max_abs_logit_difference"] <= proof["logit_tolerance"] == 1e-4
    assert proof["top1_agreement"] == 1.0
    open_package(package).check_files()


def test_graph_computes_what_torch_computes_on_images_the_proof_never_saw(package: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 32, 32, 3), np.uint8)
    session = onnxruntime.InferenceSession(package / "model.onnx")
    logits, embedding = session.run(None, {"images": images})
    with torch.inference_mode():
        expected = load_served_model(open_package(package))(torch.from_numpy(images))
    np.testing.assert_allclose(logits, expected[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(embedding, expected[1], atol=1e-4, rtol=0)


def test_verify_repeats_the_proof(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", package) == 0
    shown = capsys.readouterr().out
    assert "agrees with torch on its weights" in shown
    assert "100% of 5 images" in shown


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "labels.txt", "golden.npz"])
def test_a_damaged_file_is_named(copy: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert run("verify", copy) == 2
    assert f"{name} is not the file the manifest describes" in capsys.readouterr().err


def test_a_missing_file_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "weights.safetensors").unlink()
    assert run("verify", copy) == 2
    assert "weights.safetensors cannot be read" in capsys.readouterr().err


def test_verify_sees_weights_that_are_not_those_of_the_graph(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(randomise(MetaFormer(DIGITS, 10), 4).state_dict(), copy / "weights.safetensors")
    rehash(copy)
    assert run("verify", copy) == 2
    assert "does not compute the network in fp32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"format": 2}, "format"),
        ({"surprise": 1}, "surprise"),
        ({"classes": 0}, "classes"),
        ({"files": {"../escape": "0" * 64}}, "files"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(
    copy: Path, change: dict[str, object], complaint: str
) -> None:
    manifest = json.loads((copy / MANIFEST).read_text()) | change
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(PackageError, match=complaint):
        open_package(copy)


def test_a_graph_that_is_not_the_network_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def export_another(model: ServedModel, input_size: int, path: Path) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("stages.2.blocks.0.res_scale1.scale"):
                    parameter.mul_(1.001)
        export_onnx(model, input_size, path)

    monkeypatch.setattr(export.publish, "export_onnx", export_another)
    out = tmp_path / "models" / "wrong"
    code = run("export", "caformer_digits", "--checkpoint", checkpoint(tmp_path), "--out", out)
    assert code == 2
    assert "does not compute the network in fp32: logits differ by" in capsys.readouterr().err
    assert list(out.parent.iterdir()) == []


def test_a_failing_export_leaves_the_package_that_was_there(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    monkeypatch.setattr(export.publish, "export_onnx", full_disk)
    arguments = ("--checkpoint", checkpoint(tmp_path), "--out", copy)
    assert run("export", "caformer_digits", *arguments, "--overwrite") == 2
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir() if path.name.startswith(".")] == []


def test_a_package_is_replaced_only_when_asked(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = open_package(copy).manifest.version
    other = tmp_path / "other.safetensors"
    save_file(randomise(MetaFormer(DIGITS, 10), 5).state_dict(), other)
    assert run("export", "caformer_digits", "--checkpoint", other, "--out", copy) == 2
    assert "exists already" in capsys.readouterr().err
    assert open_package(copy).manifest.version == version
    code = run("export", "caformer_digits", "--checkpoint", other, "--out", copy, "--overwrite")
    assert code == 0
    assert open_package(copy).manifest.version != version


def test_weights_of_a_package_export_to_the_same_network_again(tmp_path: Path) -> None:
    official = tmp_path / "official.pth"
    # So small a variance before the norm in the head that 1e-5 and 1e-6 give other logits.
    state = randomise(MetaFormer(DIGITS, 10), 3).state_dict()
    state["head.fc.fc1.weight"] *= 0.02
    state["head.fc.fc1.bias"] *= 0.02
    torch.save(to_official_layout(state), official)
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("export", "caformer_digits", "--checkpoint", official, "--out", first) == 0
    weights = first / "weights.safetensors"
    assert run("export", "caformer_digits", "--checkpoint", weights, "--out", second) == 0
    assert open_package(first).manifest.head_norm_eps == 1e-5
    assert open_package(second).manifest.head_norm_eps == 1e-5
    np.testing.assert_array_equal(open_package(first).golden[0], open_package(second).golden[0])
    third = tmp_path / "third"
    arguments = ("--checkpoint", weights, "--out", third, "--head-norm-eps", "1e-6")
    assert run("export", "caformer_digits", *arguments) == 0
    difference = np.abs(open_package(first).golden[0] - open_package(third).golden[0]).max()
    assert difference > 1e-3


def test_verify_names_a_graph_that_answers_nan(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = onnx.load(copy / "model.onnx")
    (bias,) = (one for one in model.graph.initializer if one.name.endswith("head.fc.fc2.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, np.float32), bias.name))
    onnx.save(model, copy / "model.onnx")
    rehash(copy)
    assert run("verify", copy) == 2
    assert "not finite" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04junk"])
def test_golden_outputs_that_are_none_are_named(copy: Path, content: bytes) -> None:
    (copy / "golden.npz").write_bytes(content)
    with pytest.raises(PackageError, match="holds no golden outputs"):
        _ = open_package(copy).golden


def test_labels_may_begin_with_a_byte_order_mark(copy: Path) -> None:
    text = "".join(f"{index}\n" for index in range(10))
    (copy / "labels.txt").write_text(text, "utf-8-sig")
    assert open_package(copy).labels == tuple("0123456789")


def test_a_folder_that_is_no_package_is_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "chapter1.tex").write_text("years of work")
    arguments = ("--checkpoint", checkpoint(tmp_path), "--out", thesis, "--overwrite")
    assert run("export", "caformer_digits", *arguments) == 2
    assert "is no model package and stays" in capsys.readouterr().err
    assert (thesis / "chapter1.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["caformer_s81"], "no variant 'caformer_s81'; the nearest are caformer_s18"),
        (["caformer_s18"], "the checkpoint"),
        (["caformer_digits", "--labels", "LABELS"], "3 labels for 10 classes"),
        (["caformer_digits", "--input-size", "4"], "at least 16 px"),
        (["caformer_digits", "--crop-pct", "1.5"], "--crop-pct 1.5"),
        (["caformer_digits", "--std", "0", "1", "1"], "--std 0"),
        (["caformer_digits", "--head-norm-eps", "0"], "--head-norm-eps 0"),
        (["caformer_digits", "--head-norm-eps", "nan"], "--head-norm-eps nan"),
        (["caformer_digits", "--name", "my model"], "'my model' cannot be a package's name"),
        (["caformer_digits", "--version", "1.0 beta"], "'1.0 beta' cannot be a package's name"),
        (["caformer_digits", "--checkpoint", "nowhere.pth"], "no checkpoint file nowhere.pth"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_sentence(
    arguments: Sequence[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\n")
    given = [str(labels) if one == "LABELS" else one for one in arguments]
    if "--checkpoint" not in given:
        given += ["--checkpoint", str(checkpoint(tmp_path))]
    assert run("export", *given, "--out", tmp_path / "out") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "metaserve:" in line]
    assert len(errors) == 1
    assert complaint in errors[0]
    assert not (tmp_path / "out").exists()


def test_an_embedded_model_needs_no_export(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("export", "caformer_digits") == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert "caformer_digits is a package already; --format tensorrt or triton" in sentence


def test_randformer_refuses_another_input_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", "any.pth", "--input-size", "384", "--out", str(tmp_path / "out")]
    assert run("export", "randformer_s12", *arguments) == 2
    assert "runs only at 224 px; 384 px was asked" in capsys.readouterr().err


def test_an_ablation_is_exported_and_rebuilt_from_the_manifest(tmp_path: Path) -> None:
    ablated = replace(
        DIGITS,
        activation="gelu",
        residual_scaling="layer_scale",
        block_bias=True,
        mixers=("pooling", "identity", "conv", "attention"),
    )
    out = tmp_path / "ablated"
    code = run(
        "export", "caformer_digits", "--checkpoint", checkpoint(tmp_path, ablated), "--out", out,
        "--activation", "gelu", "--residual-scaling", "layer_scale", "--block-bias",
        "--mixers", "pooling", "identity", "conv", "attention",
    )  # fmt: skip
    assert code == 0
    assert open_package(out).manifest.architecture.to_architecture() == ablated
    assert run("verify", out) == 0


def test_packages_are_found_by_path_by_name_in_the_store_and_embedded(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert find_package(str(copy)) == copy
    assert find_package("copy", copy.parent) == copy
    assert find_package("caformer_digits") == PRETRAINED / "caformer_digits"
    with pytest.raises(PackageError, match="give a package directory or one of: caformer_digits"):
        find_package("caformer_digit")


def test_golden_images_are_the_same_bytes_everywhere() -> None:
    digest = hashlib.sha256(golden_images(32, 5).tobytes()).hexdigest()
    assert digest == GOLDEN_SHA256, "stored golden outputs belong to these very bytes"
