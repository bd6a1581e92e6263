"""Checkpoint -> proven package."""

from __future__ import annotations

import platform
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.calibration import calibrate, check_float16
from export.graph_proof import prove_graph
from export.onnx import OPSET, OPSET_BFLOAT16, export_onnx
from export.seams import Answers
from export.staging import check_place, staged
from export.verify import IMAGES, VerificationError
from export.weights import Weights
from models.build import build_network
from models.checkpoints import Checkpoint, load_checkpoint, save_weights
from models.golden import golden_images
from models.metaformer import MetaFormer
from models.package import (
    GOLDEN,
    MANIFEST,
    MODEL,
    WEIGHTS,
    ArchitectureSpec,
    Calibration,
    Evaluation,
    InputSpec,
    Manifest,
    Package,
    PackageError,
    Source,
    check_name,
    hash_files,
    open_package,
)
from models.precision import cast_network
from models.serving import ServedModel
from models.tolerances import Precision
from models.variants import Architecture

TOOLS = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class ExportRequest:
    """What to export and how to describe it.

    Attributes:
        weights: the checkpoint and what is known of it.
        architecture: the network, with what the command line changes of the weights' own.
        input: preprocessing; `input.size` is the side the graph is fixed to.
        out: the package directory to create.
        name: of the package; the directory's name when None.
        version: of the package; made from the hash of the weights when None.
        precision: of the graph; the weights file stays in float32.
        head_norm_eps: of the norm in an `mlp` head; the checkpoint's own when None.
        ema: prefer the moving average in a training checkpoint.
        keep_weights: put `weights.safetensors` into the package, for the torch backend.
        overwrite: replace a package that is there.
        calibration_images: real ones, uint8 (N, S, S, 3), beside the golden ones.
        report: is shown the range of the activations.
        evaluation: accuracy to state in the manifest, measured on the finished package.
    """

    weights: Weights
    architecture: Architecture
    input: InputSpec
    out: Path
    name: str | None = None
    version: str | None = None
    precision: Precision = "fp32"
    head_norm_eps: float | None = None
    ema: bool = True
    keep_weights: bool = True
    overwrite: bool = False
    calibration_images: NDArray[np.uint8] | None = None
    report: Callable[[Calibration], None] | None = None
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
        OverflowsFloat16: `fp16` was asked for, and does not hold the network's activations.
        PackageError: the place is taken, or labels and classes differ.
        ValueError: the architecture does not run at this input size.
    """
    out = request.out.resolve()
    for name in (request.name or out.name, request.version or "1"):
        check_name(name)
    check_place(request.out, overwrite=request.overwrite)
    request.architecture.check_input_size(request.input.size)
    with staged(out) as staging:
        _fill(staging, request, progress)
    return open_package(out)


def _fill(folder: Path, request: ExportRequest, progress: Callable[[str], None]) -> None:
    progress(f"reading {request.weights.checkpoint.name}")
    checkpoint = _read_checkpoint(request)
    network = build_network(request.architecture, checkpoint)
    if request.weights.names is not None:
        request.weights.names.write(folder, checkpoint.classes)
    if request.keep_weights:
        save_weights(network.state_dict(), checkpoint.head_norm_eps, folder / WEIGHTS)
    reference, calibration = _calibrate(network, request)
    np.savez(folder / GOLDEN, logits=reference[0], embedding=reference[1])
    size, precision = request.input.size, request.precision
    served = ServedModel(cast_network(deepcopy(network), precision), request.input).eval()
    progress(f"tracing {request.weights.variant} in {precision} at {size} px")
    export_onnx(served, size, folder / MODEL)
    progress("proving it against torch in float32")
    try:
        verification, proofs = prove_graph(folder / MODEL, size, precision, reference, served)
    except VerificationError as error:
        hint = "; use --precision bf16" if precision == "fp16" else ""
        raise VerificationError(f"{error}{hint}") from error
    manifest = Manifest(
        **_description(folder, checkpoint, request),
        verification=verification,
        proofs=proofs,
        calibration=calibration,
    )
    if request.evaluation is not None:
        progress("evaluating it")
        evaluation = request.evaluation(Package(folder, manifest))
        manifest = manifest.model_copy(update={"evaluation": evaluation})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", "utf-8")


def _read_checkpoint(request: ExportRequest) -> Checkpoint:
    """Return the checkpoint with the epsilon and the classes that were asked for."""
    path, classes = request.weights.checkpoint, request.weights.classes
    checkpoint = load_checkpoint(path, ema=request.ema)
    if classes not in (None, checkpoint.classes):
        raise PackageError(
            f"{path.name} has {checkpoint.classes} classes, and {classes} are stated for it"
        )
    if request.head_norm_eps is None:
        return checkpoint
    return replace(checkpoint, head_norm_eps=request.head_norm_eps)


def _calibrate(network: MetaFormer, request: ExportRequest) -> tuple[Answers, Calibration]:
    """Return the reference of the proof, and how large activations grow on the way to it."""
    model = ServedModel(network, request.input).eval()
    try:
        golden = golden_images(request.input.size, IMAGES)
        reference, calibration = calibrate(model, golden, request.calibration_images)
    except VerificationError as error:
        name = request.weights.checkpoint.name
        raise VerificationError(f"{name} is broken: {error}") from error
    if request.report is not None:
        request.report(calibration)
    if request.precision == "fp16":
        check_float16(calibration)
    return reference, calibration


def _description(folder: Path, checkpoint: Checkpoint, request: ExportRequest) -> dict[str, Any]:
    """Return the fields of the manifest that say what the package is."""
    weights, precision = request.weights, request.precision
    return {
        "name": request.name or request.out.resolve().name,
        "version": request.version or checkpoint.sha256[:12],
        "variant": weights.variant,
        "architecture": ArchitectureSpec(**asdict(request.architecture)),
        "classes": checkpoint.classes,
        "embedding_dim": request.architecture.embedding_dim,
        "head_norm_eps": checkpoint.head_norm_eps,
        "input": request.input,
        "precision": precision,
        "opset": OPSET_BFLOAT16 if precision == "bf16" else OPSET,
        "tools": tool_versions(),
        "files": dict(hash_files(folder)),
        "source": Source(
            file=weights.file,
            sha256=checkpoint.sha256,
            layout=checkpoint.layout,
            repository=weights.repository,
            commit=weights.commit,
        ),
    }


def tool_versions() -> dict[str, str]:
    """Return what the package was made with, library -> version."""
    versions = {"python": platform.python_version()}
    for name in TOOLS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
