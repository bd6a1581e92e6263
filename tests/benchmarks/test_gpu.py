"""`python -m benchmarks.gpu`: the real command on the CPU; its order and arithmetic by doubles."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import export.tensorrt
from app.backends import pytorch_cuda
from app.backends.fake import FakeBackend
from app.types import Batch, Rows
from benchmarks import gpu
from benchmarks.gpu_candidates import Candidate, Missing, Opened, Sizes, candidates, in_order
from benchmarks.gpu_ceilings import Ceilings, measure_ceilings
from benchmarks.gpu_models import Subject, build_subject, count_cost
from benchmarks.gpu_report import Report, Row
from models.golden import golden_images
from models.package import find_package, open_package
from models.variants import find_variant
from tests.backends.fake_tensorrt import FakeCuda, FakeTensorRT, fake_plan

ROOT = Path(__file__).parents[2]
# Dependencies of the service that a machine which only measures need not have.
NOT_NEEDED = ("pydantic", "pydantic_settings", "prometheus_client", "fastapi", "uvicorn", "orjson")


@pytest.fixture(scope="module")
def subject() -> Subject:
    return build_subject("caformer_digits", seed=0)


# --- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_it_runs_without_a_gpu_and_without_the_projects_dependencies(tmp_path: Path) -> None:
    out = tmp_path / "gpu.md"
    arguments = ["--device", "cpu", "--variant", "caformer_digits", "--buckets", "1,2"]
    arguments += ["--threads", "1", "--out", str(out)]
    program = (
        "import runpy, sys\n"
        f"sys.modules.update(dict.fromkeys({NOT_NEEDED}))\n"
        f"sys.argv[1:] = {arguments}\n"
        "runpy.run_module('benchmarks.gpu', run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    markdown = out.read_text()
    assert done.stdout.rstrip().endswith(markdown.rstrip()), "the table ends what is printed"
    for name in ("torch cpu eager", "onnxruntime cpu"):
        for batch in (1, 2):
            assert f"| caformer_digits | {name} | fp32 | {batch} | " in markdown
        assert f"{name} fp32: agrees with torch fp32" in done.stdout
    assert "onnxruntime cuda fp16: onnxruntime" in markdown
    assert "torch cuda compiled bf16: torch sees no GPU" in markdown
    assert "too far" not in markdown
    assert "Date: 20" in markdown
    assert f"torch {torch.__version__.split('+')[0]}" in markdown
    assert "same run: memory" in markdown


def test_without_a_gpu_the_default_is_refused_in_a_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert capsys.readouterr().err == (
        "torch sees no GPU; run with --device cpu to measure the CPU\n"
    )


# --- what is run, in which order, and what goes wrong


class Runner:
    """Answers what it is told, whatever the pixels; notes which sizes were opened."""

    def __init__(self, subject: Subject, off: float = 0.0) -> None:
        self._subject = subject
        self._off = off
        self.opened: list[Sizes] = []
        self.closed = 0

    def open(self, subject: Subject, sizes: Sizes, folder: Path) -> Opened:
        self.opened.append(sizes)
        self._seen = 0
        return Opened("a double", self._run, lambda size, times: None, self._close)

    def _run(self, batch: Batch) -> Rows:
        known = [(self._seen + n) % 5 for n in range(len(batch))]
        self._seen += len(batch)
        logits, embedding = self._subject.logits[known], self._subject.embedding[known]
        return Rows(logits + np.float32(self._off), embedding)

    def _close(self) -> None:
        self.closed += 1


def measured(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, *found: Candidate, minutes: float = 5
) -> tuple[int, list[str]]:
    """Run the command over these candidates; return its exit code and Markdown lines."""
    reports: list[Report] = []

    def keep(*arguments: Any) -> Report:
        reports.append(Report(*arguments))
        return reports[0]

    monkeypatch.setattr(gpu, "SECONDS_A_ROUND", 1e-6)
    monkeypatch.setattr(gpu, "build_subject", lambda variant, seed: subject)
    monkeypatch.setattr(gpu, "candidates", lambda *arguments: list(found))
    monkeypatch.setattr(gpu, "measure_ceilings", lambda device: Ceilings({"fp32": 1e12}, 1e9, None))
    monkeypatch.setattr(gpu, "Report", keep)
    code = gpu.main(["--device", "cpu", "--buckets", "4,1,2", "--minutes", str(minutes)])
    return code, reports[0].markdown().splitlines()


def test_all_sizes_are_opened_at_once_or_the_ends_first(
    monkeypatch: pytest.MonkeyPatch, subject: Subject
) -> None:
    together, apart = Runner(subject), Runner(subject)
    code, lines = measured(
        monkeypatch,
        subject,
        Candidate("together", "fp32", together.open, largest=2),
        Candidate("apart", "fp32", apart.open, one_by_one=True),
    )
    assert code == 0
    assert together.opened == [(1, 2)]
    assert apart.opened == [(4,), (1,), (2,)]
    assert (together.closed, apart.closed) == (1, 3)
    assert (
        len([line for line in lines if line.startswith("| caformer_digits | apart | fp")]) == 6
    )  # three checks, three sizes


def test_in_order_names_every_size_once() -> None:
    sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    order = [size for (size,) in in_order(sizes, one_by_one=True)]
    assert order == [256, 1, 128, 2, 64, 4, 32, 8, 16]


def test_a_backend_that_disagrees_is_shown_and_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = Candidate("wrong", "fp32", Runner(subject, off=0.1).open)
    code, lines = measured(monkeypatch, subject, wrong)
    assert code == 1
    assert any("**too far**" in line for line in lines)
    assert "wrong fp32: DISAGREES with torch fp32: |dlogit| 0.1" in capsys.readouterr().out


def test_what_fails_is_told_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, subject: Subject
) -> None:
    def broken(subject: Subject, sizes: Sizes, folder: Path) -> Opened:
        raise RuntimeError("out of memory\nand a long trace")

    def missing(subject: Subject, sizes: Sizes, folder: Path) -> Opened:
        raise Missing("it is not installed")

    def fails_later(subject: Subject, sizes: Sizes, folder: Path) -> Opened:
        def run(batch: Batch) -> Rows:
            raise ValueError("no kernel")

        return Opened("a double", run, None)

    code, lines = measured(
        monkeypatch,
        subject,
        Candidate("broken", "fp32", broken),
        Candidate("missing", "fp16", missing),
        Candidate("fails later", "fp32", fails_later),
        Candidate("fine", "fp32", Runner(subject).open),
    )
    assert code == 1, "no kernel is a failure"
    assert (
        "- not measured: caformer_digits broken fp32 at 1, 2, 4: RuntimeError: out of memory"
        in (lines)
    )
    assert "- not measured: caformer_digits missing fp16: it is not installed" in lines
    assert "- not measured: caformer_digits fails later fp32 at 1, 2, 4: ValueError: no kernel" in (
        lines
    )
    assert any(line.startswith("| caformer_digits | fine | fp32 | 4 |") for line in lines)


def test_a_size_that_does_not_fit_into_memory_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, subject: Subject
) -> None:
    def too_large(subject: Subject, sizes: Sizes, folder: Path) -> Opened:
        raise RuntimeError("CUDA out of memory. Tried to allocate 80 GiB")

    fine = Candidate("fine", "fp32", Runner(subject).open)
    code, _ = measured(monkeypatch, subject, Candidate("large", "fp32", too_large), fine)
    assert code == 0


def test_nothing_new_starts_when_the_time_is_up(
    monkeypatch: pytest.MonkeyPatch, subject: Subject
) -> None:
    runner = Runner(subject)
    late = Candidate("late", "fp32", runner.open, one_by_one=True)
    _, lines = measured(monkeypatch, subject, late, minutes=0)
    assert runner.opened == []
    assert "- not measured: caformer_digits late fp32 at 4: the time was up, see --minutes" in lines


def test_every_backend_is_tried_on_a_gpu_and_the_cpu_in_small_batches() -> None:
    found = candidates("cuda", 1, None)
    names = [candidate.name for candidate in found]
    assert list(dict.fromkeys(names)) == [
        "torch cpu eager",
        "onnxruntime cpu",
        "onnxruntime cuda",
        "onnxruntime tensorrt",
        "tensorrt",
        "torch cuda eager",
        "torch cuda compiled",
    ]
    assert all(one.largest == 8 for one in found if "cpu" in one.name)
    assert all(one.one_by_one == (one.name == "torch cuda compiled") for one in found)
    assert {one.precision for one in found if one.name == "torch cuda compiled"} == {"bf16", "fp16"}


def test_tensorrt_is_measured_through_the_parts_that_serve_and_let_go(
    monkeypatch: pytest.MonkeyPatch, subject: Subject, tmp_path: Path
) -> None:
    cuda = FakeCuda()
    library = FakeTensorRT(cuda)
    (tmp_path / "caformer_digits_fp16.onnx").touch()  # the graph is there, and nobody reads it
    logits = ("FLOAT", [-1, subject.widths[0]])
    plan = fake_plan(open_package(find_package("caformer_digits")), 2, logits=logits)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(export.tensorrt, "build_plan", lambda *arguments, **settings: plan)
    monkeypatch.setattr(pytorch_cuda, "EngineCuda", lambda: cuda)
    (tensorrt,) = [one for one in candidates("cuda", 1, None) if one.name == "tensorrt"]
    opened = tensorrt.open(subject, (1, 2), tmp_path)
    images = golden_images(subject.input_size, 2)
    expected = FakeBackend(subject.input_size, *subject.widths).run(images)
    np.testing.assert_array_equal(opened.run(images).logits, expected.logits)
    cuda.replays.clear()
    assert opened.replay is not None
    opened.replay(2, 3)
    assert cuda.replays == [1, 1, 1]
    opened.close()
    assert cuda.closed


# --- arithmetic


def test_what_a_network_costs_is_counted(subject: Subject) -> None:
    stem = 2 * 8 * 8 * 32 * 7 * 7 * 3  # the first convolution alone, on 32 px
    assert stem < subject.flops < 100 * stem
    s18, _ = count_cost(find_variant("caformer_s18")[0], classes=1000)
    # 4.1 G multiplications and additions in the paper's table, two operations each.
    assert s18 == pytest.approx(8.2e9, rel=0.05)


def test_the_cpu_has_a_ceiling_of_its_memory_alone() -> None:
    ceilings = measure_ceilings("cpu")
    assert ceilings.flops == {}
    assert 1e8 < ceilings.memory < 1e13
    assert ceilings.upload is None


def test_traffic_counts_the_weights_once_a_batch(subject: Subject) -> None:
    small = replace(subject, elements=100, weights=40)
    assert small.traffic_bytes("fp32", 1) == 4 * 140
    assert small.traffic_bytes("bf16", 4) == 2 * 110


def test_shares_are_of_the_ceilings_of_the_same_precision(subject: Subject) -> None:
    small = replace(subject, input_size=10, flops=2_000_000, elements=900, weights=100)
    ceilings = Ceilings({"fp32": 1e9, "bf16": 4e9}, memory=1e6, upload=1e5)
    row = Row(small, "torch cuda compiled", "bf16", 1, 0.01, 0.002, 1.0)
    report = Report(ceilings, "cuda")
    report.add_row(row)
    # 500 images a second on the device: 1e9 operations and 1e6 bytes; 100 of 300 bytes from wall.
    expected = "| torch cuda compiled | bf16 | 1 | 100.0 | 10.00 | 500.0 | 2.00 | 25.0% | 100.0% |"
    assert f"{expected} 30.0% | 1.0 |" in report.markdown()


def test_the_cpu_beside_a_gpu_is_not_held_against_the_gpus_ceilings(subject: Subject) -> None:
    report = Report(Ceilings({"fp32": 1e9}, memory=1e6, upload=1e5), "cuda")
    report.add_row(Row(subject, "torch cpu eager", "fp32", 2, 0.01, None, 0.0))
    assert "| 200.0 | 10.00 | - | - | - | - | - | 0.0 |" in report.markdown()
