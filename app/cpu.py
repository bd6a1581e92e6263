"""How many CPUs this process may use: the container's limit, not the host's count."""

from __future__ import annotations

import math
import os
from pathlib import Path


def cpu_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the usable CPUs, at least 1: affinity mask and cgroup quota, rounded up.

    Source: Linux, Documentation/admin-guide/cgroup-v2.rst, `cpu.max`; for version 1,
    `cpu.cfs_quota_us` over `cpu.cfs_period_us`.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    usable = affinity or os.cpu_count() or 1
    quota = _quota_v2(cgroup) or _quota_v1(cgroup)
    return max(1, min(usable, math.ceil(quota))) if quota else usable


def _quota_v2(cgroup: Path) -> float | None:
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_v1(cgroup: Path) -> float | None:
    try:
        quota = int((cgroup / "cpu/cpu.cfs_quota_us").read_text())
        period = int((cgroup / "cpu/cpu.cfs_period_us").read_text())
        return quota / period if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
