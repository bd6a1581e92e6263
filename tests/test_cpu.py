"""The container's CPU limit, read from files like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.cpu import cpu_limit

CPUS = 8


@pytest.fixture(autouse=True)
def _eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(CPUS)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def write_v2(cgroup: Path, text: str) -> None:
    (cgroup / "cpu.max").write_text(text)


def write_v1(cgroup: Path, quota: str, period: str) -> None:
    (cgroup / "cpu").mkdir()
    (cgroup / "cpu/cpu.cfs_quota_us").write_text(quota)
    (cgroup / "cpu/cpu.cfs_period_us").write_text(period)


QUOTAS = [
    (400_000, 100_000, 4),
    (100_000, 100_000, 1),
    (50_000, 100_000, 1),
    (1_000, 100_000, 1),
    (150_000, 100_000, 2),
    (250_001, 100_000, 3),
    (20_000, 10_000, 2),
    (6_400_000, 100_000, CPUS),
]


@pytest.mark.parametrize(("quota", "period", "expected"), QUOTAS)
def test_a_quota_of_version_2_is_rounded_up_and_bounded(
    tmp_path: Path, quota: int, period: int, expected: int
) -> None:
    write_v2(tmp_path, f"{quota} {period}\n")
    assert cpu_limit(tmp_path) == expected


@pytest.mark.parametrize(("quota", "period", "expected"), QUOTAS)
def test_a_quota_of_version_1_is_rounded_up_and_bounded(
    tmp_path: Path, quota: int, period: int, expected: int
) -> None:
    write_v1(tmp_path, f"{quota}\n", f"{period}\n")
    assert cpu_limit(tmp_path) == expected


def test_no_quota_leaves_the_affinity(tmp_path: Path) -> None:
    write_v2(tmp_path, "max 100000\n")
    assert cpu_limit(tmp_path) == CPUS


def test_no_quota_of_version_1_leaves_the_affinity(tmp_path: Path) -> None:
    write_v1(tmp_path, "-1\n", "100000\n")
    assert cpu_limit(tmp_path) == CPUS


def test_without_cgroup_files_the_affinity_counts(tmp_path: Path) -> None:
    assert cpu_limit(tmp_path) == CPUS
    assert cpu_limit(tmp_path / "absent") == CPUS


@pytest.mark.parametrize(
    "text", ["", "max", "two 100000", "200000", "200000 0", "200000 100000 1", "\0", "0 100000"]
)
def test_garbage_leaves_the_affinity(tmp_path: Path, text: str) -> None:
    write_v2(tmp_path, text)
    assert cpu_limit(tmp_path) == CPUS


@pytest.mark.parametrize(("quota", "period"), [("", "100000"), ("200000", ""), ("200000", "0")])
def test_garbage_of_version_1_leaves_the_affinity(tmp_path: Path, quota: str, period: str) -> None:
    write_v1(tmp_path, quota, period)
    assert cpu_limit(tmp_path) == CPUS


def test_bytes_that_are_no_text_leave_the_affinity(tmp_path: Path) -> None:
    (tmp_path / "cpu.max").write_bytes(b"\xff\xfe 100000")
    assert cpu_limit(tmp_path) == CPUS


def test_where_the_affinity_is_not_known_the_cpus_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    assert cpu_limit(tmp_path) == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cpu_limit(tmp_path) == 1


def test_this_machine_has_at_least_one_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert cpu_limit() >= 1
