"""Rows of a measurement, as lines that are printed as they come and as a Markdown table."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from app.errors import first_line
from benchmarks.gpu_ceilings import Ceilings
from benchmarks.gpu_models import Subject
from models.tolerances import Precision

LIBRARIES = (
    "torch",
    "triton",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "onnx",
    "onnxscript",
    "numpy",
)


@dataclass(frozen=True)
class Check:
    """How far a candidate is from torch in float32 on the golden images."""

    variant: str
    name: str
    precision: Precision
    words: str
    difference: float
    allowed: float
    cosine_distance: float
    allowed_cosine_distance: float
    top1: float

    @property
    def passed(self) -> bool:
        """Whether it is as near as its precision must be."""
        near = self.difference <= self.allowed
        return near and self.cosine_distance <= self.allowed_cosine_distance


@dataclass(frozen=True)
class Row:
    """A candidate at one batch size; seconds are of one batch.

    Attributes:
        subject: the network.
        name: of the candidate.
        precision: of the weights.
        bucket: images in the batch.
        wall_seconds: from host memory to host memory.
        device_seconds: on the device alone, where that can be measured.
        prepare_seconds: until the size was ready: loading, compiling, capturing.
    """

    subject: Subject
    name: str
    precision: Precision
    bucket: int
    wall_seconds: float
    device_seconds: float | None
    prepare_seconds: float


@dataclass
class Report:
    """Everything found so far; printed line by line, written whole after each."""

    ceilings: Ceilings
    device: str
    out: Path | None = None
    checks: list[Check] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    failed: bool = False

    def add_check(self, check: Check) -> None:
        """Print and keep."""
        self.checks.append(check)
        self._say(
            f"{check.name} {check.precision}: {'agrees' if check.passed else 'DISAGREES'} with "
            f"torch fp32: |dlogit| {check.difference:.2g} (allowed {check.allowed:.2g}), cosine "
            f"distance {check.cosine_distance:.2g}, top-1 {check.top1:.0%}  [{check.words}]"
        )

    def add_row(self, row: Row) -> None:
        """Print and keep."""
        self.rows.append(row)
        cells = dict(zip(_HEADINGS, self._cells(row), strict=True))
        self._say("  ".join(f"{heading} {cell}" for heading, cell in cells.items()))

    def add_failure(self, what: str, error: Exception) -> None:
        """Print and keep; a size that does not fit into memory is none."""
        said = f"{type(error).__name__}: {first_line(error)}"
        self.failed = self.failed or "out of memory" not in said.lower()
        self.add_missing(what, said)

    def add_missing(self, what: str, reason: str) -> None:
        """Print and keep, once."""
        line = f"{what}: {reason}"
        if line not in self.missing:
            self.missing.append(line)
            self._say(f"not measured: {line}")

    def markdown(self) -> str:
        """Return the whole as Markdown."""
        table = [list(_HEADINGS), ["---"] * 3 + ["---:"] * (len(_HEADINGS) - 3)]
        table += [self._cells(row) for row in self.rows]
        checks = [
            ["variant", "backend", "precision", "max dlogit", "allowed", "cosine", "top-1", "path"],
            ["---"] * 8,
            *(
                [
                    one.variant,
                    one.name,
                    one.precision,
                    f"{one.difference:.2g}" + ("" if one.passed else " **too far**"),
                    f"{one.allowed:.2g}",
                    f"{one.cosine_distance:.2g}",
                    f"{one.top1:.0%}",
                    one.words,
                ]
                for one in self.checks
            ),
        ]
        return "\n\n".join(
            [
                describe_machine(self.device),
                f"Ceilings measured in the same run: {self._ceilings()}.",
                "Against torch in fp32 on the CPU, on the golden images:",
                _lines(checks),
                "One batch; img/s and ms from host memory to host memory, `device` without the "
                "copies and the host. Shares are of the device's time where it is known: of the "
                "matrix product's rate, of the memory's (counting what convolutions and linear "
                "layers read and write, and nothing else), and of the upload's.",
                _lines(table),
                "\n".join(f"- not measured: {line}" for line in self.missing),
            ]
        ).strip()

    def _cells(self, row: Row) -> list[str]:
        seconds = row.device_seconds or row.wall_seconds
        rate = row.bucket / seconds
        peak = self.ceilings.flops.get(row.precision)
        traffic = row.subject.traffic_bytes(row.precision, row.bucket)
        pixels = 3 * row.subject.input_size**2
        upload = self.ceilings.upload if "cuda" in row.name or "tensorrt" in row.name else None
        # The CPU beside a GPU has no ceilings of its own in this run.
        own = "cpu" not in row.name or self.device == "cpu"
        device = row.device_seconds
        return [
            row.subject.variant,
            row.name,
            row.precision,
            str(row.bucket),
            f"{row.bucket / row.wall_seconds:.1f}",
            f"{row.wall_seconds * 1e3:.2f}",
            "-" if device is None else f"{row.bucket / device:.1f}",
            "-" if device is None else f"{device * 1e3:.2f}",
            f"{rate * row.subject.flops / peak:.1%}" if peak and own else "-",
            f"{rate * traffic / self.ceilings.memory:.1%}" if own else "-",
            f"{row.bucket / row.wall_seconds * pixels / upload:.1%}" if upload else "-",
            f"{row.prepare_seconds:.1f}",
        ]

    def _ceilings(self) -> str:
        parts = [
            f"{name} matrix product {rate / 1e12:.3g} TFLOP/s"
            for name, rate in self.ceilings.flops.items()
        ]
        parts.append(f"memory {self.ceilings.memory / 1e9:.3g} GB/s")
        if self.ceilings.upload:
            parts.append(f"pinned upload {self.ceilings.upload / 1e9:.3g} GB/s")
        return ", ".join(parts)

    def _say(self, line: str) -> None:
        print(line, flush=True)
        if self.out is not None:
            self.out.write_text(self.markdown() + "\n", "utf-8")


_HEADINGS = (
    "variant",
    "backend",
    "precision",
    "batch",
    "img/s",
    "ms",
    "device img/s",
    "device ms",
    "of arithmetic",
    "of memory",
    "of upload",
    "prepare s",
)


def _lines(table: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in table)


def describe_machine(device: str) -> str:
    """Return machine, driver, versions and date in a few lines."""
    lines = [f"Date: {datetime.now(UTC):%Y-%m-%d}", f"Processor: {_processor()}"]
    if device == "cuda":
        lines.append(f"GPU: {_gpu()}")
    lines.append(f"Versions: Python {platform.python_version()}, {_versions()}")
    return "  \n".join(lines)


def _processor() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in info.splitlines() if "model name" in line]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def _gpu() -> str:
    """Return name, memory and driver, as nvidia-smi says them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown, there is no nvidia-smi"
    fields = "--query-gpu=name,memory.total,driver_version"
    done = subprocess.run(
        [tool, fields, "--format=csv,noheader"], capture_output=True, text=True, timeout=60
    )
    return (done.stdout or done.stderr).strip().replace("\n", "; ")


def _versions() -> str:
    found = []
    for name in LIBRARIES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)
