"""What the images install is pinned, hashed, and what this commit was tested with."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "deploy/requirements"
IMAGES = ("cpu", "gpu", "export")
# ONNX Runtime's GPU build has releases of its own, and libraries that only a GPU needs no test has.
UNTESTED = re.compile(r"nvidia-.*|cuda-.*|onnxruntime-gpu|triton|setuptools|pip|wheel")
# A comment, a pin, a hash of it.
LINE = re.compile(r"(#.*)?|[\w.-]+==[\w.+!]+( ; [^\\]+)? \\|    --hash=sha256:[0-9a-f]{64}( \\)?")


def read_lock(name: str) -> dict[str, tuple[str, list[str]]]:
    """Return package -> (version, hashes) of a lock file."""
    text = (LOCKS / f"{name}.txt").read_text("utf-8").replace("\\\n", " ")
    found: dict[str, tuple[str, list[str]]] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            pinned, *hashes = line.split("--hash=")
            requirement = Requirement(pinned.strip())
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            found[canonicalize_name(requirement.name)] = (specifier.version, hashes)
    return found


def versions_tested() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.mark.parametrize("name", [*IMAGES, "build"])
def test_every_package_of_an_image_has_a_version_and_hashes(name: str) -> None:
    lock = read_lock(name)
    assert lock
    for package, (version, hashes) in lock.items():
        assert version, package
        assert hashes, package
        assert all(one.strip().startswith("sha256:") for one in hashes), package


@pytest.mark.parametrize("name", [*IMAGES, "build"])
def test_a_lock_has_pins_hashes_and_comments_alone(name: str) -> None:
    # pip reads options from it too: an index of somebody's, a host that need not prove itself.
    for line in (LOCKS / f"{name}.txt").read_text("utf-8").splitlines():
        assert LINE.fullmatch(line), line


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_holds_the_versions_that_are_tested(name: str) -> None:
    tested = versions_tested()
    for package, (version, _) in read_lock(name).items():
        if not UNTESTED.fullmatch(package):
            assert version.partition("+")[0] == tested[package], package


@pytest.mark.parametrize(
    ("name", "has", "has_not"),
    [
        ("cpu", {"onnxruntime", "tritonclient", "cykooz-resizer"}, {"torch", "onnx", "timm"}),
        ("gpu", {"onnxruntime-gpu", "torch", "tritonclient"}, {"onnxruntime", "onnx", "timm"}),
        ("export", {"onnxruntime", "torch", "onnx", "tritonclient"}, {"onnxruntime-gpu", "timm"}),
    ],
)
def test_an_image_has_what_it_is_for_and_no_more(
    name: str, has: set[str], has_not: set[str]
) -> None:
    packages = set(read_lock(name))
    assert has <= packages
    assert not has_not & packages


def test_cuda_is_in_the_image_for_gpus_alone() -> None:
    for name in ("cpu", "export"):
        assert not [package for package in read_lock(name) if package.startswith("nvidia")]
    assert read_lock("export")["torch"][0].endswith("+cpu")
    assert "+" not in read_lock("gpu")["torch"][0]
