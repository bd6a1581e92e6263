"""The metrics of a service of several processes, as if it were one.

Counters and histograms live in files that every process maps, and are summed; a process that is
started again goes on where the one before it ended. Gauges come from the board. `process_*` are
sums over all processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from app.engine.base import EngineStatus
from app.engine.shared.board import Board
from app.metrics import ServiceGauges
from app.processes.roster import Roster

# What one process has least of counts for all; anything else of `process_*` is a sum.
LEAST = ("process_max_fds", "process_start_time_seconds")


def whole_registry(folder: str, board: Board, roster: Roster) -> CollectorRegistry:
    """Return a registry that shows all processes.

    Args:
        folder: where their files are.
        board: how their engines fare.
        roster: which processes there are.
    """
    registry = CollectorRegistry()
    MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]
    PlatformCollector(registry=registry)
    registry.register(
        ServiceGauges(lambda: whole_status(board), lambda: is_ready(board, roster.workers))
    )
    registry.register(Processes(roster))
    return registry


def whole_status(board: Board) -> EngineStatus:
    """Return how the engines of a service fare together: sums, and the longest of the times."""
    rows = [board.read(row) for row in range(board.rows)]
    worst = max(rows, key=lambda status: status.stalled_seconds)
    return EngineStatus(
        queue_depth=sum(status.queue_depth for status in rows),
        in_flight=sum(status.in_flight for status in rows),
        running_batches=sum(status.running_batches for status in rows),
        predicted_wait_seconds=max(status.predicted_wait_seconds for status in rows),
        stalled_seconds=worst.stalled_seconds,
        last_error=worst.last_error,
    )


def is_ready(board: Board, workers: int) -> bool:
    """Tell whether a caller finds a worker that is ready; they have the board's first rows."""
    return any(board.answers(row) and not board.is_draining(row) for row in range(workers))


class Processes(Collector):
    """What the processes of a service use, and how many there are."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster

    def collect(self) -> Iterator[Metric]:
        """Return `process_*` over all processes, and the two counts."""
        pids = self._roster.pids()
        found: dict[str, list[Metric]] = {}
        for pid in (pid for role in pids.values() for pid in role):
            for metric in ProcessCollector(pid=_always(pid), registry=None).collect():
                found.setdefault(metric.name, []).append(metric)
        for name, metrics in found.items():
            parts = [sample.value for metric in metrics for sample in metric.samples]
            total = min(parts) if name in LEAST else sum(parts)
            yield _like(metrics[0], total + self._buried(name))
        alive = GaugeMetricFamily(
            "metaserve_processes", "Processes of the service that are alive.", labels=("role",)
        )
        for role, members in pids.items():
            alive.add_metric((role,), len(members))
        yield alive
        restarts = CounterMetricFamily(
            "metaserve_process_restarts",
            "Processes that ended unasked and were started again.",
            labels=("role",),
        )
        for role, count in self._roster.restarts().items():
            restarts.add_metric((role,), count)
        yield restarts

    def _buried(self, name: str) -> float:
        """Return what processes used that have ended: a counter must not go back."""
        if name != "process_cpu_seconds":
            return 0.0
        return children_seconds(self._roster.supervisor)


def children_seconds(pid: int) -> float:
    """Return the CPU seconds of a process's children that have ended; 0 where it is not known.

    Source: Linux, proc_pid_stat(5), fields 16 and 17.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            after_name = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, after_name[13:15])) / os.sysconf("SC_CLK_TCK")


def _always(pid: int) -> Callable[[], int]:
    return lambda: pid


def _like(metric: Metric, value: float) -> Metric:
    """Return a metric of the same name and kind with another value."""
    other = Metric(metric.name, metric.documentation, metric.type)
    other.add_sample(metric.samples[0].name, {}, value)
    return other
