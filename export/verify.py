"""The proof: answers on fixed inputs against torch in float32, and the figures it is judged by."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from export.seams import Answers, Run
from models.build import load_served_model
from models.golden import golden_images
from models.package import WEIGHTS, Package, Verification
from models.serving import ServedModel
from models.tolerances import TOLERANCES, Precision, cosine_distance

BATCH_SIZES = (1, 2, 5)
IMAGES = max(BATCH_SIZES)


class VerificationError(Exception):
    """Answers that are not the network's; one sentence with the numbers."""


def torch_answers(model: ServedModel, input_size: int) -> Answers:
    """Return what torch answers to the golden images, in one batch."""
    return torch_run(model)(golden_images(input_size, IMAGES))


def torch_run(model: ServedModel) -> Run:
    """Return a function that runs a model in torch."""

    def run(images: NDArray[np.uint8]) -> Answers:
        with torch.inference_mode():
            logits, embedding = model(torch.from_numpy(images))
        return logits.numpy(), embedding.numpy()

    return run


def reference_of(package: Package) -> Answers:
    """Return torch in float32 on the package's weights, or its golden outputs for lack of them.

    Raises:
        PackageError: the package lacks a file.
        CheckpointError: its weights do not fit its architecture.
    """
    if WEIGHTS in package.manifest.files:
        return torch_answers(load_served_model(package), package.manifest.input.size)
    return package.golden


def compare(
    run: Run,
    runtime: str,
    input_size: int,
    reference: Answers,
    precision: Precision,
    max_batch_size: int | None = None,
) -> Verification:
    """Run batches of 1, 2 and 5 and measure how far the answers are from the reference.

    Args:
        run: what is proven.
        runtime: what that is, in words.
        input_size: S.
        reference: what torch in float32 answers.
        precision: that `run` computes in; sets the tolerances.
        max_batch_size: largest batch that `run` takes, None for any; larger ones are cut to it.

    Raises:
        VerificationError: it cannot be run, or answers with NaN or infinity.
    """
    images = golden_images(input_size, len(reference[0]))
    sizes = sorted({min(size, max_batch_size or size) for size in BATCH_SIZES})
    answers = [_in_batches(run, images, size) for size in sizes]
    logits, embedding = reference
    if not all(np.isfinite(array).all() for pair in answers for array in pair):
        raise VerificationError(f"{runtime} answers with values that are not finite")
    shapes = {(left.shape, right.shape) for left, right in answers}
    if shapes != {(logits.shape, embedding.shape)}:
        raise VerificationError(f"{runtime} answers with shapes {shapes}, not the network's")
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
        logit_tolerance=TOLERANCES[precision].allowed(logits),
        embedding_tolerance=TOLERANCES[precision].cosine,
        images=len(images),
        runtime=runtime,
    )


def judge(verification: Verification, precision: Precision) -> None:
    """Refuse answers that are too far from the network's.

    The best class must be the same in float32; in half precision two classes that are as probable
    may change places, and the bound on the logits speaks for all others.

    Raises:
        VerificationError: with the figures that are out of bounds.
    """
    faults = []
    if not verification.max_abs_logit_difference <= verification.logit_tolerance:
        faults.append(
            f"logits differ by {verification.max_abs_logit_difference:.2g} "
            f"({verification.logit_tolerance:.2g} is allowed)"
        )
    if not verification.max_embedding_cosine_distance <= verification.embedding_tolerance:
        faults.append(
            f"embeddings are {verification.max_embedding_cosine_distance:.2g} apart in cosine "
            f"distance ({verification.embedding_tolerance:.2g} is allowed)"
        )
    if precision == "fp32" and verification.top1_agreement < 1:
        faults.append(f"the best class agrees on {verification.top1_agreement:.0%} of the images")
    if faults:
        raise VerificationError(
            f"{verification.runtime} does not compute the network in {precision}: "
            + "; ".join(faults)
        )


def _in_batches(run: Run, images: NDArray[np.uint8], size: int) -> Answers:
    parts = [run(images[start : start + size]) for start in range(0, len(images), size)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
