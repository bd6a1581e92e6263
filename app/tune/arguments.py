"""The arguments of `metaserve tune`, and what it does with them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from app.bench.argument_kinds import (
    above_0,
    add_image_argument,
    count,
    count_from_0,
    from_0,
    several,
)

if TYPE_CHECKING:
    from app.tune.report import Sweep
    from app.tune.search import Space
    from app.tune.trial import Measured, Slo


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add everything `metaserve tune` takes, but for the settings of the service."""
    parser.add_argument(
        "--slo", type=_slo, required=True, metavar="P=T", help="the promise, for example p99=50ms"
    )
    add_image_argument(parser, "; images like those of your callers")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help="for the files it writes [.]"
    )
    parser.add_argument(
        "--minutes", type=above_0, default=5.0, metavar="M", help="nothing new starts after [5]"
    )
    parser.add_argument(
        "--trial-seconds",
        type=above_0,
        default=3.0,
        metavar="S",
        help="how long a rate is tried, at least [3]",
    )
    for name, kind, text in (
        ("workers", several(count), "[1, 2, 4 .. the CPUs]"),
        ("threads", several(count_from_0), "[0, and 1]; 0 is the CPUs"),
        ("max-batch-size", several(count), "[32,1,4,8,16]"),
    ):
        parser.add_argument(
            f"--try-{name}", type=kind, metavar="N,N", help=f"values of {name} to sweep {text}"
        )
    parser.add_argument(
        "--try-max-wait-ms", type=several(from_0), metavar="MS,MS", help="likewise [0,1,2,5]"
    )


def run_tune(arguments: argparse.Namespace, variables: dict[str, str]) -> int:
    """Sweep and write; 1 where no configuration keeps the promise.

    Ended by a signal, it writes the figures and the page of what it has measured, and goes.

    Args:
        arguments: of the command line.
        variables: METASERVE_ names -> values, for every server that is started.

    Raises:
        StartupError: an image cannot be read, the results could not be written, or no configuration
            starts at all.
    """
    import functools
    import os

    from app.bench.plan import build_request, parse_url, read_bodies
    from app.errors import StartupError
    from app.tune.report import Sweep, draw_plot, write_files
    from app.tune.search import sweep
    from app.tune.service import serving

    _check_writable(arguments.out)
    target = parse_url("http://127.0.0.1", "classify")
    requests = tuple(build_request(target, body, {}) for body in read_bodies(arguments.image))
    os.environ.update(variables)
    until = time.monotonic() + 60 * arguments.minutes
    open_service = functools.partial(
        serving, requests=requests, seconds=arguments.trial_seconds, until=until
    )
    load = _load(arguments.image)
    measured: list[Measured] = []
    try:
        sweep(_space(arguments), arguments.slo, open_service, _say(arguments.slo), measured)
    except (KeyboardInterrupt, SystemExit):
        if any(one.capacity for one in measured):
            so_far = Sweep(arguments.slo, measured, load, ended_early=True)
            _say_written(write_files(so_far, arguments.out))
        raise
    if all(one.words.startswith("does not start") for one in measured):
        raise StartupError(measured[0].words.removeprefix("does not start: "))
    found = Sweep(arguments.slo, measured, load)
    paths = write_files(found, arguments.out)
    if draw_plot(found, plot := arguments.out / "tune.svg"):
        paths.append(plot)
    else:
        print("for the plot, install metaserve[bench] and run it again", file=sys.stderr)
    return _conclude(found, paths)


def _check_writable(folder: Path) -> None:
    """Refuse a folder that could not take the results, before minutes are spent on them."""
    import tempfile

    from app.errors import StartupError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StartupError(f"--out {folder} cannot be written: {error.strerror}") from error


def _conclude(found: Sweep, paths: list[Path]) -> int:
    print(found.verdict())
    _say_written(paths)
    return 0 if found.best is not None else 1


def _say_written(paths: list[Path]) -> None:
    print(f"written: {', '.join(map(str, paths))}", flush=True)


def _say(slo: Slo) -> Callable[[Measured], None]:
    from app.tune.search import nearest

    def say(one: Measured) -> None:
        best = one.best(slo) or (near[1] if (near := nearest([one], slo)) else None)
        shown = "nothing measured"
        if best is not None:
            kept = "keeps" if best.keeps(slo) else "breaks"
            value = best.latency_ms[slo.percentile]
            shown = f"{kept} it at {best.rate:.1f}/s ({slo.percentile} {value:.1f} ms)"
        capacity = f"{one.capacity:.1f}/s at most" if one.capacity else ""
        words = "; ".join(part for part in (capacity, shown, one.words) if part)
        print(f"{one.configuration}: {words}", file=sys.stderr, flush=True)

    return say


def _space(arguments: argparse.Namespace) -> Space:
    from app.cpu import cpu_limit
    from app.tune.search import Space

    cpus = cpu_limit()
    powers = [2**n for n in range(cpus.bit_length()) if 2**n <= cpus]
    longest = arguments.slo.milliseconds / 4
    return Space(
        workers=arguments.try_workers or powers,
        threads=arguments.try_threads or ([0, 1] if cpus > 1 else [0]),
        max_batch_size=arguments.try_max_batch_size or [32, 1, 4, 8, 16],
        max_wait_ms=arguments.try_max_wait_ms or [w for w in (0.0, 1.0, 2.0, 5.0) if w <= longest],
    )


def _load(images: list[Path]) -> str:
    return f"images: {', '.join(path.name for path in images) or 'a 32x32 drawing'}"


def _slo(text: str) -> Slo:
    from app.tune.trial import parse_slo

    try:
        return parse_slo(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
