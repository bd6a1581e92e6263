"""The manifests as `kubectl kustomize` renders them; no cluster is asked."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tests.required import missing

ROOT = Path(__file__).parents[2]

OVERLAYS = {
    "base": "k8s/base",
    "cpu": "k8s/overlays/cpu",
    "gpu": "k8s/overlays/gpu",
    "triton": "k8s/overlays/triton",
    "autoscale": "k8s/overlays/autoscale",
    "keda": "k8s/overlays/autoscale/keda",
    "export": "k8s/export",
    "export-triton": "k8s/export-triton",
    "kserve": "k8s/kserve",
    # Overlays as users write them, with the components that no overlay above has.
    "volume": "tests/k8s/volume",
    "image": "tests/k8s/image",
}

Object = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """What makes pods.

    Attributes:
        object: the Deployment, Job or InferenceService.
        labels: of its pods.
        pod: their spec.
    """

    object: Object
    labels: Mapping[str, str]
    pod: Object

    @property
    def kind(self) -> str:
        return str(self.object["kind"])

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

    @property
    def runs_once(self) -> bool:
        return self.kind == "Job"

    @property
    def containers(self) -> list[Object]:
        return [*self.pod.get("initContainers", []), *self.pod["containers"]]

    @property
    def ports(self) -> dict[str, int]:
        return {
            port["name"]: port["containerPort"]
            for container in self.pod["containers"]
            for port in container.get("ports", [])
        }


def render(folder: str) -> str:
    """Return what would be applied; without kubectl the test skips."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        missing("kubectl is not installed (on Debian: apt install kubernetes-client)")
    done = subprocess.run(
        [kubectl, "kustomize", str(ROOT / folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def objects(overlay: str) -> tuple[Object, ...]:
    """Return the objects of one overlay."""
    return tuple(yaml.safe_load_all(render(OVERLAYS[overlay])))


def of_kind(overlay: str, kind: str) -> list[Object]:
    return [one for one in objects(overlay) if one["kind"] == kind]


def workloads(overlay: str) -> Iterator[Workload]:
    for one in objects(overlay):
        if one["kind"] in ("Deployment", "Job"):
            template = one["spec"]["template"]
            yield Workload(one, template["metadata"]["labels"], template["spec"])
        elif one["kind"] == "InferenceService":
            labels = {"serving.kserve.io/inferenceservice": one["metadata"]["name"]}
            yield Workload(one, labels, one["spec"]["predictor"])


def selected(overlay: str, selector: Mapping[str, str]) -> list[Workload]:
    """Return the workloads whose pods have all of some labels; none for no labels at all."""
    return [
        one for one in workloads(overlay) if selector and selector.items() <= one.labels.items()
    ]
