"""The init container's program, run for real on packages that are, and are not, the pinned one."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.package import PRETRAINED
from tests.k8s.rendered import Object, workloads

PACKAGE = PRETRAINED / "caformer_digits"
WITH_PACKAGES = ["gpu", "triton", "volume", "image"]


def init_container(overlay: str) -> Object:
    (server,) = (one for one in workloads(overlay) if one.name == "metaserve")
    containers: list[Object] = server.pod["initContainers"]
    (container,) = containers
    return container


def check(model: Path, pinned: str) -> subprocess.CompletedProcess[str]:
    """Run the program on a package; an absolute METASERVE_MODEL stands for itself."""
    (program,) = init_container("volume")["args"]
    return subprocess.run(
        [sys.executable, "-c", program],
        env={"METASERVE_MODEL": str(model), "PACKAGE_SHA256": pinned},
        capture_output=True,
        text=True,
        timeout=60,
    )


def pin(package: Path) -> str:
    return hashlib.sha256((package / "manifest.json").read_bytes()).hexdigest()


@pytest.mark.parametrize("overlay", WITH_PACKAGES)
def test_a_package_is_checked_before_the_service_starts(overlay: str) -> None:
    container = init_container(overlay)
    (server,) = (one for one in workloads(overlay) if one.name == "metaserve")
    (serving,) = server.pod["containers"]
    assert container["command"] == ["python", "-c"]
    assert container["args"] == init_container("volume")["args"]
    assert container["image"] == serving["image"]
    assert container["envFrom"] == serving["envFrom"]
    mounts = [one for one in serving["volumeMounts"] if one["name"] == "models"]
    assert container["volumeMounts"] == mounts == [
        {"name": "models", "mountPath": "/models", "readOnly": True}
    ]  # fmt: skip


def test_the_pinned_package_passes() -> None:
    done = check(PACKAGE, pin(PACKAGE))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_changed_manifest_is_refused_with_its_hash(tmp_path: Path) -> None:
    changed = Path(shutil.copytree(PACKAGE, tmp_path / "package"))
    manifest = changed / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    done = check(changed, pin(PACKAGE))
    assert done.returncode == 1
    assert pin(changed) in done.stderr


def test_an_unset_pin_is_refused() -> None:
    done = check(PACKAGE, "unset")
    assert done.returncode == 1
    assert f"is not PACKAGE_SHA256 but {pin(PACKAGE)}" in done.stderr


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    done = check(tmp_path / "nothing", pin(PACKAGE))
    assert done.returncode == 1
    assert f"{tmp_path}/nothing/manifest.json cannot be read" in done.stderr
