"""`metaserve verify`: a package in, the figures of its proof out."""

from __future__ import annotations

import argparse
from pathlib import Path

from export.cli import NEEDS_EXTRAS, refuse
from export.seams import Answers, CannotStart, OpenBackend
from models.package import (
    MANIFEST,
    WEIGHTS,
    BackendProof,
    Package,
    PackageError,
    Verification,
    find_package,
    open_package,
)

BACKENDS = ("onnxruntime", "torch", "tensorrt", "triton")


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `metaserve verify`."""
    parser.add_argument("package", help="a package directory, or a name in the store")
    parser.add_argument(
        "--backends",
        type=_backends,
        metavar="NAMES",
        help="prove these backends, for example onnxruntime,torch,triton, and store the table in "
        "the manifest",
    )


def run_verify(arguments: argparse.Namespace, store: Path | None, open_backend: OpenBackend) -> int:
    """Repeat the proof of a package, or prove backends on it; returns the exit code.

    Args:
        arguments: as described by `add_verify_arguments`.
        store: the model store.
        open_backend: starts a backend of the service.
    """
    try:
        from export.proofs import format_proofs, format_verification
        from export.verify import VerificationError, reference_of
        from models.checkpoints import CheckpointError
    except ImportError as error:
        return refuse(NEEDS_EXTRAS.format(error.name))

    try:
        package = open_package(find_package(arguments.package, store))
        package.check_files()
        reference, manifest = reference_of(package), package.manifest
        if arguments.backends:
            return _prove_backends(package, reference, arguments, open_backend)
        verification, proofs = _prove_graph(package, reference)
        print(format_verification(manifest, verification))
        if proofs:
            print(format_proofs(proofs))
    except (CheckpointError, PackageError, VerificationError) as error:
        return refuse(error)
    against = "torch on its weights" if WEIGHTS in manifest.files else "its golden outputs"
    print(f"proven: {package.path} holds the files of its manifest and agrees with {against}")
    return 0


def _prove_graph(
    package: Package, reference: Answers
) -> tuple[Verification, tuple[BackendProof, ...]]:
    """Repeat the proof of the export."""
    from export.graph_proof import prove_graph
    from models.build import load_served_model
    from models.precision import cast_network

    manifest, served = package.manifest, None
    if WEIGHTS in manifest.files and manifest.precision != "fp32":
        served = load_served_model(package)
        served.network = cast_network(served.network, manifest.precision)
    size = manifest.input.size
    return prove_graph(package.model_path, size, manifest.precision, reference, served)


def _prove_backends(
    package: Package,
    reference: Answers,
    arguments: argparse.Namespace,
    open_backend: OpenBackend,
) -> int:
    """Prove each backend that was asked for, print the table and store it."""
    from export.proofs import format_proofs, prove, store_proofs
    from export.verify import VerificationError

    proofs, failed, faults = [], [], []
    for name in arguments.backends:
        try:
            candidate = open_backend(name, package)
        except CannotStart as error:
            faults.append(f"{name}: {error}")
            continue
        try:
            proofs.append(prove(candidate, package, reference))
        except VerificationError as error:
            failed.append(candidate)
            faults.append(f"{name}: {error}")
        finally:
            candidate.close()
    if proofs:
        print(format_proofs(proofs))
    if proofs or failed:
        try:
            store_proofs(package, proofs, failed)
            print(f"stored in {package.path / MANIFEST}")
        except OSError as error:
            print(f"not stored, {package.path} cannot be written: {error.strerror}")
    for fault in faults:
        refuse(fault)
    return 2 if faults else 0


def _backends(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is no backend; choose among {','.join(BACKENDS)}"
        )
    return names
