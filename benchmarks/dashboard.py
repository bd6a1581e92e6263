"""The panels of the dashboard, drawn from a Prometheus into docs/plots/dashboard.png.

    make dashboard URL=http://localhost:9090 MINUTES=5

For looking at what a run was like without a Grafana, and for the picture in docs/operations.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator
from PIL import Image

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy/grafana/dashboards/metaserve.json"
PICTURE = ROOT / "docs/plots/dashboard.png"

COLUMNS = 24
"""How wide a dashboard is, in the unit of `gridPos`."""
ROW_INCHES = 0.36
WIDTH_INCHES = 16.0
DPI = 90
POINTS = 240
LABEL_INCHES = 0.7
"""What a label of the time takes, with the gap beside it."""
STEPS = tuple(60 * minutes for minutes in (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200))
"""Seconds from one label to the next, as people count time."""
COLOURS = 64
"""Of the picture's palette: lines and letters need no more."""


@dataclass(frozen=True)
class Span:
    """What part of the past is drawn.

    Attributes:
        begin: Unix seconds.
        end: Unix seconds.
        rate_interval: over what `rate` is taken, as PromQL has it; at least four scrapes.
    """

    begin: float
    end: float
    rate_interval: str

    @property
    def step(self) -> float:
        """Seconds from one point to the next."""
        return max((self.end - self.begin) / POINTS, 1.0)


@dataclass(frozen=True)
class Line:
    """One series: its legend, and points in seconds since the beginning.

    A value that is none, as the percentile of no requests, leaves a gap.
    """

    legend: str
    points: list[tuple[float, float]]

    @property
    def values(self) -> list[float]:
        """Those that are some."""
        return [value for _, value in self.points if math.isfinite(value)]


def draw(url: str, span: Span, out: Path, dashboard: Path = DASHBOARD) -> None:
    """Draw every panel from a Prometheus."""
    panels = json.loads(dashboard.read_text("utf-8"))["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    with (
        httpx.Client(base_url=url, timeout=30, trust_env=False) as client,
        mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}),
    ):
        found = [
            [line for target in panel["targets"] for line in _lines(client, target, span)]
            for panel in panels
        ]
        figure = Figure(figsize=(WIDTH_INCHES, rows * ROW_INCHES), dpi=DPI)
        for panel, lines in zip(panels, found, strict=True):
            _draw_panel(figure, rows, panel, lines, _times(found, span))
        _save(figure, out)


def in_words(unit: str) -> Callable[[float], str]:
    """Return what writes a value in one of Grafana's units."""
    words: dict[str, Callable[[float], str]] = {
        "s": _seconds,
        "percentunit": lambda value: f"{100 * value:.3g} %",
        "bytes": lambda value: f"{value / 2**20:.4g} MiB",
        "reqps": lambda value: f"{value:.4g}/s",
        "ops": lambda value: f"{value:.4g}/s",
        "none": lambda value: f"{value:.4g}",
    }
    return words[unit]


def _seconds(value: float) -> str:
    if not value:
        return "0"
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _lines(client: httpx.Client, target: dict[str, Any], span: Span) -> list[Line]:
    reply = client.get(
        "/api/v1/query_range",
        params={
            "query": filled_in(target["expr"], span.rate_interval),
            "start": span.begin,
            "end": span.end,
            "step": span.step,
        },
    )
    reply.raise_for_status()
    return [
        Line(
            _legend(target["legendFormat"], series["metric"]),
            [(at - span.begin, float(value)) for at, value in series["values"]],
        )
        for series in reply.json()["data"]["result"]
    ]


def _times(found: list[list[Line]], span: Span) -> tuple[float, float]:
    """Return from when to when there is something to see."""
    times = [line.points[0][0] for lines in found for line in lines if line.points]
    return min(times, default=0.0), span.end - span.begin


def filled_in(expression: str, rate_interval: str) -> str:
    """Return an expression of the dashboard with its variables: all jobs, all instances."""
    filled = expression.replace("$__rate_interval", rate_interval)
    return re.sub(r"\$(job|instance)\b", ".*", filled)


def _legend(pattern: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), pattern).strip()


def _draw_panel(
    figure: Figure,
    rows: int,
    panel: dict[str, Any],
    lines: list[Line],
    times: tuple[float, float],
) -> None:
    place = panel["gridPos"]
    is_number = panel["type"] == "stat"
    # Inches that a panel keeps free: left, below, right, above.
    left, below, right, above = (0.1, 0.1, 0.1, 0.3) if is_number else (0.75, 0.75, 0.2, 0.35)
    height = rows * ROW_INCHES
    x = place["x"] / COLUMNS * WIDTH_INCHES + left
    y = height - (place["y"] + place["h"]) * ROW_INCHES + below
    width = place["w"] / COLUMNS * WIDTH_INCHES - left - right
    axes = figure.add_axes(
        (
            x / WIDTH_INCHES,
            y / height,
            width / WIDTH_INCHES,
            (place["h"] * ROW_INCHES - below - above) / height,
        )
    )
    axes.set_title(panel["title"], loc="left", fontsize=10, fontweight="bold")
    defaults = panel["fieldConfig"]["defaults"]
    if is_number:
        _draw_number(axes, defaults, lines)
    else:
        _draw_lines(axes, defaults, lines, times, width)


def _draw_number(axes: Axes, defaults: dict[str, Any], lines: list[Line]) -> None:
    values = [value for line in lines for value in line.values]
    value = values[-1] if values else None
    shown = "no data" if value is None else in_words(defaults["unit"])(value)
    colour = "black"
    for step in defaults["thresholds"]["steps"]:
        if value is not None and (step["value"] is None or value >= step["value"]):
            colour = step["color"]
    axes.text(0.5, 0.45, shown, ha="center", va="center", fontsize=22, color=colour)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(visible=True, color="lightgrey")


def _draw_lines(
    axes: Axes,
    defaults: dict[str, Any],
    lines: list[Line],
    times: tuple[float, float],
    width: float,
) -> None:
    if defaults["custom"].get("stacking"):
        _draw_stacked(axes, lines)
    else:
        for line in lines:
            axes.plot(*zip(*line.points, strict=True), label=line.legend, linewidth=1.2)
    begin, end = times
    highest = max((value for line in lines for value in line.values), default=0.0)
    axes.set_ylim(0, None if highest else 1)
    if not highest:
        axes.set_yticks([0])
    elif defaults["unit"] == "bytes":
        axes.yaxis.set_major_locator(MultipleLocator(2 ** math.floor(math.log2(highest / 3))))
    write = in_words(defaults["unit"])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    label_times(axes, begin, end, width)
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.1),
            ncols=max(int(width / 1.7), 1),
            fontsize=7.5,
            frameon=False,
            borderaxespad=0.3,
            handlelength=1.2,
        )
    else:
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes)


def label_times(axes: Axes, begin: float, end: float, width: float) -> None:
    """Label the axis of time in minutes, as closely as the labels have room.

    Args:
        axes: those of a panel.
        begin: where the axis begins, in seconds; labelled 0.
        end: where it ends, in seconds.
        width: of the axes, in inches.
    """
    shortest = (end - begin) * LABEL_INCHES / width
    step = next((step for step in STEPS if step >= shortest), shortest)
    axes.set_xlim(begin, end)
    axes.xaxis.set_major_locator(MultipleLocator(step, begin))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{(value - begin) / 60:.0f} min")
    )


def _draw_stacked(axes: Axes, lines: list[Line]) -> None:
    times = sorted({at for line in lines for at, _ in line.points})
    layers = [np.nan_to_num([dict(line.points).get(at, 0.0) for at in times]) for line in lines]
    axes.stackplot(times, layers, labels=[line.legend for line in lines], alpha=0.7)


def _save(figure: Figure, out: Path) -> None:
    """Write the picture with a palette, which makes it a third as large."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    out.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(COLOURS).save(out, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:9090", help="of the Prometheus")
    parser.add_argument("--minutes", type=float, default=5.0, help="how far back to look")
    parser.add_argument("--rate-interval", default="1m", help="at least four scrapes")
    parser.add_argument("--out", type=Path, default=PICTURE)
    arguments = parser.parse_args()
    now = time.time()
    span = Span(now - 60 * arguments.minutes, now, arguments.rate_interval)
    draw(arguments.url, span, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
