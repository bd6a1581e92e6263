"""The service starts with what the manifests set: names, values, and the time a stop may take."""

from __future__ import annotations

import os

import pytest

from app.settings import Settings, load_settings
from tests.k8s.environment import environment, servers
from tests.k8s.rendered import OVERLAYS, Object, of_kind, workloads

SERVING = [one for one in OVERLAYS if not one.startswith("export")]
SECONDS_BEYOND_DRAINING = 5
"""docs/architecture.md, "Life and death"."""


def settings_of(overlay: str, container: Object, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Read the settings as `metaserve serve` would in a container."""
    for name in [one for one in os.environ if one.startswith("METASERVE_")]:
        monkeypatch.delenv(name)
    for name, value in environment(overlay, container).items():
        monkeypatch.setenv(name, value)
    return load_settings()


@pytest.mark.parametrize("overlay", SERVING)
def test_the_service_accepts_its_settings(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = 0
    for workload in workloads(overlay):
        for container in servers(workload):
            settings = settings_of(overlay, container, monkeypatch)
            ports = {one["name"]: one["containerPort"] for one in container["ports"]}
            assert ports == {"http": settings.port, "metrics": settings.metrics_port}
            assert settings.host == "0.0.0.0"
            assert str(settings.threads) == container["resources"]["limits"]["cpu"]
            assert settings.workers <= settings.threads
            checked += 1
    assert checked == 1


@pytest.mark.parametrize("overlay", SERVING)
def test_a_stop_may_take_longer_than_draining(
    overlay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for workload in workloads(overlay):
        for container in servers(workload):
            settings = settings_of(overlay, container, monkeypatch)
            draining = settings.drain_delay_s + settings.drain_timeout_s + SECONDS_BEYOND_DRAINING
            assert workload.pod["terminationGracePeriodSeconds"] > draining
            assert settings.drain_delay_s > 0, "endpoints need time, and there is no preStop"


@pytest.mark.parametrize("overlay", SERVING)
def test_a_start_may_wait_for_triton_and_a_stall_is_noticed(
    overlay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for workload in workloads(overlay):
        for container in servers(workload):
            settings = settings_of(overlay, container, monkeypatch)
            probe = container["startupProbe"]
            assert probe["periodSeconds"] * probe["failureThreshold"] > settings.triton_wait_s
            assert container["livenessProbe"]["periodSeconds"] < settings.stall_seconds


def test_on_a_gpu_nothing_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    (workload,) = workloads("gpu")
    (container,) = servers(workload)
    settings = settings_of("gpu", container, monkeypatch)
    assert (settings.backend, settings.device) == ("onnxruntime", "cuda")
    assert (settings.workers > 1, settings.engine) == (True, "shared")
    assert container["image"].endswith("-gpu")


def test_a_changed_setting_rolls_the_deployment() -> None:
    names = {of_kind(overlay, "ConfigMap")[0]["metadata"]["name"] for overlay in ("base", "gpu")}
    assert len(names) == 2
