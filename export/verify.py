"""The proof: a package's graph against torch in float32, on fixed inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from models.build import load_served_model
from models.golden import golden_images
from models.onnx_runtime import import_onnxruntime
from models.package import (
    WEIGHTS,
    Manifest,
    Package,
    Verification,
)
from models.serving import ServedModel

Array = NDArray[np.float32]
Answers = tuple[Array, Array]
"""Logits float32 (N, C) and embeddings float32 (N, D)."""

BATCH_SIZES = (1, 2, 5)
IMAGES = max(BATCH_SIZES)

# Float32 sums in another order differ by about 1e-5 on logits of size one to ten (measured over
# all families); a wrong graph is off by far more than ten times that.
LOGIT_TOLERANCE = 1e-4
COSINE_TOLERANCE = 1e-6


class VerificationError(Exception):
    """A graph that does not compute what the network computes; one sentence with the numbers."""


def torch_answers(model: ServedModel, input_size: int) -> Answers:
    """Return the reference: torch in float32 on the golden images, in one batch."""
    with torch.inference_mode():
        logits, embedding = model(torch.from_numpy(golden_images(input_size, IMAGES)))
    return logits.numpy(), embedding.numpy()


def onnx_runner(path: Path) -> tuple[Callable[[NDArray[np.uint8]], Answers], str]:
    """Return a function that runs the graph on the CPU, and what runs it in words.

    Raises:
        VerificationError: onnxruntime is not installed, or cannot load the graph.
    """
    try:
        ort = import_onnxruntime()
    except ImportError as error:
        raise VerificationError(
            "verification runs the graph in onnxruntime; install metaserve[cpu]"
        ) from error
    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the library raises bare RuntimeErrors of its own making
        raise VerificationError(f"onnxruntime cannot load {path}: {error}") from error

    def run(images: NDArray[np.uint8]) -> Answers:
        try:
            logits, embedding = session.run(["logits", "embedding"], {"images": images})
        except Exception as error:
            raise VerificationError(f"onnxruntime cannot run {path}: {error}") from error
        return logits, embedding

    return run, f"onnxruntime {ort.__version__} CPUExecutionProvider"


def compare(path: Path, input_size: int, reference: Answers) -> Verification:
    """Run the graph at batches of 1, 2 and 5 and measure how far it is from the reference.

    Raises:
        VerificationError: the graph cannot be run, or answers with NaN or infinity.
    """
    run, runtime = onnx_runner(path)
    images = golden_images(input_size, IMAGES)
    answers = [_in_batches(run, images, size) for size in BATCH_SIZES]
    logits, embedding = reference
    if not all(np.isfinite(array).all() for pair in answers for array in pair):
        raise VerificationError(f"{path} answers with values that are not finite; export it again")
    shapes = {(left.shape, right.shape) for left, right in answers}
    if shapes != {(logits.shape, embedding.shape)}:
        raise VerificationError(f"{path} answers with shapes {shapes}, not those of the network")
    difference = np.stack([np.abs(actual - logits) for actual, _ in answers])
    distance = np.stack([cosine_distance(actual, embedding) for _, actual in answers])
    agreement = np.stack([actual.argmax(1) == logits.argmax(1) for actual, _ in answers])
    spread = np.ptp(np.stack([actual for actual, _ in answers]), axis=0)
    return Verification(
        max_abs_logit_difference=float(difference.max()),
        max_rel_logit_difference=float(
            (difference.max((0, 2)) / np.abs(logits).max(1).clip(1e-12)).max()
        ),
        max_embedding_cosine_distance=float(distance.max()),
        top1_agreement=float(agreement.mean()),
        batch_dependence=float(spread.max()),
        logit_tolerance=LOGIT_TOLERANCE,
        images=len(images),
        runtime=runtime,
    )


def verify_package(package: Package) -> Verification:
    """Repeat the proof of a package.

    The reference is torch on the package's weights where it holds them, else what torch answered
    when it was exported.

    Raises:
        PackageError: the package lacks a file.
        CheckpointError: its weights do not fit its architecture.
        VerificationError: its graph cannot be run.
    """
    size = package.manifest.input.size
    if WEIGHTS in package.manifest.files:
        reference = torch_answers(load_served_model(package), size)
    else:
        reference = package.golden
    return compare(package.model_path, size, reference)


def judge(verification: Verification) -> None:
    """Refuse a graph that is too far from the network.

    Raises:
        VerificationError: with the figures that are out of bounds.
    """
    faults = []
    if not verification.max_abs_logit_difference <= verification.logit_tolerance:
        faults.append(
            f"logits differ by {verification.max_abs_logit_difference:.2g} "
            f"({verification.logit_tolerance:.2g} is allowed)"
        )
    if not verification.max_embedding_cosine_distance <= COSINE_TOLERANCE:
        faults.append(
            f"embeddings are {verification.max_embedding_cosine_distance:.2g} apart in cosine "
            f"distance ({COSINE_TOLERANCE:.2g} is allowed)"
        )
    if verification.top1_agreement < 1:
        faults.append(f"the best class agrees on {verification.top1_agreement:.0%} of the images")
    if faults:
        raise VerificationError("the graph is not the network: " + "; ".join(faults))


def cosine_distance(left: Array, right: Array) -> NDArray[np.float64]:
    """Return 1 - cosine similarity of the rows of two (N, D) arrays, in float64."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    distance: NDArray[np.float64] = 1 - (a * b).sum(1) / norms.clip(1e-300)
    return distance


def format_verification(manifest: Manifest, verification: Verification) -> str:
    """Return the figures as the few lines a person wants to see."""
    return "\n".join(
        (
            f"{manifest.name} {manifest.version} ({manifest.variant}, {manifest.precision}) "
            f"in {verification.runtime}",
            f"  max |logit difference|    {verification.max_abs_logit_difference:.3g} "
            f"(relative {verification.max_rel_logit_difference:.3g}; "
            f"allowed {verification.logit_tolerance:.3g})",
            f"  embedding cosine distance {verification.max_embedding_cosine_distance:.3g}",
            f"  top-1 agreement           {verification.top1_agreement:.0%} of "
            f"{verification.images} images at batches {', '.join(map(str, BATCH_SIZES))}",
            f"  batch dependence          {verification.batch_dependence:.3g}",
        )
    )


def _in_batches(
    run: Callable[[NDArray[np.uint8]], Answers], images: NDArray[np.uint8], size: int
) -> Answers:
    parts = [run(images[start : start + size]) for start in range(0, len(images), size)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
