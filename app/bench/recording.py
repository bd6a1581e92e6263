"""What a load generator saw, request by request; and what that comes to."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.bench.plan import Plan

PERCENTILES = (50.0, 90.0, 99.0, 99.9)

NOT_REPLIES = ("reset", "timeout", "cannot connect", "malformed reply")
"""How a request can end without an HTTP status."""

REFUSALS = (503, 429)


@dataclass
class Recording:
    """One row a request, column by column: seconds from the start of the run.

    Attributes:
        intended: when it was to start.
        sent: when its bytes were handed to a connection; at its end where none ever was.
        ended: when its reply was complete, or it was given up.
        outcomes: index into `names`.
        names: for example `200`, `503 overloaded`, `reset`.
        retry_after: outcome -> [how many had the header, least, most], seconds.
        cpu_seconds: of the generator itself, while it ran.
        wall_seconds: how long it ran.
        held_back: requests that waited for a connection because `max_connections` were busy.
        unfinished: still under way when the run was interrupted.
        interrupted: whether it was.
    """

    intended: array[float] = field(default_factory=lambda: array("d"))
    sent: array[float] = field(default_factory=lambda: array("d"))
    ended: array[float] = field(default_factory=lambda: array("d"))
    outcomes: array[int] = field(default_factory=lambda: array("i"))
    names: dict[str, int] = field(default_factory=dict)
    retry_after: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    held_back: int = 0
    unfinished: int = 0
    interrupted: bool = False

    def add(self, intended: float, sent: float, ended: float, outcome: str) -> None:
        """Note a request's end."""
        self.intended.append(intended)
        self.sent.append(sent)
        self.ended.append(ended)
        self.outcomes.append(self.names.setdefault(outcome, len(self.names)))

    def add_retry_after(self, outcome: str, seconds: float) -> None:
        """Note that a reply said when to come back."""
        count, least, most = self.retry_after.get(outcome, (0, seconds, seconds))
        self.retry_after[outcome] = [count + 1, min(least, seconds), max(most, seconds)]

    def merge(self, other: Recording) -> None:
        """Take in what another generator of the same run saw."""
        self.intended += other.intended
        self.sent += other.sent
        self.ended += other.ended
        translated = [self.names.setdefault(name, len(self.names)) for name in other.names]
        self.outcomes.extend(translated[one] for one in other.outcomes)
        for name, (count, least, most) in other.retry_after.items():
            mine = self.retry_after.get(name, (0, least, most))
            self.retry_after[name] = [mine[0] + count, min(mine[1], least), max(mine[2], most)]
        self.cpu_seconds += other.cpu_seconds
        self.wall_seconds = max(self.wall_seconds, other.wall_seconds)
        self.held_back += other.held_back
        self.unfinished += other.unfinished
        self.interrupted |= other.interrupted


@dataclass(frozen=True)
class Latency:
    """Milliseconds from the intended start to the complete reply.

    Attributes:
        count: replies.
        mean: of them.
        percentiles: `p50` .. `p99.9` and `max`.
    """

    count: int
    mean: float
    percentiles: dict[str, float]


@dataclass(frozen=True)
class Phase:
    """What came of the requests of one phase.

    Attributes:
        rate: requests per second that were asked for; None in a closed loop.
        seconds: how long the phase was, or had been when the run was interrupted.
        offered: requests whose intended start lay in it.
        goodput: good replies that ended in it, per second.
        outcomes: how they ended -> how many.
        latency: by outcome.
        good: latency of all with status 2xx; None where there is none.
        refused: latency of all with status 503 or 429; likewise.
        lag_ms: p99 of how much later than intended requests were sent.
    """

    rate: float | None
    seconds: float
    offered: int
    goodput: float
    outcomes: dict[str, int]
    latency: dict[str, Latency]
    good: Latency | None
    refused: Latency | None
    lag_ms: float


@dataclass(frozen=True)
class Summary:
    """A whole run in figures.

    Attributes:
        phases: one a rate.
        retry_after: outcome -> replies that carried Retry-After, and its range in seconds.
        cpu_ms_per_1000: CPU milliseconds the generator took for 1000 requests.
        cpu_share: of one core, for each of the generator's processes.
        held_back: requests that waited because `max_connections` were busy.
        unfinished: under way when the run was interrupted.
        stopped_at: seconds from the start of the last good reply, where nobody could connect after
            it; None where the service was there to the end.
        notes: sentences about the generator being the limit; none where it was not.
    """

    phases: list[Phase]
    retry_after: dict[str, dict[str, float]]
    cpu_ms_per_1000: float
    cpu_share: float
    held_back: int
    unfinished: int
    stopped_at: float | None
    notes: list[str]

    @property
    def good(self) -> int:
        """Replies with status 2xx in all phases."""
        return sum(phase.good.count for phase in self.phases if phase.good)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def summarise(recording: Recording, plan: Plan, processes: int = 1) -> Summary:
    """Return the figures of a run; what started in the warm-up is left out."""
    phases = []
    for index, (begin, end) in enumerate(plan.windows()):
        rate = plan.rates[index] if plan.rates else None
        until = min(end, max(begin, recording.wall_seconds))
        phases.append(_phase(recording, rate, begin, until))
    total = len(recording.outcomes)
    cpu_share = recording.cpu_seconds / max(recording.wall_seconds, 1e-9) / processes
    stopped_at = _stopped_at(recording)
    return Summary(
        phases=phases,
        retry_after={
            name: {"count": count, "least": least, "most": most}
            for name, (count, least, most) in recording.retry_after.items()
        },
        cpu_ms_per_1000=1e6 * recording.cpu_seconds / max(total, 1),
        cpu_share=cpu_share,
        held_back=recording.held_back,
        unfinished=recording.unfinished,
        stopped_at=stopped_at,
        notes=list(_notes(recording, phases, cpu_share, stopped_at)),
    )


def _phase(recording: Recording, rate: float | None, begin: float, end: float) -> Phase:
    intended = np.frombuffer(recording.intended, np.float64)
    ended = np.frombuffer(recording.ended, np.float64)
    outcomes = np.frombuffer(recording.outcomes, np.int32)
    ours = (intended >= begin) & (intended < end)
    milliseconds = 1000 * (ended - intended)
    lag = 1000 * (np.frombuffer(recording.sent, np.float64) - intended)[ours]
    by_name = {
        name: milliseconds[ours & (outcomes == index)] for name, index in recording.names.items()
    }
    by_name = {name: values for name, values in by_name.items() if len(values)}
    good = [index for name, index in recording.names.items() if is_good(name)]
    good_ends = ended[np.isin(outcomes, good)]
    seconds = max(end - begin, 1e-9)
    return Phase(
        rate=rate,
        seconds=end - begin,
        offered=int(ours.sum()),
        goodput=float(((good_ends >= begin) & (good_ends < end)).sum() / seconds),
        outcomes={name: len(values) for name, values in sorted(by_name.items())},
        latency={name: _latency(values) for name, values in sorted(by_name.items())},
        good=_joined(values for name, values in by_name.items() if is_good(name)),
        refused=_joined(values for name, values in by_name.items() if is_refusal(name)),
        lag_ms=float(np.percentile(lag, 99)) if len(lag) else 0.0,
    )


def is_good(outcome: str) -> bool:
    """Return whether it is a status 2xx."""
    return outcome.startswith("2")


def is_refusal(outcome: str) -> bool:
    """Return whether it is a status that says: later."""
    return outcome.startswith(tuple(map(str, REFUSALS)))


def _joined(columns: Iterable[NDArray[np.float64]]) -> Latency | None:
    values = list(columns)
    return _latency(np.concatenate(values)) if values else None


def _latency(milliseconds: NDArray[np.float64]) -> Latency:
    # The observed value at or above the rank: between two values there is nothing to interpolate.
    ranks = np.percentile(milliseconds, PERCENTILES, method="higher")
    named = {f"p{rank:g}": float(value) for rank, value in zip(PERCENTILES, ranks, strict=True)}
    largest = float(milliseconds.max())
    return Latency(len(milliseconds), float(milliseconds.mean()), {**named, "max": largest})


def _stopped_at(recording: Recording) -> float | None:
    ended = np.frombuffer(recording.ended, np.float64)
    outcomes = np.frombuffer(recording.outcomes, np.int32)
    names = recording.names
    last_good = ended[np.isin(outcomes, [names[name] for name in names if is_good(name)])]
    last_failed = ended[outcomes == names.get("cannot connect", -1)]
    if not len(last_good) or not len(last_failed) or last_failed.max() < last_good.max():
        return None
    return float(last_good.max())


def _notes(
    recording: Recording, phases: list[Phase], cpu_share: float, stopped_at: float | None
) -> Iterable[str]:
    if stopped_at is not None:
        yield f"the service was gone after {stopped_at:.1f} s: nobody could connect any more"
    if cpu_share > 0.85:
        yield (
            f"the generator itself was the limit: it was busy {cpu_share:.0%} of the time; "
            "give it --processes 2, or a machine of its own"
        )
    late = max((phase.lag_ms for phase in phases if phase.rate is not None), default=0.0)
    if recording.held_back:
        yield (
            f"{recording.held_back} requests were sent late: all connections were busy; their wait "
            "counts, --max-connections allows more"
        )
    elif late > 10:
        yield (
            f"the generator fell behind its schedule: 1 % of the requests were sent {late:.0f} ms "
            "late or more; that wait counts as latency"
        )
