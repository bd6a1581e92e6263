"""The metrics reference in docs/operations.md, made from what is served.

`python -m app.metrics_page docs/operations.md` writes it anew between its two marks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from prometheus_client import PlatformCollector
from prometheus_client.core import Metric

from app.metrics import Metrics
from app.processes.metrics_whole import Processes
from app.processes.roster import Roster

BEGIN = "<!-- metrics: begin; written by `make docs` from app/metrics.py, edit it there -->"
END = "<!-- metrics: end -->"
_TABLE_HEAD = ("| Metric | Type | Labels | What it is |", "| --- | --- | --- | --- |")


def with_metrics(page: str) -> str:
    """Return a page whose part between the marks is the reference.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page does not hold {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{reference()}{END}{after}"


def reference() -> str:
    """Return a table of every metric: the service's own first."""
    alone, several = _with_one_process(), _with_several_processes()
    rows = {
        name: _row(name, metric, _where(name, alone, several))
        for name, metric in (several | alone).items()
    }
    own = sorted(name for name in rows if name.startswith("metaserve_"))
    others = sorted(rows.keys() - own)
    return "\n".join([*_TABLE_HEAD, *(rows[name] for name in [*own, *others])]) + "\n"


def _with_one_process() -> dict[str, Metric]:
    """Return name -> metric, each with a sample to read its labels from."""
    metrics = Metrics()
    metrics.observe_request("/classify", 200, 0.0)
    metrics.batch_observer("onnxruntime")
    metrics.model_info.labels(*[""] * 6)
    return _by_name(metrics.registry.collect())


def _with_several_processes() -> dict[str, Metric]:
    """Return what such a service has beside the metrics of `app.metrics`."""
    with closing(Roster.create(workers=1, rows=2)) as roster:
        processes = Processes(roster).collect()
        return _by_name([*processes, *PlatformCollector(registry=None).collect()])


def _by_name(metrics: Iterable[Metric]) -> dict[str, Metric]:
    """Return name -> metric; the name is the one that a query holds."""
    return {
        f"{metric.name}_total" if metric.type == "counter" else metric.name: metric
        for metric in metrics
    }


def _where(name: str, alone: dict[str, Metric], several: dict[str, Metric]) -> str:
    if name not in alone:
        return " Only with several processes."
    is_ours = name.startswith("metaserve_")
    return "" if is_ours or name in several else " Only with one process."


def _row(name: str, metric: Metric, where: str) -> str:
    labels = {label: "" for sample in metric.samples for label in sample.labels}
    bounds = {sample.labels["le"]: "" for sample in metric.samples if "le" in sample.labels}
    labels.pop("le", None)
    buckets = f" Buckets: {', '.join(map(_short, bounds))}." if bounds else ""
    words = metric.documentation.rstrip(".")
    shown = ", ".join(f"`{label}`" for label in labels)
    return f"| `{name}` | {metric.type} | {shown} | {words}.{where}{buckets} |"


def _short(bound: str) -> str:
    return bound if bound == "+Inf" else f"{float(bound):g}"


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.write_text(with_metrics(target.read_text("utf-8")), "utf-8")
