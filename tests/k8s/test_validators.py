"""The rendered manifests before the schemas of Kubernetes, and before checkov, offline."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.place import VENV
from tests.k8s.rendered import OVERLAYS, ROOT, objects
from tests.k8s.test_custom_kinds import API_VERSIONS
from tests.required import missing

# Upstream supports the last three (https://kubernetes.io/releases); the two before them are what
# clouds still run.
VERSIONS = ("1.33", "1.34", "1.35", "1.36", "1.37")


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a validator without a network; without the validator the test skips."""
    path = VENV / "bin" / program
    if not path.exists():
        missing(f"{program} is not installed in {VENV} (make test does it)")
    nowhere = "http://127.0.0.1:9"
    return subprocess.run(
        [str(path), *arguments],
        env=os.environ | {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "NO_PROXY": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a file for each overlay."""
    place = tmp_path_factory.mktemp("rendered")
    for overlay in OVERLAYS:
        (place / f"{overlay}.yaml").write_text(yaml.safe_dump_all(objects(overlay)))
    return place


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(folder: Path, version: str) -> None:
    files = [str(one) for one in sorted(folder.iterdir())]
    done = run("kubernetes-validate", "--strict", "--quiet", "-k", version, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    # It passes over kinds that it has no schema for: these must be the CRDs, and nothing else.
    unknown = [line.split("kind ")[1].split()[0] for line in _warnings(done.stdout + done.stderr)]
    assert set(unknown) == API_VERSIONS.keys()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_misspelt_field_would_be_noticed(tmp_path: Path, version: str) -> None:
    (deployment,) = (one for one in objects("base") if one["kind"] == "Deployment")
    misspelt = json.loads(json.dumps(deployment).replace("readinessProbe", "readynessProbe"))
    path = tmp_path / "misspelt.yaml"
    path.write_text(yaml.safe_dump(misspelt))
    done = run("kubernetes-validate", "--strict", "-k", version, str(path))
    assert done.returncode == 1
    assert "readynessProbe" in done.stdout + done.stderr


def test_checkov_finds_only_what_is_accepted(folder: Path) -> None:
    done = run(
        "checkov",
        f"--directory={folder}",
        "--framework=kubernetes",
        "--skip-download",
        "--compact",
        "--output=json",
    )
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    seen = {one["file_path"] for one in report["results"]["passed_checks"]}
    assert seen == {f"/{overlay}.yaml" for overlay in OVERLAYS}
    failed = {
        (one["check_id"], one["resource"], one["check_name"])
        for one in report["results"]["failed_checks"]
    }
    accepted = yaml.safe_load((ROOT / "tests/k8s/accepted.yaml").read_text())
    assert all(entry["reason"] for entry in accepted)
    assert {(check, resource) for check, resource, _ in failed} == {
        (entry["check"], resource) for entry in accepted for resource in entry["objects"]
    }, failed


def _warnings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("WARN")]
