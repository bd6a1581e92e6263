"""What deploy/ holds for Prometheus and Grafana, and what its expressions are made of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy/prometheus"
GRAFANA = ROOT / "deploy/grafana"

_CHOICE = re.compile(r"label_values\((?P<series>\w+(?:\{[^{}]*\})?), (?P<label>[a-z_]+)\)")
_COMPARED = re.compile(r"\s*(>=|<=|>|<|==|!=)\s*(scalar\([^)]*\)|[0-9.]+)")


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds."""
    return yaml.safe_load(path.read_text("utf-8"))


def rules() -> list[dict[str, Any]]:
    """Return every rule of alerts.yml."""
    return [
        rule for group in read_yaml(PROMETHEUS / "alerts.yml")["groups"] for rule in group["rules"]
    ]


def alerts() -> dict[str, dict[str, Any]]:
    """Return name -> alert."""
    return {rule["alert"]: rule for rule in rules() if "alert" in rule}


def dashboard() -> dict[str, Any]:
    """Return the dashboard."""
    found: dict[str, Any] = json.loads((GRAFANA / "dashboards/metaserve.json").read_text("utf-8"))
    return found


def panel_expressions() -> Iterator[tuple[str, str]]:
    """Return the title of a panel and one of its expressions."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


def choices() -> dict[str, tuple[str, str]]:
    """Return variable of the dashboard -> the series and the label that its values are of."""
    found = {}
    for variable in dashboard()["templating"]["list"]:
        query = variable["query"]["query"]
        choice = _CHOICE.fullmatch(query)
        assert choice is not None, f"Grafana cannot read {query}"
        found[variable["name"]] = (choice["series"], choice["label"])
    return found


def measured_parts(expression: str) -> list[str]:
    """Return what an alert looks at: each side of an `or`, without what it is compared with."""
    parts = []
    for side in split_or(expression):
        inner = re.fullmatch(r"absent\((.*)\)", side, re.DOTALL)
        parts.append(inner[1] if inner else _COMPARED.sub("", side).strip())
    return parts


def split_or(expression: str) -> list[str]:
    """Split an expression at each `or` that stands in no parentheses."""
    sides, depth = [""], 0
    for token in re.findall(r'"[^"]*"|\bor\b|[()]|.', expression, re.DOTALL):
        depth += {"(": 1, ")": -1}.get(token, 0)
        if token == "or" and depth == 0:
            sides.append("")
        else:
            sides[-1] += token
    return [side.strip() for side in sides]
