"""`metaserve verify --backends`: one table of proof, in the manifest and in /models."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from app.backends.base import Backend
from app.backends.fake import FakeBackend
from app.backends.select import select_backend
from app.cli import main
from app.settings import Settings
from export.proofs import format_proofs, prove, replace_manifest, store_proofs
from export.seams import Answers, Candidate
from export.verify import VerificationError
from models.golden import golden_images
from models.package import MANIFEST, Package, open_package
from models.tolerances import Precision
from tests.servers import EMBEDDED, running_service


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A package that may be written to, and was never proven."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "digits"))
    replace_manifest(folder, open_package(folder).manifest.model_copy(update={"proofs": ()}))
    return folder


def verify(package: Path, *arguments: str) -> int:
    return main(["verify", str(package), *arguments])


def golden_candidate(
    package: Package,
    move: float = 0.0,
    precision: Precision = "fp32",
    limit: int | None = None,
) -> Candidate:
    """Return a backend that knows the golden answers and moves its logits by a little."""
    logits, embedding = package.golden
    images = golden_images(package.manifest.input.size, len(logits))
    places = {image.tobytes(): index for index, image in enumerate(images)}

    def run(batch: NDArray[np.uint8]) -> Answers:
        assert len(batch) <= (limit or len(batch)), "a larger batch than it takes"
        rows = [places[image.tobytes()] for image in batch]
        return logits[rows] + np.float32(move), embedding[rows]

    return Candidate("onnxruntime", precision, "cpu", "a double", limit, run, lambda: None)


def test_each_backend_gets_a_row_that_is_printed_stored_and_shown_by_models(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(copy, "--backends", "onnxruntime,torch") == 0
    shown = capsys.readouterr().out
    proofs = open_package(copy).manifest.proofs
    assert [(one.backend, one.precision, one.device) for one in proofs] == [
        ("onnxruntime", "fp32", "cpu"),
        ("torch", "fp32", "cpu"),
    ]
    for proof in proofs:
        assert 0 < proof.max_abs_logit_difference <= proof.logit_tolerance == 1e-4
        assert proof.top1_agreement == 1.0
        assert f"{proof.max_abs_logit_difference:.2e}" in shown
    assert proofs[0].batch_dependence == 0
    assert f"stored in {copy / MANIFEST}" in shown
    with running_service(package=copy) as service:
        rows = service.client.get("/models").json()["proofs"]
    assert [row["backend"] for row in rows] == ["onnxruntime", "torch"]
    assert rows[1]["max_abs_logit_difference"] == proofs[1].max_abs_logit_difference
    assert rows[1]["runtime"] == proofs[1].runtime
    open_package(copy).check_files()


def test_a_proof_replaces_the_older_one_of_the_same_backend_alone(copy: Path) -> None:
    package = open_package(copy)
    first = prove(golden_candidate(package), package, package.golden)
    other = prove(golden_candidate(package, precision="fp16"), package, package.golden)
    package = store_proofs(package, [first, other])
    again = prove(golden_candidate(package, move=5e-5), package, package.golden)
    assert store_proofs(package, [again]).manifest.proofs == (again, other)
    assert open_package(copy).manifest.proofs == (again, other)


@pytest.mark.parametrize(
    ("move", "precision", "passes"),
    [(2e-4, "fp32", False), (2e-4, "fp16", True), (0.3, "fp16", False), (0.3, "bf16", True),
     (3.0, "bf16", False), (float("nan"), "bf16", False)],
)  # fmt: skip
def test_each_precision_has_bounds_of_its_own(
    copy: Path, move: float, precision: Precision, passes: bool
) -> None:
    package = open_package(copy)
    candidate = golden_candidate(package, move, precision)
    if passes:
        assert prove(candidate, package, package.golden).precision == precision
    else:
        with pytest.raises(VerificationError):
            prove(candidate, package, package.golden)


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 8])
def test_a_backend_is_proven_in_batches_that_it_takes(copy: Path, limit: int) -> None:
    package = open_package(copy)
    proof = prove(golden_candidate(package, limit=limit), package, package.golden)
    assert proof.images == 5


def test_a_backend_that_is_wrong_is_named_and_not_stored_the_others_are(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = open_package(copy).manifest

    def wrong_torch(settings: Settings, package: Package, threads: int) -> Backend:
        if settings.backend == "torch":
            return FakeBackend(manifest.input.size, manifest.classes, manifest.embedding_dim)
        return select_backend(settings, package, threads)

    assert verify(copy, "--backends", "torch") == 0  # a row that must not outlive the failure
    monkeypatch.setattr("app.cli.select_backend", wrong_torch)
    assert verify(copy, "--backends", "torch,onnxruntime") == 2
    captured = capsys.readouterr()
    (fault,) = captured.err.splitlines()
    assert fault.startswith("metaserve: torch: ")
    assert "logits differ by" in fault
    assert [one.backend for one in open_package(copy).manifest.proofs] == ["onnxruntime"]


def test_a_backend_that_fails_loses_what_it_proved_before(copy: Path) -> None:
    package = open_package(copy)
    candidate = golden_candidate(package)
    package = store_proofs(package, [prove(candidate, package, package.golden)])
    other = replace(candidate, precision="fp16")
    package = store_proofs(package, [prove(other, package, package.golden)])
    assert len(package.manifest.proofs) == 2
    store_proofs(package, [], failed=[replace(candidate, runtime="the same, broken")])
    assert [proof.precision for proof in open_package(copy).manifest.proofs] == ["fp16"]


@pytest.mark.parametrize(
    ("older", "another"),
    [
        (
            ("onnxruntime 1.31.0 CUDA, CUDA graphs", "onnxruntime 1.32.1 CUDA, CUDA graphs"),
            "onnxruntime 1.32.1 TensorRT, no CUDA graphs",
        ),
        (
            (
                "torch 2.13.0+cpu eager",
                "torch 2.13.0 eager, 1 thread",
                "torch 2.14.0 eager, 2 threads",
            ),
            "torch 2.14 compiled, 2 threads",
        ),
        (
            ("Triton 2.51.0 at localhost:8001, model a", "Triton 2.60.0 at [::1]:1, model a"),
            "Triton 2.60.0 at [::1]:1, model b",
        ),
        (
            (
                "tensorrt 11.4.0, CUDA graphs for batches of 1, 2",
                "tensorrt 11.4.1, CUDA graphs for batches of 1, 2, 4",
            ),
            "tensorrt_rtx 1.7.1, CUDA graphs for batches of 1, 2",
        ),
    ],
    ids=["onnxruntime", "torch", "triton", "tensorrt"],
)
def test_a_row_is_replaced_by_the_same_path_of_another_version(
    copy: Path, older: tuple[str, ...], another: str
) -> None:
    package = open_package(copy)
    for runtime in older:
        candidate = replace(golden_candidate(package), runtime=runtime)
        package = store_proofs(package, [prove(candidate, package, package.golden)])
    (proof,) = package.manifest.proofs
    assert proof.runtime == older[-1]
    other = replace(golden_candidate(package), runtime=another)
    package = store_proofs(package, [prove(other, package, package.golden)])
    assert len(package.manifest.proofs) == 2


def test_how_far_an_answer_moves_with_its_batch_is_measured_and_shown(copy: Path) -> None:
    package = open_package(copy)
    steady = golden_candidate(package)

    def run(batch: NDArray[np.uint8]) -> Answers:
        logits, embedding = steady.run(batch)
        return logits + np.float32(len(batch) * 8e-6), embedding

    proof = prove(replace(steady, run=run), package, package.golden)
    assert proof.batch_dependence == pytest.approx(4 * 8e-6, rel=0.1)
    assert format_proofs([proof]).splitlines()[1].endswith("3.2e-05")


def test_a_backend_that_cannot_start_here_is_one_sentence_and_exit_code_2(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(copy, "--backends", "onnxruntime", "--ort-provider", "tensorrt") == 2
    captured = capsys.readouterr()
    (fault,) = captured.err.splitlines()
    assert "onnxruntime: this onnxruntime has no TensorrtExecutionProvider" in fault
    assert captured.out == ""
    assert open_package(copy).manifest.proofs == ()


def test_a_name_that_is_no_backend_is_refused_with_those_there_are(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        verify(copy, "--backends", "onnxruntime,keras")
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "'keras' is no backend; choose among onnxruntime,torch,tensorrt,triton" in message


def test_a_package_that_cannot_be_written_is_proven_and_left_as_it_was(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def full_disk(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    assert verify(copy, "--backends", "onnxruntime") == 0
    assert "not stored" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_a_reader_never_sees_half_a_manifest(copy: Path) -> None:
    package = open_package(copy)
    inode = (copy / MANIFEST).stat().st_ino
    replace_manifest(copy, package.manifest)
    assert (copy / MANIFEST).stat().st_ino != inode, "exchanged, not overwritten"
    assert (copy / MANIFEST).stat().st_mode & 0o777 == 0o644
    assert json.loads((copy / MANIFEST).read_text()) == package.manifest.model_dump(mode="json")


def test_the_embedded_package_carries_the_table_of_three_backends() -> None:
    manifest = open_package(EMBEDDED).manifest
    assert [proof.backend for proof in manifest.proofs] == ["onnxruntime", "torch", "triton"]
    for proof in manifest.proofs:
        assert proof.max_abs_logit_difference <= proof.logit_tolerance == 1e-4


def test_a_damaged_package_is_not_proven(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "labels.txt").write_text("other\n")
    assert verify(copy, "--backends", "onnxruntime") == 2
    assert "labels.txt is not the file the manifest describes" in capsys.readouterr().err
