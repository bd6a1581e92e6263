"""One table of proof: what each backend answers, against torch in float32."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.seams import Answers, Candidate
from export.staging import write_whole
from export.verify import BATCH_SIZES, VerificationError, compare, judge
from models.package import MANIFEST, BackendProof, Manifest, Package, Verification


def prove(candidate: Candidate, package: Package, reference: Answers) -> BackendProof:
    """Measure a backend against the reference.

    Raises:
        VerificationError: it cannot be run, or is too far from the network.
    """

    def run(images: NDArray[np.uint8]) -> Answers:
        try:
            return candidate.run(images)
        except Exception as error:  # each library has errors of its own
            message = f"{candidate.runtime} cannot run {package.path}: {error}"
            raise VerificationError(message) from error

    size, precision = package.manifest.input.size, candidate.precision
    verification = compare(
        run, candidate.runtime, size, reference, precision, candidate.max_batch_size
    )
    judge(verification, precision)
    return BackendProof(
        **verification.model_dump(),
        backend=candidate.backend,
        precision=precision,
        device=candidate.device,
    )


def store_proofs(
    package: Package, proofs: Sequence[BackendProof], failed: Sequence[Candidate] = ()
) -> Package:
    """Write proofs into the manifest, in place of older ones of the same backends.

    Args:
        package: where to store them.
        proofs: that passed.
        failed: backends that did not; what they proved before does not count any more.

    Raises:
        OSError: the package cannot be written; it stays as it was.
    """
    stale = {_key(candidate)[:3] for candidate in failed}
    older = [proof for proof in package.manifest.proofs if _key(proof)[:3] not in stale]
    fresh = {_key(proof): proof for proof in (*older, *proofs)}
    manifest = package.manifest.model_copy(update={"proofs": tuple(fresh.values())})
    replace_manifest(package.path, manifest)
    return Package(package.path, manifest)


def replace_manifest(folder: Path, manifest: Manifest) -> None:
    """Exchange a package's manifest in one step; a reader sees the old one or the new one.

    Raises:
        OSError: it cannot be written.
    """
    write_whole(folder / MANIFEST, f"{manifest.model_dump_json(indent=2)}\n".encode())


def format_verification(manifest: Manifest, verification: Verification) -> str:
    """Return the figures of one proof as the few lines a person wants to see."""
    return "\n".join(
        (
            f"{manifest.name} {manifest.version} ({manifest.variant}, {manifest.precision}) "
            f"in {verification.runtime}",
            f"  max |logit difference|    {verification.max_abs_logit_difference:.3g} "
            f"(relative {verification.max_rel_logit_difference:.3g}; "
            f"allowed {verification.logit_tolerance:.3g})",
            f"  embedding cosine distance {verification.max_embedding_cosine_distance:.3g} "
            f"(allowed {verification.embedding_tolerance:.3g})",
            f"  top-1 agreement           {verification.top1_agreement:.0%} of "
            f"{verification.images} images at batches {', '.join(map(str, BATCH_SIZES))}",
            f"  batch dependence          {verification.batch_dependence:.3g}",
        )
    )


def format_proofs(proofs: Sequence[BackendProof]) -> str:
    """Return the table that a person wants to see."""
    rows = [
        ("backend", "precision", "device", "max |dlogit|", "allowed", "cosine", "top-1", "batch"),
        *(
            (
                proof.backend,
                proof.precision,
                proof.device,
                f"{proof.max_abs_logit_difference:.2e}",
                f"{proof.logit_tolerance:.1e}",
                f"{proof.max_embedding_cosine_distance:.1e}",
                f"{proof.top1_agreement:.0%}",
                f"{proof.batch_dependence:.1e}",
            )
            for proof in proofs
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def _key(proven: BackendProof | Candidate) -> tuple[str, str, str, str]:
    """Return what a row stands for: the way it computes, in words without numbers and places."""
    path = re.sub(r" at \S+| for batches of .*|,? \d+ threads?|\b\d[\w.+]*", "", proven.runtime)
    return proven.backend, proven.precision, proven.device, path
