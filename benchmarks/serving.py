"""The service, the limits of the machine, a hand-written service: python -m benchmarks.serving

Everything that is compared is measured in turns, in one run; figures are medians of the rounds, and
ratios the medians of each round's ratio. `--only tiny,photo` measures some loads; results of the
others stay in docs/plots/serving.json, from which docs/benchmarks.md is written.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

from app.bench.plan import Plan, build_request, parse_url
from app.bench.recording import Summary, summarise
from app.bench.run import measure
from app.bench.server_process import CannotStart
from app.cpu import cpu_limit
from app.signals import ending_by_exception
from benchmarks.serving_limits import Limits
from benchmarks.serving_loads import Load, build_loads
from benchmarks.serving_processes import Server, ours, theirs
from benchmarks.serving_report import keep, write_page

CONNECTIONS = (1, 8, 32)
SHARES = (0.5, 0.8, 1.0, 1.2)
"""Of the closed loop's rate at 32 connections, for the open loop."""
FLAT_REQUESTS = 20_000

Result = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, keep the results, write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="tiny, photo, ... or flat")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    arguments = parser.parse_args(argv)
    only = set(filter(None, arguments.only.split(",")))
    cpus = cpu_limit()
    loads = build_loads(cpus)
    if unknown := only - {load.name for load in loads} - {"flat"}:
        parser.error(f"there is no load {', '.join(sorted(unknown))}")
    with ending_by_exception():  # so that no server is left behind
        for load in loads:
            if not only or load.name in only:
                keep(load.name, measure_load(load, cpus, arguments.rounds))
        if not only or "flat" in only:
            keep("flat", measure_flatness(loads[0]))
    write_page()
    return 0


def measure_load(load: Load, cpus: int, rounds: int) -> Result:
    """Measure limits, ours and theirs in turns."""
    _say(f"{load.name}: {load.words}")
    limits = Limits(load, cpus)
    buckets = limits.buckets(0.2 * load.seconds)
    best = limits.best(buckets)
    missing: list[str] = []
    with ExitStack() as stack:
        servers = _open_all(load, stack, missing)
        rows = [_round(load, limits, best, servers, cpus) for _ in range(rounds)]
        closed = {key: [row[key] for row in rows] for key in rows[0]}
        open_loop = {
            server.name: _open_loop(load, server, median(closed[f"rate {server.name} 32"]))
            for server in servers
        }
    return {
        "words": load.words,
        "best": {"threads": best.threads, "batch": best.batch},
        "buckets": buckets,
        "servers": [server.name for server in servers],
        "modes": list(load.modes),
        "rounds": closed,
        "open_loop": open_loop,
        "missing": missing,
    }


def _open_all(load: Load, stack: ExitStack, missing: list[str]) -> list[Server]:
    """Start every server of a load; an idle one takes nothing from the one that is measured."""
    starts: list[tuple[str, Callable[[], contextlib.AbstractContextManager[Server]]]] = []
    for workers in load.processes:
        starts += [
            (f"ours, {mode}, {workers} proc.", partial(ours, load, mode, workers))
            for mode in load.modes
        ]
        starts.append((f"hand-written, {workers} proc.", partial(theirs, load, workers)))
    servers = []
    for name, start in starts:
        try:
            servers.append(stack.enter_context(start()))
        except CannotStart as error:
            missing.append(f"{name}: {error}")
            _say(f"  not measured: {missing[-1]}")
    return servers


def _round(
    load: Load, limits: Limits, best: Any, servers: Sequence[Server], cpus: int
) -> dict[str, float]:
    row = {"run limit": limits.run_rate(best, load.seconds), "run ms": limits.run_ms()}
    for mode in load.modes:
        with contextlib.suppress(Exception):  # an extra that is not installed: no server either
            row[f"decode limit {mode}"] = limits.decode_rate(mode, cpus, load.seconds)
            row[f"decode 1 thread {mode}"] = limits.decode_rate(mode, 1, load.seconds)
            row[f"decode ms {mode}"] = limits.decode_ms(mode)
            row[f"both limit {mode}"] = limits.pipelined_rate(mode, best, load.seconds)
    for connections in CONNECTIONS:
        for server in servers:
            cpu = server.cpu_seconds()
            summary = _bench(load, server, connections=connections, seconds=load.seconds)
            phase = summary.phases[-1]
            spent = server.cpu_seconds() - cpu
            key = f"{server.name} {connections}"
            row[f"rate {key}"] = phase.goodput
            row[f"p50 {key}"] = phase.good.percentiles["p50"] if phase.good else 0.0
            row[f"p99 {key}"] = phase.good.percentiles["p99"] if phase.good else 0.0
            # The warm-up's requests cost as much and are not in `offered`.
            requests = phase.offered * (1 + WARMUP / load.seconds)
            row[f"cpu {key}"] = 1000 * spent / max(requests, 1)
            row[f"generator {key}"] = summary.cpu_ms_per_1000 / 1000
            _say(f"  {key} connections: {phase.goodput:.1f}/s, {row[f'cpu {key}']:.2f} CPU s/1000")
    return row


WARMUP = 0.5


def _bench(load: Load, server: Server, **fields: Any) -> Summary:
    target = parse_url(server.url, "classify")
    plan = Plan(target, (build_request(target, load.image, {}),), warmup_seconds=WARMUP, **fields)
    return summarise(measure(plan), plan)


def _open_loop(load: Load, server: Server, capacity: float) -> list[dict[str, float]]:
    points = []
    for share in SHARES:
        rates = (share * capacity,)
        phase = _bench(load, server, rates=rates, seconds=1.5 * load.seconds).phases[-1]
        latency = phase.good.percentiles if phase.good else {}
        points.append(
            {
                "share": share,
                "rate": share * capacity,
                "goodput": phase.goodput,
                "refused": sum(n for name, n in phase.outcomes.items() if not name.startswith("2")),
                **{name: latency.get(name, 0.0) for name in ("p50", "p99")},
            }
        )
        _say(f"  {server.name} open loop {share}x: {points[-1]}")
    return points


def measure_flatness(load: Load) -> Result:
    """Watch memory, descriptors and threads over many requests: good, bad, refused."""
    points = []
    with ours(load, "scaled", 1, METASERVE_QUEUE_BUDGET_MS="50") as server:
        target = parse_url(server.url, "classify")
        bodies = (load.image, load.image, b"no image", load.image[:100], load.image)
        requests = tuple(build_request(target, body, {}) for body in bodies)
        plan = Plan(target, requests, connections=64, seconds=1.0, warmup_seconds=0.0)
        done = 0
        while done < FLAT_REQUESTS:
            files, threads = server.counts()
            memory = server.memory_mb()
            points.append({"requests": done, "mb": memory, "files": files, "threads": threads})
            (phase,) = summarise(measure(plan), plan).phases
            done += phase.offered
        files, threads = server.counts()
        memory = server.memory_mb()
        points.append({"requests": done, "mb": memory, "files": files, "threads": threads})
    _say(f"flat: {points[1]} ... {points[-1]}")
    return {"points": points}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
