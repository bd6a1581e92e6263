"""What a sweep found, as files: settings, figures, a page and a plot."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import orjson

from app.cpu import cpu_limit
from app.tune.search import best_of, nearest
from app.tune.trial import Measured, Slo, Trial

ENVIRONMENT = "metaserve.env"
FIGURES = "tune.json"
PAGE = "tune.md"
PLOT = "tune.svg"


@dataclass(frozen=True)
class Sweep:
    """Everything there is to say.

    Attributes:
        slo: the promise.
        measured: what was tried.
        load: the images and what serves, in words.
        ended_early: whether a signal came before everything was tried.
    """

    slo: Slo
    measured: Sequence[Measured]
    load: str
    ended_early: bool = False

    @property
    def best(self) -> tuple[Measured, Trial] | None:
        """The configuration to recommend and its trial; None where none keeps the promise."""
        return best_of(self.measured, self.slo)

    def verdict(self) -> str:
        """Return one sentence."""
        if self.best is not None:
            one, trial = self.best
            value = trial.latency_ms[self.slo.percentile]
            return (
                f"{self.slo} holds up to {trial.rate:.4g} requests/s "
                f"({self.slo.percentile} {value:.3g} ms) with {one.configuration}"
            )
        near = nearest(self.measured, self.slo)
        if near is None:
            return f"{self.slo} cannot be promised: not one request was answered well"
        one, trial = near
        return (
            f"{self.slo} cannot be promised here: the best {self.slo.percentile} was "
            f"{trial.latency_ms[self.slo.percentile]:.3g} ms, at {trial.rate:.3g} requests/s with "
            f"{one.configuration}"
        )


def write_files(sweep: Sweep, folder: Path) -> list[Path]:
    """Write the settings (where there are any to recommend), the figures and the page.

    A sweep that was ended early decides nothing about the settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {FIGURES: _figures(sweep), PAGE: _page(sweep)}
    if sweep.ended_early:
        pass
    elif sweep.best is not None:
        contents[ENVIRONMENT] = _environment(sweep)
    else:
        (folder / ENVIRONMENT).unlink(missing_ok=True)  # of an earlier run: it promises too much
    for name, content in contents.items():
        (folder / name).write_text(content, "utf-8")
    return [folder / name for name in sorted(contents)]


def draw_plot(sweep: Sweep, path: Path) -> bool:
    """Draw latency over rate, a line a configuration; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for one in sweep.measured:
        points = sorted(
            (trial.rate, trial.latency_ms[sweep.slo.percentile])
            for trial in one.trials
            if trial.latency_ms
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=str(one.configuration))
    axes.axhline(sweep.slo.milliseconds, color="black", linestyle="--", label=str(sweep.slo))
    axes.set(xlabel="requests per second", ylabel=f"{sweep.slo.percentile}, ms", yscale="log")
    axes.legend(fontsize="x-small")
    figure.savefig(path)
    return True


def machine() -> str:
    """Return what the figures were measured on, in words."""
    return (
        f"{platform.machine()}, {cpu_limit()} CPUs, {platform.system()}, "
        f"Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}"
    )


def _environment(sweep: Sweep) -> str:
    assert sweep.best is not None
    variables = sweep.best[0].configuration.variables()
    lines = [f"# {sweep.verdict()}", f"# {sweep.load}", f"# {machine()}"]
    return "\n".join([*lines, *(f"{name}={text}" for name, text in variables.items()), ""])


def _figures(sweep: Sweep) -> str:
    best = sweep.best
    content = {
        "slo": asdict(sweep.slo),
        "load": sweep.load,
        "machine": machine(),
        "verdict": sweep.verdict(),
        "ended_early": sweep.ended_early,
        "recommended": None if best is None else asdict(best[0].configuration),
        "rate": None if best is None else best[1].rate,
        "configurations": [
            {**asdict(one), "kept": [trial.keeps(sweep.slo) for trial in one.trials]}
            for one in sweep.measured
        ],
    }
    return orjson.dumps(content, option=orjson.OPT_INDENT_2).decode() + "\n"


def _page(sweep: Sweep) -> str:
    name = sweep.slo.percentile
    lines = [
        f"# metaserve tune --slo {sweep.slo}",
        "",
        f"{sweep.verdict()}.",
        "",
        *(["**It was ended early**: not everything was tried.", ""] if sweep.ended_early else []),
        f"{sweep.load}. {machine()}.",
        "",
        "| workers | threads | batch | wait, ms | closed loop /s | rate /s "
        f"| {name}, ms | good | kept |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for one in sweep.measured:
        settings = one.configuration
        first = f"| {settings.workers} | {settings.threads} | {settings.max_batch_size} "
        first += f"| {settings.max_wait_ms:g} | {one.capacity:.1f} "
        for trial in one.trials:
            latency = f"{trial.latency_ms[name]:.2f}" if trial.latency_ms else "-"
            kept = "yes" if trial.keeps(sweep.slo) else "no"
            lines.append(
                f"{first}| {trial.rate:.1f} | {latency} | {trial.good_share:.1%} | {kept} |"
            )
        if one.words:
            lines.append(f"{first}| | | | {one.words} |")
    return "\n".join([*lines, ""])
