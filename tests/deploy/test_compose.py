"""docker-compose.yml: what it starts is confined, ends in time, and is set as the service knows."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml

from app.settings import PREFIX, Settings
from tests.deploy.test_dockerfile import VERSION
from tests.k8s.rendered import OVERLAYS, render

ROOT = Path(__file__).parents[2]
FILE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
OURS = [name for name in SERVICES if name.startswith("metaserve")]
# The Dockerfile's stage -> what its image's tag ends in.
SUFFIXES = {"cpu": "", "gpu": "-gpu", "export": "-export"}
NVIDIA = {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
DEFAULT = re.compile(r"\$\{(\w+):-([^}]*)\}")


def settings_of(service: str) -> Settings:
    """Return the settings a service starts with where nobody sets a variable."""
    given: dict[str, Any] = {
        name.removeprefix(PREFIX).lower(): DEFAULT.sub(lambda match: match[2], value)
        for name, value in SERVICES[service]["environment"].items()
        if value is not None  # handed on where it is set
    }
    return Settings(**given)


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert not service.get("privileged")
    assert "latest" not in service["image"]
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), f"{name} is reachable from outside"


@pytest.mark.parametrize("name", OURS)
def test_a_container_is_given_longer_than_its_drain(name: str) -> None:
    settings = settings_of(name)
    grace = float(SERVICES[name]["stop_grace_period"].removesuffix("s"))
    # The five seconds that docs/architecture.md promises for the end itself.
    assert grace >= settings.drain_delay_s + settings.drain_timeout_s + 5


@pytest.mark.parametrize("name", OURS)
def test_every_setting_is_one_and_its_default_is_taken(name: str) -> None:
    assert settings_of(name).host == "127.0.0.1"  # the image's own is not overridden here
    names = {one.removeprefix(PREFIX).lower() for one in SERVICES[name]["environment"]}
    assert names <= set(Settings.model_fields)


def test_what_is_mounted_is_in_the_checkout_or_a_named_volume() -> None:
    for service in SERVICES.values():
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            assert source in FILE["volumes"] or (ROOT / source).exists(), mount


def test_a_plain_up_starts_the_service_and_its_watchers() -> None:
    plain = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert plain == {"metaserve", "prometheus", "grafana"}
    profiles = {profile for one in SERVICES.values() for profile in one.get("profiles", [])}
    assert profiles == {"gpu", "triton", "export"}


def test_prometheus_asks_the_services_by_the_names_they_have_here() -> None:
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text("utf-8"))
    text = yaml.safe_dump(scraped["scrape_configs"])
    for name in OURS:
        assert re.search(rf"\b{name}(:8000)?\b", text), f"{name} is not scraped"


def test_grafana_finds_what_is_provisioned() -> None:
    mounts = dict(mount.split(":")[:2] for mount in SERVICES["grafana"]["volumes"])
    providers = yaml.safe_load(
        next((ROOT / "deploy/grafana/provisioning/dashboards").glob("*.yml")).read_text("utf-8")
    )
    folder = providers["providers"][0]["options"]["path"]
    assert mounts["./deploy/grafana/dashboards"] == folder
    sources = yaml.safe_load(
        next((ROOT / "deploy/grafana/provisioning/datasources").glob("*.yml")).read_text("utf-8")
    )
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"


@pytest.mark.parametrize("name", [*OURS, "export"])
def test_a_read_only_container_has_somewhere_to_write(name: str) -> None:
    assert "/tmp" in {one.partition(":")[0] for one in SERVICES[name]["tmpfs"]}


def test_what_a_service_waits_for_is_there() -> None:
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", [])) <= SERVICES.keys() - {name}, name


def test_prometheus_reads_a_file_that_is_mounted() -> None:
    command = " ".join(SERVICES["prometheus"]["command"])
    (read,) = re.findall(r"--config\.file=(\S+)", command)
    mounts = [one.split(":") for one in SERVICES["prometheus"]["volumes"]]
    ((source, target),) = (one[:2] for one in mounts if one[0].startswith("./"))
    assert (ROOT / source / PurePosixPath(read).relative_to(target)).is_file()


@pytest.mark.parametrize("name", ["metaserve-gpu", "triton"])
def test_what_runs_on_a_gpu_gets_one_and_shared_memory(name: str) -> None:
    service = SERVICES[name]
    assert service["deploy"]["resources"]["reservations"]["devices"] == [NVIDIA]
    assert re.fullmatch(r"[1-9]\d*g", service["shm_size"]), "an engine gives 64 MB"


def test_the_service_on_a_gpu_runs_there() -> None:
    assert settings_of("metaserve-gpu").device == "cuda"
    for name in ("metaserve", "metaserve-triton"):
        assert "deploy" not in SERVICES[name], "these start without a GPU"
        assert settings_of(name).device != "cuda"


def test_the_service_before_triton_asks_the_one_that_is_started_with_it() -> None:
    settings = settings_of("metaserve-triton")
    assert (settings.backend, settings.triton_url) == ("triton", "triton:8001")
    assert SERVICES["triton"]["profiles"] == SERVICES["metaserve-triton"]["profiles"]
    (repository,) = re.findall(r"--model-repository=(\S+)", " ".join(SERVICES["triton"]["command"]))
    # A version of a model of the repository, which both have mounted.
    model = PurePosixPath(str(settings.model))
    assert (model.name, str(model.parent.parent)) == ("1", repository)
    assert settings.triton_model in (None, model.parent.name)
    assert SERVICES["triton"]["volumes"] == SERVICES["metaserve-triton"]["volumes"]
    for name in ("triton", "metaserve-triton"):
        assert any(
            PurePosixPath(repository).is_relative_to(one.split(":")[1])
            for one in SERVICES[name]["volumes"]
        )


@pytest.mark.parametrize("name", [*OURS, "export"])
def test_a_service_is_built_from_the_stage_of_its_image(name: str) -> None:
    assert VERSION is not None
    target = SERVICES[name]["build"]["target"]
    wanted = {"metaserve-gpu": "gpu", "export": "export"}
    assert target == wanted.get(name, "cpu")
    assert SERVICES[name]["image"] == f"metaserve:{VERSION[1]}{SUFFIXES[target]}"


def test_the_image_is_named_alike_everywhere() -> None:
    assert VERSION is not None
    ours = {f"metaserve:{VERSION[1]}{suffix}" for suffix in SUFFIXES.values()}
    named = {
        name: re.findall(r"(?<![\w/-])metaserve:[\w.-]+", (ROOT / name).read_text("utf-8"))
        for name in ("docker-compose.yml", "Makefile", "Dockerfile")
    } | {
        # Rules and labels begin alike there.
        folder: re.findall(r"image: (?:\S+/)?(metaserve:\S+)", render(folder))
        for folder in OVERLAYS.values()
    }
    for place, found in named.items():
        assert found, place
        assert set(found) <= ours, place


def test_every_setting_can_be_given_but_those_that_the_file_itself_decides() -> None:
    decided = {"backend", "device", "host", "port", "model_store", "triton_url"}
    # Of one backend, or with a file or a port to mount: an override file has room for them.
    left_out = {
        "api_keys_file",
        "cuda_graphs",
        "fake_batch_ms",
        "metrics_port",
        "ort_cache_dir",
        "ort_provider",
        "torch_compile",
        "torch_precision",
        "triton_model",
        "triton_wait_s",
    }
    given = {name.removeprefix(PREFIX).lower() for name in FILE["x-settings"]}
    assert given == set(Settings.model_fields) - decided - left_out


def test_a_limit_of_memory_has_room_for_what_its_threads_decode() -> None:
    for name in "metaserve", "metaserve-triton":
        memory = DEFAULT.sub(lambda match: match[2], SERVICES[name]["mem_limit"])
        cpus = float(DEFAULT.sub(lambda match: match[2], str(SERVICES[name]["cpus"])))
        image_gb = 4e-9 * settings_of(name).max_pixels  # Pillow holds four bytes a pixel
        assert float(memory.removesuffix("g")) > cpus * image_gb + 0.2
