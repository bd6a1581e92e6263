"""`metaserve export`: arguments in; a proven package, an engine or a Triton model out."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from export.arguments import (
    MAX_BATCH_SIZE,
    ablated,
    describes_weights,
    input_spec,
    refuse_idle_flags,
)
from export.seams import ReadImage
from models.package import (
    Calibration,
    Package,
    PackageError,
    PackageNotFound,
    find_package,
    open_package,
)
from models.tolerances import Precision
from models.variants import find_variant

NEEDS_EXTRAS = "this needs {}; install metaserve[export,cpu] (in a checkout: make export-tools)"


def run_export(arguments: argparse.Namespace, store: Path | None, read_image: ReadImage) -> int:
    """Export; returns the exit code.

    Args:
        arguments: as described by `add_export_arguments`.
        store: the model store, where VARIANT may be the name of a package.
        read_image: the service's.
    """
    try:
        # torch is loaded here and not before: `metaserve serve` shares this parser.
        from export.calibration import OverflowsFloat16
        from export.source import SourceError
        from export.verify import VerificationError
        from models.checkpoints import CheckpointError
    except ImportError as error:
        return refuse(NEEDS_EXTRAS.format(error.name))
    if arguments.place is not None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    run = {"onnx": _export_onnx, "tensorrt": _export_plan, "triton": _export_repository}
    try:
        given = _given_package(arguments, store)
        try:
            refuse_idle_flags(arguments, of_a_package=given is not None)
        except ValueError as error:
            return refuse(error)
        run[arguments.format](arguments, given, read_image)
    except OSError as error:
        return refuse(f"a file cannot be read or written: {error}")
    except (
        CheckpointError,
        OverflowsFloat16,
        PackageError,
        SourceError,
        VerificationError,
    ) as error:
        return refuse(error)
    return 0


def _export_onnx(
    arguments: argparse.Namespace, given: Package | None, read_image: ReadImage
) -> None:
    if given is not None:
        raise PackageError(
            f"{given.path} is a package already; --format tensorrt or triton makes more of it"
        )
    out = arguments.out or Path(_plain_name(arguments))
    package = _export_package(arguments, out, read_image)
    backend = " --backend torch" if package.manifest.precision == "bf16" else ""
    print(f"wrote {package.path}; serve it with: metaserve serve --model {package.path}{backend}")


def _export_plan(
    arguments: argparse.Namespace, given: Package | None, read_image: ReadImage
) -> None:
    from export.plan import add_plan, load_builder

    trt = load_builder()  # first: without a GPU there is nothing to build, whatever is exported
    out = arguments.out or Path(_plain_name(arguments))
    package = given or _export_package(arguments, out, read_image)
    with _steps() as progress, _bar() as share:
        package = add_plan(
            package,
            out,
            trt,
            max_batch_size=arguments.max_batch_size or MAX_BATCH_SIZE,
            cache=arguments.engine_cache,
            overwrite=arguments.overwrite or given is None,
            progress=progress,
            share=share,
        )
    print(
        f"wrote {package.path}; prove it with: metaserve verify --backends tensorrt {package.path}"
    )


def _export_repository(
    arguments: argparse.Namespace, given: Package | None, read_image: ReadImage
) -> None:
    from export.triton import BUILD_PLAN, Device, Platform, check_target, write_repository

    root, overwrite = arguments.out or Path("model_repository"), arguments.overwrite
    platform: Platform = arguments.triton_platform or "onnxruntime"
    device: Device = arguments.triton_device or "auto"
    with tempfile.TemporaryDirectory(prefix="metaserve.export.") as folder:
        new = Path(folder) / _plain_name(arguments)
        precision: Precision = arguments.precision or "fp32"
        if given is None:  # told before minutes of work
            check_target(root, new.name, precision, platform, device, overwrite=overwrite)
        package = given or _export_package(arguments, new, read_image)
        model = write_repository(
            package,
            root,
            name=arguments.name,
            max_batch_size=arguments.max_batch_size or MAX_BATCH_SIZE,
            platform=platform,
            device=device,
            overwrite=overwrite,
        )
    if platform == "tensorrt":
        print(f"wrote {model}; run {model / '1' / BUILD_PLAN} where Triton will run, then", end=" ")
    else:
        print(f"wrote {model};", end=" ")
    print(
        f"start tritonserver --model-repository={root.resolve()} and serve it with: "
        f"metaserve serve --backend triton --triton-model {model.name} --model {model / '1'}"
    )


def _given_package(arguments: argparse.Namespace, store: Path | None) -> Package | None:
    """Return the package that VARIANT names: a directory, or one that `serve` would find.

    A published name means the published weights. A package of them that is there saves the export
    of the same again, and is passed over where another is asked for.
    """
    if arguments.checkpoint is not None:
        return None
    is_published = _is_published(arguments.variant)
    if is_published and (arguments.format == "onnx" or describes_weights(arguments)):
        return None
    try:
        package = open_package(find_package(arguments.variant, store))
    except PackageError as error:
        if is_published or isinstance(error, PackageNotFound):
            return None
        raise
    default = "fp32" if is_published else package.manifest.precision
    if package.manifest.precision == (arguments.precision or default):
        return package
    if is_published:
        return None
    raise PackageError(
        f"{package.path} is in {package.manifest.precision}; export its checkpoint again for "
        f"{arguments.precision}"
    )


def _end_with_parent() -> None:
    """End a first use's export when the service that wants it is gone: its pipe closes then."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _is_published(name: str) -> bool:
    try:
        return find_variant(name)[1] is not None
    except ValueError:
        return False


def _plain_name(arguments: argparse.Namespace) -> str:
    """Return what a package gets named after: the last part of a path, a repository, an id."""
    name: str = arguments.name or arguments.variant.rstrip("/").rpartition("/")[2]
    return name.partition("@")[0]


def _export_package(arguments: argparse.Namespace, out: Path, read_image: ReadImage) -> Package:
    """Find the weights, export, prove, and print the proof.

    Raises:
        SourceError: the weights cannot be had, or an argument cannot be.
        Exception: what `export_package` raises.
    """
    from export.calibration import read_images
    from export.proofs import format_proofs, format_verification
    from export.publish import ExportRequest, export_package
    from export.source import SourceError, Wanted, find_source

    eps = arguments.head_norm_eps
    if eps is not None and not 0 < eps < 1:
        raise SourceError(f"--head-norm-eps {eps} is no small positive number; 1e-6 is usual")
    wanted = Wanted(
        variant=arguments.variant,
        checkpoint=arguments.checkpoint,
        config=arguments.config,
        labels=arguments.labels,
        revision=arguments.revision,
        sha256=arguments.sha256,
        place=arguments.place,
    )
    # Lines, not steps: the progress bar of a download writes between them.
    try:
        source = find_source(wanted, lambda line: print(line, file=sys.stderr))
        architecture = ablated(source.architecture, arguments)
        spec = input_spec(architecture, source.preprocessing, arguments)
        architecture.check_input_size(spec.size)
    except ValueError as error:
        raise SourceError(str(error)) from error
    real = None
    if arguments.calibration is not None:
        real = read_images(arguments.calibration, spec, read_image)
    precision: Precision = arguments.precision or "fp32"
    request = ExportRequest(
        weights=source,
        architecture=architecture,
        input=spec,
        out=out,
        name=arguments.name,
        version=arguments.version,
        precision=precision,
        head_norm_eps=eps,
        ema=not arguments.no_ema,
        keep_weights=not arguments.no_weights,
        overwrite=arguments.overwrite,
        calibration_images=real,
        report=None if precision == "fp32" else _report,
    )
    with _steps() as progress:
        package = export_package(request, progress)
    manifest = package.manifest
    print(format_verification(manifest, manifest.verification))
    if manifest.proofs:
        print(format_proofs(manifest.proofs))
    return package


def _report(calibration: Calibration) -> None:
    from export.calibration import format_calibration

    print(f"\n{format_calibration(calibration)}", file=sys.stderr)


@contextmanager
def _bar() -> Iterator[Callable[[float], None]]:
    """Show a share of work that grows from 0 to 1, on a terminal only."""
    from tqdm import tqdm

    with tqdm(total=100, unit="%", disable=None, leave=False) as bar:

        def share(done: float) -> None:
            bar.update(round(100 * done) - bar.n)

        yield share


@contextmanager
def _steps() -> Iterator[Callable[[str], None]]:
    """Print each step of long work with the time it took."""
    started_at: float | None = None

    def end() -> None:
        if started_at is not None:
            print(f"{time.monotonic() - started_at:.1f} s", file=sys.stderr)

    def begin(step: str) -> None:
        nonlocal started_at
        end()
        print(f"{step} ...", end=" ", flush=True, file=sys.stderr)
        started_at = time.monotonic()

    try:
        yield begin
    finally:
        end()


def refuse(error: Exception | str) -> int:
    """Say in one line what is wrong; returns the exit code."""
    print(f"metaserve: {error}", file=sys.stderr)
    return 2
