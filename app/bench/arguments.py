"""The arguments of `metaserve bench`, and what it does with them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from app.bench.argument_kinds import above_0, add_image_argument, count, from_0, several

if TYPE_CHECKING:
    from app.bench.generator import Progress
    from app.bench.plan import Plan

INTERRUPTED = 130


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add everything `metaserve bench` takes."""
    parser.add_argument("url", metavar="URL", help="base URL, for example http://localhost:8000")
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument(
        "--rate",
        type=several(above_0),
        default=(50.0,),
        metavar="N[,N...]",
        help="requests per second, arriving by the clock whatever the server does; several are "
        "phases, one after the other [50]",
    )
    loop.add_argument(
        "--connections",
        type=count,
        metavar="N",
        help="a closed loop instead: N callers that wait for their reply before they ask again "
        "(this hides a server that stalls)",
    )
    parser.add_argument(
        "--duration", type=above_0, default=10.0, metavar="S", help="of a phase, seconds [10]"
    )
    parser.add_argument(
        "--warmup",
        type=from_0,
        default=1.0,
        metavar="S",
        help="seconds before that which do not count [1]",
    )
    parser.add_argument(
        "--arrivals",
        choices=("poisson", "uniform"),
        default="poisson",
        help="as many independent callers ask, or evenly [poisson]",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the arrivals [0]")
    parser.add_argument("--route", choices=("classify", "embed"), default="classify")
    add_image_argument(parser)
    parser.add_argument(
        "--timeout-ms",
        type=above_0,
        default=30_000.0,
        metavar="MS",
        help="give a reply up this long after its request's intended start [30000]",
    )
    parser.add_argument(
        "--deadline-ms",
        type=count,
        metavar="MS",
        help="send it as X-Request-Timeout-Ms [no such header]",
    )
    parser.add_argument("--api-key", metavar="KEY", help="send it as a bearer token")
    parser.add_argument(
        "--max-connections",
        type=count,
        default=1000,
        metavar="N",
        help="of an open loop; what would need more waits, and the wait counts [1000]",
    )
    parser.add_argument(
        "--processes", type=count, default=1, metavar="N", help="that share the load [1]"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write all figures there; - is standard output"
    )


def run_bench(arguments: argparse.Namespace) -> int:
    """Measure and print; 1 without a good reply or a service at the end, 130 when interrupted.

    Raises:
        StartupError: the URL, an image or the file of figures cannot be used.
    """
    import orjson

    from app.bench.recording import summarise
    from app.bench.report import render
    from app.bench.run import check_target, measure

    plan = plan_of(arguments)
    check_target(plan.target)
    if arguments.json is not None:
        _check_writable(arguments.json)
    recording = measure(plan, arguments.processes, _live_line(plan))
    summary = summarise(recording, plan, arguments.processes)
    to_stdout = arguments.json == Path("-")
    print(render(summary), file=sys.stderr if to_stdout else sys.stdout)
    figures = orjson.dumps(summary.as_dict(), option=orjson.OPT_INDENT_2) + b"\n"
    if to_stdout:
        sys.stdout.buffer.write(figures)
    elif arguments.json is not None:
        arguments.json.write_bytes(figures)
    if recording.interrupted:
        return INTERRUPTED
    return 0 if summary.good and summary.stopped_at is None else 1


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Return the plan that the arguments ask for.

    Raises:
        StartupError: the URL or an image cannot be used.
    """
    from app.bench.plan import Plan, build_request, parse_url, read_bodies

    target = parse_url(arguments.url, arguments.route)
    headers = {}
    if arguments.api_key is not None:
        headers["Authorization"] = f"Bearer {arguments.api_key}"
    if arguments.deadline_ms is not None:
        headers["X-Request-Timeout-Ms"] = str(arguments.deadline_ms)
    bodies = read_bodies(arguments.image)
    return Plan(
        target=target,
        requests=tuple(build_request(target, body, headers) for body in bodies),
        rates=() if arguments.connections else arguments.rate,
        connections=arguments.connections or 0,
        seconds=arguments.duration,
        warmup_seconds=arguments.warmup,
        timeout_seconds=arguments.timeout_ms / 1000,
        arrivals=arguments.arrivals,
        seed=arguments.seed,
        max_connections=arguments.max_connections,
    )


def _check_writable(path: Path) -> None:
    from app.errors import StartupError

    if path != Path("-") and not path.parent.is_dir():
        raise StartupError(f"--json {path} cannot be written: there is no folder {path.parent}")


def _live_line(plan: Plan) -> Progress | None:
    """Return what keeps one line on a terminal up to date; None where there is no terminal."""
    if not sys.stderr.isatty():
        return None
    last = (0.0, 0)

    def show(seconds: float, ended: int, good: int) -> None:
        nonlocal last
        rate = (good - last[1]) / max(seconds - last[0], 1e-9)
        last = (seconds, good)
        share = min(1.0, seconds / plan.total_seconds)
        bar = "#" * round(30 * share)
        other = ended - good
        line = f"[{bar:<30}] {seconds:5.1f} s  {rate:7.1f} good/s  {good} good, {other} others"
        print(f"\r{line:<79}", end="" if share < 1 else "\r\n", file=sys.stderr, flush=True)

    return show
