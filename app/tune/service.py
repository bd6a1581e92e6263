"""A real `metaserve serve` on a free port, under the load generator."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from app.bench.plan import Plan, parse_url
from app.bench.recording import summarise
from app.bench.run import measure
from app.bench.server_process import SERVE, SERVE_SETTINGS, running_server
from app.tune.search import OutOfTime
from app.tune.trial import Configuration, Trial, trial_of

FEWEST_CALLERS = 32
FEWEST_REQUESTS = 200
"""Of a trial: its p99 is then the second worst or better."""

# Of the user's own that must not reach a trial: ports, and keys that the generator does not have.
_NOT_INHERITED = {"METASERVE_METRICS_PORT", "METASERVE_API_KEYS_FILE"}


@dataclass(frozen=True)
class LoadedService:
    """A service that is ready, and the load for it.

    Attributes:
        plan: requests and target; rates and times are filled in.
        callers: of the closed loop; enough to fill one batch while another runs.
        seconds: of a trial, at least.
        until: `time.monotonic()` at which nothing new begins.
    """

    plan: Plan
    callers: int
    seconds: float
    until: float

    def capacity(self) -> float:
        """Return good replies per second of a closed loop."""
        plan = replace(self.plan, connections=self.callers, seconds=self.seconds)
        return self._run(plan).goodput

    def try_rate(self, rate: float) -> Trial:
        """Put an open loop on it, for long enough to tell a percentile."""
        seconds = min(max(self.seconds, FEWEST_REQUESTS / rate), 5 * self.seconds)
        return self._run(replace(self.plan, rates=(rate,), seconds=seconds))

    def _run(self, plan: Plan) -> Trial:
        if time.monotonic() > self.until:
            raise OutOfTime
        recording = measure(plan)
        if recording.interrupted:
            raise KeyboardInterrupt
        (phase,) = summarise(recording, plan).phases
        return trial_of(phase)


@contextlib.contextmanager
def serving(
    configuration: Configuration, requests: tuple[bytes, ...], *, seconds: float, until: float
) -> Iterator[LoadedService]:
    """Serve a configuration until the block ends; no process is left behind.

    Args:
        configuration: the settings; the others are the environment's.
        requests: built for any port: the Host header is not looked at.
        seconds: of a trial.
        until: `time.monotonic()` at which nothing new begins.

    Raises:
        CannotStart: it ends instead of getting ready.
        OutOfTime: it is too late to begin.
    """
    if time.monotonic() > until:
        raise OutOfTime
    kept = {name: text for name, text in os.environ.items() if name not in _NOT_INHERITED}
    with running_server(SERVE, kept | SERVE_SETTINGS | configuration.variables()) as server:
        target = parse_url(server.url, "classify")
        plan = Plan(target, requests, warmup_seconds=0.5, timeout_seconds=10.0)
        callers = max(FEWEST_CALLERS, 3 * configuration.max_batch_size * configuration.workers)
        yield LoadedService(plan, callers, seconds, until)
