"""A summary as a table for people."""

from __future__ import annotations

from app.bench.recording import Latency, Phase, Summary

_COLUMNS = ("p50", "p90", "p99", "p99.9", "max")


def render(summary: Summary) -> str:
    """Return the whole report, lines without a newline at the end."""
    lines: list[str] = []
    for phase in summary.phases:
        lines += [*_phase(phase), ""]
    for outcome, seen in summary.retry_after.items():
        lines.append(
            f"Retry-After on {seen['count']:.0f} replies {outcome}: "
            f"{seen['least']:g} to {seen['most']:g} s"
        )
    if summary.unfinished:
        lines.append(f"interrupted: {summary.unfinished} requests were under way and do not count")
    lines.append(
        f"generator: {summary.cpu_ms_per_1000:.0f} ms of CPU for 1000 requests, "
        f"busy {summary.cpu_share:.0%} of the time"
    )
    lines += [f"note: {note}" for note in summary.notes]
    return "\n".join(lines)


def _phase(phase: Phase) -> list[str]:
    rate = "closed loop" if phase.rate is None else f"{phase.rate:g} requests/s asked for"
    lines = [
        f"{rate}, {phase.seconds:.1f} s, {phase.offered} requests, "
        f"{phase.goodput:.1f} good replies/s",
        f"  {'outcome':<28}{'count':>8}  {'latency in ms:  mean':>21}"
        + "".join(f"{name:>9}" for name in _COLUMNS),
    ]
    if phase.good and len([one for one in phase.latency if one.startswith("2")]) > 1:
        lines.append(_row("good", phase.good))
    lines += [_row(outcome, latency) for outcome, latency in phase.latency.items()]
    if not phase.latency:
        lines.append("  nothing ended")
    return lines


def _row(name: str, latency: Latency) -> str:
    values = "".join(f"{_shown(latency.percentiles[one]):>9}" for one in _COLUMNS)
    return f"  {name:<28}{latency.count:>8}  {_shown(latency.mean):>21}{values}"


def _shown(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 100 else f"{milliseconds:.0f}"
