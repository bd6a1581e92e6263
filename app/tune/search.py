"""The highest rate that keeps a promise, and the best of several configurations; no processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Protocol

from app.bench.server_process import CannotStart
from app.tune.trial import Configuration, Measured, Slo, Trial

STEPS = 4
"""Of bisection: the answer is within a fourteenth of the capacity."""

HEADROOM = 1.2
"""An open loop may fill batches better than the closed loop that measured the capacity."""

LOWEST = 0.05
"""Share of the capacity at which a service is as good as idle."""

BETTER = 1.03
"""A configuration must serve so much more than the best before; less is noise."""


ENDED_EARLY = "ended early"


class Service(Protocol):
    """A running service that can be put under load."""

    def capacity(self) -> float:
        """Return good replies per second of a closed loop."""
        ...

    def try_rate(self, rate: float) -> Trial:
        """Put an open loop on it."""
        ...


class OutOfTime(Exception):
    """The time that was given is spent."""


Open = Callable[[Configuration], AbstractContextManager[Service]]


@dataclass(frozen=True)
class Space:
    """The values to sweep; the first of each is where the search begins."""

    workers: Sequence[int]
    threads: Sequence[int]
    max_batch_size: Sequence[int]
    max_wait_ms: Sequence[float]

    def first(self) -> Configuration:
        """Return where the search begins."""
        return Configuration(
            self.workers[0], self.threads[0], self.max_batch_size[0], self.max_wait_ms[0]
        )

    def stages(self) -> Iterator[Callable[[Configuration], list[Configuration]]]:
        """Return steps, each from the best so far to what is tried next.

        Processes and threads depend on one another and are tried together; batch and wait then
        one after the other, with the best of the former.
        """
        yield lambda best: [
            replace(best, workers=workers, threads=threads)
            for workers in self.workers
            for threads in self.threads
        ]
        yield lambda best: [replace(best, max_batch_size=size) for size in self.max_batch_size]
        yield lambda best: [replace(best, max_wait_ms=wait) for wait in self.max_wait_ms]


def sweep(
    space: Space,
    slo: Slo,
    open_service: Open,
    report: Callable[[Measured], None],
    measured: list[Measured],
) -> None:
    """Try the configurations of a space, stage by stage.

    Args:
        space: what to sweep.
        slo: the promise.
        open_service: starts a configuration.
        report: told of each configuration at its end.
        measured: empty; takes everything as it is measured, so that an early end keeps it.
    """
    for stage in space.stages():
        for configuration in stage(_best(measured, slo, space.first())):
            if any(configuration == other.configuration for other in measured):
                continue
            one = Measured(configuration)
            leading = best_of(measured, slo)
            to_beat = 0.0 if leading is None else BETTER * leading[1].rate
            measured.append(one)
            try:
                with open_service(configuration) as service:
                    find_highest_rate(service, slo, one, to_beat)
            except CannotStart as error:
                one.words = f"does not start: {error}"
            except OutOfTime:
                one.words = "the time was up"
                report(one)
                return
            except (KeyboardInterrupt, SystemExit):
                one.words = ENDED_EARLY
                raise
            report(one)


def find_highest_rate(service: Service, slo: Slo, into: Measured, to_beat: float) -> None:
    """Bisect the rate between nothing and the capacity.

    Args:
        service: under load.
        slo: the promise.
        into: takes the capacity and the trials.
        to_beat: a rate that another configuration reached; what cannot is given up early.
    """
    into.capacity = capacity = service.capacity()
    low, high = 0.0, HEADROOM * capacity
    if to_beat:
        if high <= to_beat:
            into.words = "given up: its capacity is below the best rate so far"
            return
        first = service.try_rate(to_beat)
        into.trials.append(first)
        if not first.keeps(slo):
            into.words = "given up: it does not keep the promise at the best rate so far"
            return
        low = to_beat
    for _ in range(STEPS):
        rate = (low + high) / 2
        if rate <= 0 or high - low < 0.03 * high:
            break
        trial = service.try_rate(rate)
        into.trials.append(trial)
        low, high = (rate, high) if trial.keeps(slo) else (low, rate)
    if low == 0.0 and capacity:
        # Nothing kept it so far: how good can it be?
        into.trials.append(service.try_rate(LOWEST * capacity))


def best_of(measured: Sequence[Measured], slo: Slo) -> tuple[Measured, Trial] | None:
    """Return the configuration that kept the promise at the highest rate, and that trial."""
    kept = [(one, trial) for one in measured if (trial := one.best(slo)) is not None]
    return max(kept, key=lambda pair: pair[1].rate, default=None)


def nearest(measured: Sequence[Measured], slo: Slo) -> tuple[Measured, Trial] | None:
    """Return the lowest latency of the promised percentile that any trial had."""
    seen = [
        (one, trial)
        for one in measured
        for trial in one.trials
        if slo.percentile in trial.latency_ms
    ]
    return min(seen, key=lambda pair: pair[1].latency_ms[slo.percentile], default=None)


def _best(measured: Sequence[Measured], slo: Slo, first: Configuration) -> Configuration:
    found = best_of(measured, slo) or nearest(measured, slo)
    return first if found is None else found[0].configuration
