"""Results of `benchmarks.serving` -> a section of docs/benchmarks.md, and plots."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from app.cpu import cpu_limit

DOCS = Path(__file__).parents[1] / "docs"
RESULTS = DOCS / "plots/serving.json"
PAGE = DOCS / "benchmarks.md"
BEGIN, END = "<!-- serving: begin -->", "<!-- serving: end -->"

Result = dict[str, Any]

# load -> (ours, what it is compared with, connections, at least, in words)
_TARGETS: dict[str, list[tuple[str, str, float, str]]] = {
    "caformer": [
        ("rate ours, scaled, 1 proc. 8", "run limit", 0.95, "of the graph alone, 8 connections"),
        ("rate ours, scaled, 1 proc. 32", "run limit", 0.95, "of the graph alone, 32 connections"),
    ],
    "photo": [
        ("rate ours, scaled, {n} proc. 32", "decode limit scaled", 0.85, "of decoding alone"),
        ("rate ours, fast, {n} proc. 32", "decode limit fast", 0.85, "of decoding alone, fast"),
        ("rate ours, scaled, {n} proc. 32", "rate hand-written, {n} proc. 32", 1.4, "hand-written"),
        ("rate ours, fast, {n} proc. 32", "rate hand-written, {n} proc. 32", 2.5,
         "hand-written, fast"),
    ],
    "phone": [
        ("rate ours, scaled, {n} proc. 32", "rate hand-written, {n} proc. 32", 4.0, "hand-written"),
        ("rate ours, fast, {n} proc. 32", "rate hand-written, {n} proc. 32", 8.0,
         "hand-written, fast"),
    ],
    "tiny": [
        ("rate ours, scaled, {n} proc. 32", "rate hand-written, {n} proc. 32", 2.2,
         "hand-written (aim 3.0)"),
        ("cpu hand-written, {n} proc. 32", "cpu ours, scaled, {n} proc. 32", 2.0,
         "CPU of hand-written over ours"),
    ],
}  # fmt: skip


def keep(name: str, result: Result) -> None:
    """Keep a load's results beside those of the others."""
    results = read_results()
    results[name] = {**result, "machine": machine()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def read_results() -> dict[str, Result]:
    """Return what was measured so far."""
    found: dict[str, Result] = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() else {}
    return found


def machine() -> str:
    """Return the machine, the libraries that matter and the date."""
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("onnxruntime", "pillow", "uvicorn")
    )
    return (
        f"{_processor()}, {cpu_limit()} CPUs; Python {platform.python_version()}, {libraries}; "
        f"{datetime.now(UTC):%Y-%m-%d}"
    )


def write_page() -> None:
    """Write the section between its marks, and the plots."""
    results = read_results()
    text = PAGE.read_text("utf-8")
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    section = "\n".join([BEGIN, "", *_section(results), "", END])
    PAGE.write_text(before + section + rest.partition(END)[2], "utf-8")
    draw_plots(results)


def _section(results: dict[str, Result]) -> Iterator[str]:
    yield "## The service against the machine and a hand-written one"
    yield ""
    yield (
        "`make bench` (`python -m benchmarks.serving`). Load generator and servers share the "
        "machine; limits are measured without either. What is compared took turns in one run: "
        "rates are medians of the rounds, ratios medians of each round's ratio. *Hand-written* is "
        "`benchmarks/handwritten.py`: FastAPI, its thread pool, Pillow, `session.run` an image."
    )
    for name, result in results.items():
        if name != "flat":
            yield from _load(name, result)
    if "flat" in results:
        yield from _flat(results["flat"])


def _load(name: str, result: Result) -> Iterator[str]:
    rounds: dict[str, list[float]] = result["rounds"]
    yield from ("", f"### {name}: {result['words']}", "", f"{result['machine']}.", "")
    yield from _targets(name, result)
    yield from ("| | 1 connection | 8 | 32 | p50 at 1, ms | p99 at 32, ms | CPU s per 1000 |",
                "| --- | ---: | ---: | ---: | ---: | ---: | ---: |")  # fmt: skip
    for server in result["servers"]:
        rates = " | ".join(f"{median(rounds[f'rate {server} {n}']):.1f}" for n in (1, 8, 32))
        p50, p99 = median(rounds[f"p50 {server} 1"]), median(rounds[f"p99 {server} 32"])
        cpu = median(rounds[f"cpu {server} 32"])
        yield f"| {server} | {rates} | {p50:.2f} | {p99:.1f} | {cpu:.2f} |"
    yield ""
    best = result["best"]
    limits = [f"the graph alone {median(rounds['run limit']):.1f} images/s "
              f"({best['threads']} threads, batch {best['batch']}; "
              f"one image {median(rounds['run ms']):.2f} ms)"]  # fmt: skip
    for mode in result["modes"]:
        if f"decode limit {mode}" in rounds:
            alone, one = (median(rounds[f"decode {n} {mode}"]) for n in ("limit", "1 thread"))
            both = median(rounds[f"both limit {mode}"])
            limits.append(
                f"decoding {mode} {alone:.1f} on all threads, {one:.1f} on one "
                f"({median(rounds[f'decode ms {mode}']):.2f} ms an image), both at once {both:.1f}"
            )
    yield f"Limits without HTTP: {'; '.join(limits)}."
    yield ""
    yield from ("| open loop | share | asked for /s | good /s | others | p50, ms | p99, ms |",
                "| --- | ---: | ---: | ---: | ---: | ---: | ---: |")  # fmt: skip
    for server, points in result["open_loop"].items():
        for one in points:
            yield (
                f"| {server} | {one['share']:.1f} | {one['rate']:.1f} | {one['goodput']:.1f} "
                f"| {one['refused']} | {one['p50']:.1f} | {one['p99']:.1f} |"
            )
    yield from (f"\nNot measured: {line}." for line in result["missing"])
    yield f"\n![{name}: p99 over rate](plots/{name}.svg)"


def _targets(name: str, result: Result) -> Iterator[str]:
    yield from ("| target | at least | measured | |", "| --- | ---: | ---: | --- |")
    rounds, processes = result["rounds"], max(_processes(result["servers"]), default=1)
    for over, under, least, words in _TARGETS.get(name, []):
        upper, lower = (rounds.get(key.format(n=processes)) for key in (over, under))
        if upper is None or lower is None:
            yield f"| {words} | {least} | not measured | |"
            continue
        ratio = median(a / b for a, b in zip(upper, lower, strict=True))
        yield f"| {words} | {least} | {ratio:.2f} | {'met' if ratio >= least else '**missed**'} |"
    if name == "photo":
        for mode in result["modes"]:
            yield from _with_what_is_left(rounds, f"ours, {mode}, {processes} proc. 32", mode)
    if name == "caformer":
        alone = zip(
            rounds["p50 ours, scaled, 1 proc. 1"],
            rounds["decode ms scaled"],
            rounds["run ms"],
            strict=True,
        )
        ratio = median(p50 / (decode + run) for p50, decode, run in alone)
        kept = "met" if ratio <= 1.05 else "**missed**"
        yield f"| p50 at 1 connection over decode + run | at most 1.05 | {ratio:.2f} | {kept} |"
    yield ""


def _with_what_is_left(rounds: dict[str, list[float]], server: str, mode: str) -> Iterator[str]:
    """Compare with decoding on the CPU time that the load generator left: it shares the machine."""
    rates, limits = rounds.get(f"rate {server}"), rounds.get(f"decode limit {mode}")
    spent = rounds.get(f"generator {server}")
    if rates and limits and spent:
        ratio = median(
            rate / (limit * (1 - rate * seconds / 1000 / cpu_limit()))
            for rate, limit, seconds in zip(rates, limits, spent, strict=True)
        )
        yield f"| likewise, {mode}, of the CPU that the load generator leaves | - | {ratio:.2f} | |"


def _processes(servers: list[str]) -> list[int]:
    return [int(server.split()[-2]) for server in servers]


def _flat(result: Result) -> Iterator[str]:
    yield from ("", "### Memory, descriptors and threads", "", f"{result['machine']}.", "")
    yield from (
        "| requests | resident MB | descriptors | threads |",
        "| ---: | ---: | ---: | ---: |",
    )
    points = result["points"]
    for one in points[:: max(1, len(points) // 8)] + points[-1:]:
        yield f"| {one['requests']} | {one['mb']:.1f} | {one['files']} | {one['threads']} |"


def draw_plots(results: dict[str, Result]) -> None:
    """Draw p99 over the open loop's rate, a picture a load."""
    from matplotlib.figure import Figure

    for name, result in results.items():
        if "open_loop" not in result:
            continue
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        for server, points in result["open_loop"].items():
            seen = [(one["rate"], one["p99"]) for one in points if one["p99"]]
            if seen:
                axes.plot(*zip(*seen, strict=True), marker="o", label=server)
        axes.set(xlabel="requests per second", ylabel="p99, ms", yscale="log", title=name)
        axes.legend(fontsize="small")
        figure.savefig(DOCS / f"plots/{name}.svg", metadata={"Date": None})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
