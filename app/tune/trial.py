"""What is tried, what is promised, and what one trial showed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from app.bench.recording import Phase

GOOD_SHARE = 0.99
"""Of the requests that must be answered well: a service that refuses is fast."""


@dataclass(frozen=True)
class Slo:
    """A promise about latency.

    Attributes:
        percentile: `p50`, `p90`, `p99` or `p99.9`.
        milliseconds: that it may be.
    """

    percentile: str
    milliseconds: float

    def __str__(self) -> str:
        """Return it as it is written on the command line."""
        return f"{self.percentile}={self.milliseconds:g}ms"


def parse_slo(text: str) -> Slo:
    """Read `p99=50ms`.

    Raises:
        ValueError: it is written otherwise.
    """
    found = re.fullmatch(r"(p50|p90|p99|p99\.9)=(\d+(?:\.\d+)?)(ms|s)", text)
    if found is None or float(found[2]) == 0:
        raise ValueError(f"{text!r} is no promise like p99=50ms (p50, p90, p99 or p99.9; ms or s)")
    return Slo(found[1], float(found[2]) * (1000 if found[3] == "s" else 1))


@dataclass(frozen=True)
class Configuration:
    """The settings that are swept."""

    workers: int
    threads: int
    max_batch_size: int
    max_wait_ms: float

    def variables(self) -> dict[str, str]:
        """Return them as the environment has them."""
        return {
            "METASERVE_WORKERS": str(self.workers),
            "METASERVE_THREADS": str(self.threads),
            "METASERVE_MAX_BATCH_SIZE": str(self.max_batch_size),
            "METASERVE_MAX_WAIT_MS": f"{self.max_wait_ms:g}",
        }

    def __str__(self) -> str:
        """Return it for a line of progress."""
        return (
            f"workers {self.workers}, threads {self.threads}, batch {self.max_batch_size}, "
            f"wait {self.max_wait_ms:g} ms"
        )


@dataclass(frozen=True)
class Trial:
    """One rate, for a few seconds.

    Attributes:
        rate: requests per second that were asked for.
        goodput: good replies per second.
        good_share: of the requests, 0..1.
        latency_ms: by percentile, of the good replies; empty where there was none.
    """

    rate: float
    goodput: float
    good_share: float
    latency_ms: dict[str, float]

    def keeps(self, slo: Slo) -> bool:
        """Return whether the promise was kept, and nearly everything answered."""
        within = self.latency_ms.get(slo.percentile, float("inf")) <= slo.milliseconds
        return within and self.good_share >= GOOD_SHARE


def trial_of(phase: Phase) -> Trial:
    """Return what a phase of the load generator comes to."""
    good = phase.good
    return Trial(
        rate=phase.rate or 0.0,
        goodput=phase.goodput,
        good_share=good.count / phase.offered if good and phase.offered else 0.0,
        latency_ms=dict(good.percentiles) if good else {},
    )


@dataclass
class Measured:
    """A configuration and everything that was tried with it.

    Attributes:
        configuration: the settings.
        capacity: good replies per second of a closed loop; more than that cannot be promised.
        trials: in the order they were made.
        words: why there are no more; empty where the search came to its end.
    """

    configuration: Configuration
    capacity: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    words: str = ""

    def best(self, slo: Slo) -> Trial | None:
        """Return the highest rate that kept the promise."""
        kept = [trial for trial in self.trials if trial.keeps(slo)]
        return max(kept, key=lambda trial: trial.rate, default=None)
