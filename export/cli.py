"""`metaserve export` and `metaserve verify`: arguments in, packages and figures out."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from export.candidate import Answers, CannotStart, OpenBackend
from models.package import (
    MANIFEST,
    WEIGHTS,
    Calibration,
    InputSpec,
    Package,
    PackageError,
    find_package,
    open_package,
)
from models.tolerances import Precision
from models.variants import (
    Activation,
    Architecture,
    Mixer,
    ResidualScaling,
)

BACKENDS = ("onnxruntime", "torch", "tensorrt", "triton")
NEEDS_EXTRAS = "this needs {}; install metaserve[export,cpu] (in a checkout: make export-tools)"


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `metaserve export`."""
    parser.add_argument(
        "variant", help="a name from `metaserve models`, or hf-hub:USER/REPOSITORY for your own"
    )
    _add_source_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="package to create [VARIANT]")
    parser.add_argument("--name", help="name of the package [the directory's name]")
    parser.add_argument("--version", help="version of the package [hash of the weights]")
    parser.add_argument("--format", choices=["onnx"], default="onnx")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="fp32",
        help="of the graph; bf16 runs in torch and TensorRT alone, fp16 everywhere [%(default)s]",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a package at --out")
    parser.add_argument("--no-ema", action="store_true", help="take the weights, not their average")
    parser.add_argument(
        "--no-weights", action="store_true", help=f"leave out {WEIGHTS} (the torch backend's)"
    )
    parser.add_argument(
        "--head-norm-eps",
        type=float,
        metavar="EPS",
        help="of the norm in the head [1e-5 for official files, 1e-6 for timm's]",
    )
    shape = parser.add_argument_group(
        "preprocessing", "defaults are those of config.json, or of the published weights"
    )
    shape.add_argument("--input-size", type=int, metavar="PX")
    shape.add_argument("--crop-pct", type=float)
    shape.add_argument("--interpolation", choices=["bicubic", "bilinear"])
    shape.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"))
    shape.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"))
    ablation = parser.add_argument_group(
        "ablations", "for checkpoints that differ from the paper's"
    )
    ablation.add_argument("--activation", choices=get_args(Activation))
    ablation.add_argument("--residual-scaling", choices=get_args(ResidualScaling))
    ablation.add_argument("--block-bias", action="store_true", default=None)
    ablation.add_argument(
        "--mixers", nargs=4, choices=get_args(Mixer), metavar="MIXER", help="one a stage"
    )


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_argument_group("weights", "downloaded from the hub unless a file is given")
    source.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the weights: .safetensors, .pth, .pt or .bin, in the official layout, timm's or ours",
    )
    source.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="timm's config.json of that file: labels and preprocessing",
    )
    source.add_argument(
        "--labels",
        metavar="FILE",
        help="one label a line, or a .json with label_names, or imagenet-1k, or imagenet-21k",
    )
    source.add_argument("--revision", metavar="REV", help="branch, tag or commit to download")
    source.add_argument("--sha256", metavar="HEX", help="what the weights' file must have")


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe `metaserve verify`."""
    parser.add_argument("package", help="a package directory, or a name in the store")
    parser.add_argument("--model-store", type=Path, metavar="DIR")
    parser.add_argument(
        "--backends",
        type=_backends,
        metavar="NAMES",
        help="prove these backends, for example onnxruntime,torch,triton, and store the table in "
        "the manifest",
    )


def run_export(arguments: argparse.Namespace) -> int:
    """Export a package; returns the exit code."""
    try:
        # torch is loaded here and not before: `metaserve serve` shares this parser.
        from export.calibration import OverflowsFloat16
        from export.proofs import format_proofs, format_verification
        from export.publish import ExportRequest, export_package
        from export.source import SourceError, Wanted, find_source
        from export.verify import VerificationError
        from models.checkpoints import CheckpointError
    except ImportError as error:
        return _refuse(NEEDS_EXTRAS.format(error.name))

    eps = arguments.head_norm_eps
    if eps is not None and not 0 < eps < 1:
        return _refuse(f"--head-norm-eps {eps} is no small positive number; 1e-6 is usual")
    wanted = Wanted(
        variant=arguments.variant,
        checkpoint=arguments.checkpoint,
        config=arguments.config,
        labels=arguments.labels,
        revision=arguments.revision,
        sha256=arguments.sha256,
    )
    try:
        # Lines, not steps: the progress bar of a download writes between them.
        source = find_source(wanted, lambda line: print(line, file=sys.stderr))
        architecture = _ablated(source.architecture, arguments)
        input_spec = _input_spec(architecture, source.preprocessing, arguments)
        architecture.check_input_size(input_spec.size)
    except (SourceError, PackageError, ValueError) as error:
        return _refuse(error)
    except OSError as error:
        return _refuse(f"{error.filename} cannot be read: {error.strerror}")
    request = ExportRequest(
        variant=source.variant,
        architecture=architecture,
        checkpoint=source.checkpoint,
        input=input_spec,
        out=arguments.out or Path(source.variant),
        name=arguments.name,
        version=arguments.version,
        names=source.names,
        classes=source.classes,
        file=source.file,
        repository=source.repository,
        commit=source.commit,
        head_norm_eps=eps,
        ema=not arguments.no_ema,
        precision=arguments.precision,
        weights=not arguments.no_weights,
        overwrite=arguments.overwrite,
        report=None if arguments.precision == "fp32" else _report,
    )
    try:
        with _Steps() as progress:
            package = export_package(request, progress)
    except OverflowsFloat16 as error:
        return _refuse(error)
    except (CheckpointError, PackageError, VerificationError) as error:
        return _refuse(error)
    except OSError as error:
        return _refuse(f"the package cannot be written: {error}")
    manifest = package.manifest
    print(format_verification(manifest, manifest.verification))
    if manifest.proofs:
        print(format_proofs(manifest.proofs))
    print(f"wrote {package.path}; serve it with: metaserve serve --model {package.path}")
    return 0


def run_verify(arguments: argparse.Namespace, open_backend: OpenBackend) -> int:
    """Repeat the proof of a package, or prove backends on it; returns the exit code.

    Args:
        arguments: as described by `add_verify_arguments`.
        open_backend: starts a backend of the service.
    """
    try:
        from export.graph_runner import graph_run
        from export.proofs import format_verification
        from export.verify import VerificationError, compare, judge, reference_of
        from models.checkpoints import CheckpointError
    except ImportError as error:
        return _refuse(NEEDS_EXTRAS.format(error.name))

    try:
        package = open_package(find_package(arguments.package, arguments.model_store))
        package.check_files()
        reference, manifest = reference_of(package), package.manifest
        if arguments.backends:
            return _prove_backends(package, reference, arguments, open_backend)
        run, runtime = graph_run(package.model_path)
        verification = compare(run, runtime, manifest.input.size, reference, manifest.precision)
        print(format_verification(manifest, verification))
        judge(verification, manifest.precision)
    except (CheckpointError, PackageError, VerificationError) as error:
        return _refuse(error)
    against = "torch on its weights" if WEIGHTS in manifest.files else "its golden outputs"
    print(f"proven: {package.path} holds the files of its manifest and agrees with {against}")
    return 0


def _prove_backends(
    package: Package,
    reference: Answers,
    arguments: argparse.Namespace,
    open_backend: OpenBackend,
) -> int:
    """Prove each backend that was asked for, print the table and store it."""
    from export.proofs import format_proofs, prove, store_proofs
    from export.verify import VerificationError

    proofs, faults = [], []
    for name in arguments.backends:
        try:
            candidate = open_backend(name, package)
        except CannotStart as error:
            faults.append(f"{name}: {error}")
            continue
        try:
            proofs.append(prove(candidate, package, reference))
        except VerificationError as error:
            faults.append(f"{name}: {error}")
        finally:
            candidate.close()
    if proofs:
        print(format_proofs(proofs))
        try:
            store_proofs(package, proofs)
            print(f"stored in {package.path / MANIFEST}")
        except OSError as error:
            print(f"not stored, {package.path} cannot be written: {error.strerror}")
    for fault in faults:
        _refuse(fault)
    return 2 if faults else 0


def _backends(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    unknown = [name for name in names if name not in BACKENDS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is no backend; choose among {','.join(BACKENDS)}"
        )
    return names


def _report(calibration: Calibration) -> None:
    from export.calibration import format_calibration

    print(f"\n{format_calibration(calibration)}", file=sys.stderr)


def _ablated(architecture: Architecture, arguments: argparse.Namespace) -> Architecture:
    """Return the architecture with the fields that the command line changes."""
    fields = ("activation", "residual_scaling", "block_bias", "mixers", "input_size")
    given = {name: getattr(arguments, name) for name in fields}
    changes = {name: value for name, value in given.items() if value is not None}
    if "mixers" in changes:
        changes["mixers"] = tuple(changes["mixers"])
    # Random matrices are as large as the grid was in training: another size is another network,
    # which `check_input_size` refuses.
    if "random" in architecture.mixers:
        changes.pop("input_size", None)
    return replace(architecture, **changes)


def _input_spec(
    architecture: Architecture, stated: Mapping[str, Any], arguments: argparse.Namespace
) -> InputSpec:
    """Return the preprocessing: flags go before what belongs to the weights."""
    flags = {"size": arguments.input_size} | {
        name: getattr(arguments, name) for name in ("crop_pct", "interpolation", "mean", "std")
    }
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return InputSpec.model_validate({"size": architecture.input_size, **stated, **given})
    except ValidationError as error:
        fault = error.errors()[0]
        name = str(fault["loc"][0])
        flag = f"--{name.replace('_', '-').replace('size', 'input-size')}"
        where = flag if name in given else f"{name} in config.json:"
        raise ValueError(f"{where} {fault['input']}: {fault['msg'].lower()}") from error


class _Steps:
    """Prints each step of long work with the time it took."""

    def __enter__(self) -> Callable[[str], None]:
        self._started_at: float | None = None
        return self._next

    def __exit__(self, *_: object) -> None:
        self._end()

    def _next(self, step: str) -> None:
        self._end()
        print(f"{step} ...", end=" ", flush=True, file=sys.stderr)
        self._started_at = time.monotonic()

    def _end(self) -> None:
        if self._started_at is not None:
            print(f"{time.monotonic() - self._started_at:.1f} s", file=sys.stderr)


def _refuse(error: Exception | str) -> int:
    print(f"metaserve: {error}", file=sys.stderr)
    return 2
