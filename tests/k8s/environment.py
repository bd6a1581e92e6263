"""The environment that a rendered container starts with."""

from __future__ import annotations

import math
from decimal import Decimal

from tests.k8s.rendered import Object, Workload, of_kind


def environment(overlay: str, container: Object) -> dict[str, str]:
    """Return a container's variables: its settings, its own, and what its limits give."""
    maps = {one["metadata"]["name"]: one["data"] for one in of_kind(overlay, "ConfigMap")}
    found: dict[str, str] = {}
    for source in container.get("envFrom", []):
        found |= maps[source["configMapRef"]["name"]]
    for one in container.get("env", []):
        found[one["name"]] = one["value"] if "value" in one else _from_limits(one, container)
    return found


def servers(workload: Workload) -> list[Object]:
    """Return a workload's containers that run `metaserve serve`."""
    return [
        one
        for one in workload.pod["containers"]
        if not workload.runs_once and "metaserve:" in one["image"] and "command" not in one
    ]


def cpus(quantity: str) -> Decimal:
    """Return a quantity of CPUs as a number."""
    if quantity.endswith("m"):
        return Decimal(quantity.removesuffix("m")) / 1000
    return Decimal(quantity)


def memory_bytes(quantity: str) -> int:
    """Return a quantity of memory as a number."""
    for suffix, factor in (("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)):
        if quantity.endswith(suffix):
            return int(quantity.removesuffix(suffix)) * factor
    return int(quantity)


def _from_limits(variable: Object, container: Object) -> str:
    reference = variable["valueFrom"]["resourceFieldRef"]
    assert reference["resource"] == "limits.cpu", reference
    assert reference["containerName"] == container["name"], reference
    limit = cpus(container["resources"]["limits"]["cpu"])
    return str(math.ceil(limit / Decimal(reference["divisor"])))
