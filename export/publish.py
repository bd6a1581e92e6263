"""Checkpoint -> proven package: built beside its place, renamed into it when it is whole."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from export.onnx import OPSET, export_onnx
from export.verify import compare, judge, torch_answers
from models.build import build_network
from models.checkpoints import load_checkpoint, save_weights
from models.package import (
    GOLDEN,
    LABELS,
    MANIFEST,
    MODEL,
    WEIGHTS,
    ArchitectureSpec,
    Evaluation,
    InputSpec,
    Manifest,
    Package,
    PackageError,
    Source,
    check_name,
    hash_files,
    open_package,
    parse_labels,
)
from models.serving import ServedModel
from models.variants import Architecture

TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class ExportRequest:
    """What to export and how to describe it.

    Attributes:
        variant: the name it was asked for by.
        architecture: the network.
        checkpoint: the weights' file.
        input: preprocessing; `input.size` is the side the graph is fixed to.
        out: the package directory to create.
        name: of the package; the directory's name when None.
        version: of the package; made from the hash of the weights when None.
        labels: a file with one label a line.
        head_norm_eps: of the norm in an `mlp` head; the checkpoint's own when None.
        ema: prefer the moving average in a training checkpoint.
        weights: put `weights.safetensors` into the package, for the torch backend.
        overwrite: replace a package that is there.
        evaluation: accuracy to state in the manifest, measured on the finished package.
    """

    variant: str
    architecture: Architecture
    checkpoint: Path
    input: InputSpec
    out: Path
    name: str | None = None
    version: str | None = None
    labels: Path | None = None
    head_norm_eps: float | None = None
    ema: bool = True
    weights: bool = True
    overwrite: bool = False
    evaluation: Callable[[Package], Evaluation] | None = None


def export_package(request: ExportRequest, progress: Callable[[str], None]) -> Package:
    """Export, prove and publish a package.

    Nothing appears at `request.out` before the proof has passed; what fails before leaves what was
    there as it was. A package that is replaced is absent for the moment between two renames.

    Args:
        request: what to do.
        progress: told of each step before it starts.

    Raises:
        CheckpointError: the checkpoint does not fit the architecture.
        VerificationError: the graph does not compute what the network computes.
        PackageError: the place is taken, or labels and classes differ.
        ValueError: the architecture does not run at this input size.
    """
    out = request.out.resolve()
    for name in (request.name or out.name, request.version or "1"):
        check_name(name)
    if out.exists() and not request.overwrite:
        raise PackageError(f"{request.out} exists already; choose another --out or add --overwrite")
    if out.exists() and not (out / MANIFEST).is_file():
        raise PackageError(f"{request.out} is no model package and stays; choose another --out")
    request.architecture.check_input_size(request.input.size)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that the rename stays within one file system.
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _fill(staging, request, progress)
        _publish(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return open_package(out)


def _fill(folder: Path, request: ExportRequest, progress: Callable[[str], None]) -> None:
    progress(f"reading {request.checkpoint.name}")
    checkpoint = load_checkpoint(request.checkpoint, ema=request.ema)
    if request.head_norm_eps is not None:
        checkpoint = replace(checkpoint, head_norm_eps=request.head_norm_eps)
    network = build_network(request.architecture, checkpoint)
    model = ServedModel(network, request.input).eval()
    if request.labels is not None:
        labels = parse_labels(request.labels, checkpoint.classes)
        (folder / LABELS).write_text("".join(f"{label}\n" for label in labels), "utf-8")
    if request.weights:
        save_weights(network.state_dict(), checkpoint.head_norm_eps, folder / WEIGHTS)
    reference = torch_answers(model, request.input.size)
    np.savez(folder / GOLDEN, logits=reference[0], embedding=reference[1])
    progress(f"tracing {request.variant} at {request.input.size} px")
    export_onnx(model, request.input.size, folder / MODEL)
    progress("proving it against torch")
    verification = compare(folder / MODEL, request.input.size, reference)
    judge(verification)
    manifest = Manifest(
        name=request.name or request.out.resolve().name,
        version=request.version or checkpoint.sha256[:12],
        variant=request.variant,
        architecture=ArchitectureSpec(**asdict(request.architecture)),
        classes=checkpoint.classes,
        embedding_dim=request.architecture.embedding_dim,
        head_norm_eps=checkpoint.head_norm_eps,
        input=request.input,
        precision="fp32",
        opset=OPSET,
        tools=tool_versions(),
        files=dict(hash_files(folder)),
        source=Source(
            file=request.checkpoint.name, sha256=checkpoint.sha256, layout=checkpoint.layout
        ),
        verification=verification,
    )
    if request.evaluation is not None:
        progress("evaluating it")
        evaluation = request.evaluation(Package(folder, manifest))
        manifest = manifest.model_copy(update={"evaluation": evaluation})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")


def _publish(staging: Path, out: Path) -> None:
    """Move a finished folder to its place; a package that was there goes only then."""
    for path in (*staging.iterdir(), staging):
        path.chmod(0o755 if path.is_dir() else 0o644)  # a service runs as another user
        _sync(path)
    replaced = staging.with_name(staging.name + ".replaced")
    if out.exists():
        out.rename(replaced)
    try:
        staging.rename(out)
    except BaseException:
        if replaced.exists():
            replaced.rename(out)
        raise
    _sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have what was written survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tool_versions() -> dict[str, str]:
    """Return what the package was made with, library -> version."""
    versions = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
