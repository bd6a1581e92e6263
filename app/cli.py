"""The `metaserve` command: arguments in, exit codes out; heavy imports only where they are used."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from app.backends.select import select_backend
from app.bench.arguments import add_bench_arguments, run_bench
from app.cpu import cpu_limit
from app.errors import BadRequest, ServiceError, StartupError
from app.images.read import read_image
from app.settings import PREFIX, Settings, load_settings
from app.signals import ending_by_exception
from app.tune.arguments import add_tune_arguments, run_tune
from app.types import Batch, Pixels
from export.seams import Answers, Candidate, CannotStart, OpenBackend, UnusableImage
from models.package import InputSpec, Package, PackageError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; faults of the caller are one sentence and exit code 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
    except (StartupError, PackageError) as error:
        print(f"metaserve: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `metaserve models | head`: nobody reads on, nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _parser() -> argparse.ArgumentParser:
    # No abbreviations: a flag that is added later must not change what a script means.
    parser = argparse.ArgumentParser(
        prog="metaserve", description="Serve MetaFormer vision models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=version("metaserve"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="answer HTTP requests", allow_abbrev=False)
    _add_settings(serve, Settings.model_fields)
    serve.set_defaults(run=_serve)

    export = commands.add_parser(
        "export", help="checkpoint -> proven model package", allow_abbrev=False
    )
    verify = commands.add_parser("verify", help="repeat a package's proof", allow_abbrev=False)
    _add_export_commands(export, verify)

    models = commands.add_parser("models", help="list the catalogue", allow_abbrev=False)
    models.set_defaults(run=_models)

    bench = commands.add_parser(
        "bench", help="put load on a service and measure it", allow_abbrev=False
    )
    add_bench_arguments(bench)
    bench.set_defaults(run=run_bench)

    tune = commands.add_parser(
        "tune", help="find the best settings for a promised latency", allow_abbrev=False
    )
    add_tune_arguments(tune)
    _add_settings(tune, (name for name in Settings.model_fields if name not in _SWEPT))
    tune.set_defaults(run=_tune)

    for name, run, text in (
        ("classify", _classify, "name what images show, without a server"),
        ("embed", _embed, "turn images into vectors, without a server"),
    ):
        command = commands.add_parser(name, help=text, allow_abbrev=False)
        command.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
        _add_settings(command, _OFFLINE_SETTINGS)
        command.set_defaults(run=run)
        if name == "classify":
            command.add_argument("--top-k", type=_positive, default=5, metavar="K")
        else:
            command.add_argument("--normalize", action="store_true")
    return parser


# For calibration: what METASERVE_MAX_PIXELS is unless it is set.
MOST_PIXELS = 64_000_000

_BACKEND_SETTINGS = (
    "device",
    "ort_provider",
    "ort_cache_dir",
    "torch_compile",
    "torch_precision",
    "cuda_graphs",
    "triton_url",
    "triton_model",
    "triton_wait_s",
    "threads",
)
# What `tune` decides itself.
_SWEPT = {"workers", "threads", "max_batch_size", "max_wait_ms", "host", "port", "metrics_port"}
_OFFLINE_SETTINGS = (
    "model",
    "model_store",
    "backend",
    *_BACKEND_SETTINGS,
    "max_pixels",
    "decode",
    "exif_orientation",
)


def _add_settings(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Give a command a flag for each setting; a flag goes before its METASERVE_ variable."""
    for name in names:
        field = Settings.model_fields[name]
        default = "" if field.default is None else f" [{field.default}]"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"setting_{name}",
            metavar="VALUE",
            help=f"{field.description}{default}".replace("%", "%%"),
        )


def _settings(arguments: argparse.Namespace) -> Settings:
    given = {
        name: value
        for name in Settings.model_fields
        if (value := getattr(arguments, f"setting_{name}", None)) is not None
    }
    return load_settings(given)


def _serve(arguments: argparse.Namespace) -> int:
    from app.serve import serve

    return serve(_settings(arguments))


def _tune(arguments: argparse.Namespace) -> int:
    _settings(arguments)  # a flag that cannot be used is named before anything starts
    variables = {
        f"{PREFIX}{name.upper()}": value
        for name in Settings.model_fields
        if (value := getattr(arguments, f"setting_{name}", None)) is not None
    }
    with ending_by_exception():
        return run_tune(arguments, variables)


def _add_export_commands(export: argparse.ArgumentParser, verify: argparse.ArgumentParser) -> None:
    from export.arguments import add_export_arguments
    from export.verify_cli import add_verify_arguments

    add_export_arguments(export)
    _add_settings(export, ("model_store",))
    export.set_defaults(run=_export)
    add_verify_arguments(verify)
    _add_settings(verify, ("model_store", *_BACKEND_SETTINGS))
    verify.set_defaults(run=_verify)


def _export(arguments: argparse.Namespace) -> int:
    from export.cli import run_export

    with ending_by_exception():
        return run_export(arguments, _settings(arguments).model_store, _read_exactly)


def _verify(arguments: argparse.Namespace) -> int:
    from export.verify_cli import run_verify

    with ending_by_exception():
        return run_verify(arguments, _settings(arguments).model_store, _opener(arguments))


def _read_exactly(data: bytes, spec: InputSpec) -> Pixels:
    """Read an image as the service does that decodes every pixel."""
    try:
        return read_image(data, spec, max_pixels=MOST_PIXELS, exif_orientation=True, decode="exact")
    except ServiceError as error:
        raise UnusableImage(error.message) from error


def _opener(arguments: argparse.Namespace) -> OpenBackend:
    """Return what starts a backend of the service for a proof."""

    def open_backend(name: str, package: Package) -> Candidate:
        settings = _settings(arguments).model_copy(update={"backend": name})
        try:
            backend = select_backend(settings, package, settings.threads or cpu_limit())
        except (StartupError, PackageError) as error:
            raise CannotStart(str(error)) from error
        info = backend.info

        def run(batch: Batch) -> Answers:
            rows = backend.run(batch)
            return rows.logits, rows.embedding

        return Candidate(
            name,
            info.precision,
            info.device,
            info.runtime,
            info.max_batch_size,
            run,
            backend.close,
        )

    return open_backend


def _models(_: argparse.Namespace) -> int:
    from models.package import MANIFEST, PRETRAINED
    from models.variants import CHECKPOINTS, LICENCES

    print("embedded, served without a network:")
    for manifest in sorted(PRETRAINED.glob(f"*/{MANIFEST}")):
        print(f"  {manifest.parent.name}")
    print("\npublished checkpoints, fetched by `metaserve export NAME`, under either name:")
    print(f"  {'name':<32}{'timm':<40}{'classes':>8}{'px':>5}{'top-1':>7}")
    for entry in CHECKPOINTS.values():
        top1 = "-" if entry.top1 is None else f"{entry.top1:.1f}"
        hub_id = entry.hub_id or "-"
        print(f"  {entry.name:<32}{hub_id:<40}{entry.classes:>8}{entry.input_size:>5}{top1:>7}")
    print(f"\n{LICENCES}")
    return 0


def _classify(arguments: argparse.Namespace) -> int:
    from app.offline import OfflineModel

    model = OfflineModel(_settings(arguments))
    return _each_image(arguments.images, lambda data: model.classify(data, arguments.top_k))


def _embed(arguments: argparse.Namespace) -> int:
    from app.offline import OfflineModel

    model = OfflineModel(_settings(arguments))
    return _each_image(arguments.images, lambda data: model.embed(data, arguments.normalize))


def _each_image(paths: Sequence[Path], answer: Callable[[bytes], bytes]) -> int:
    """Print a JSON object a line for each image; 2 when one of them could not be used."""
    code = 0
    for path in paths:
        try:
            line = answer(_read(path)).decode()
        except ServiceError as error:
            print(f"metaserve: {path}: {error.message}", file=sys.stderr)
            code = 2
        else:
            print(line, flush=True)
    return code


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadRequest(f"cannot be read: {error.strerror}") from error


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)
