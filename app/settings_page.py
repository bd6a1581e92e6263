"""docs/settings.md, made from the Settings class: `python -m app.settings_page`."""

from __future__ import annotations

from typing import Any

from app.settings import PREFIX, Settings


def settings_page() -> str:
    """Return docs/settings.md."""
    rows = [
        f"| `{PREFIX}{name.upper()}` | `--{name.replace('_', '-')}` | {_default(field)} "
        f"| {_allowed(field)} | {field['description']} |"
        for name, field in Settings.model_json_schema()["properties"].items()
    ]
    return "\n".join([*_PAGE_HEAD, *rows]) + "\n"


_PAGE_HEAD = (
    "# Settings",
    "",
    "<!-- Written by `make docs` from app/settings.py; edit it there. -->",
    "",
    "Each setting is an environment variable and a flag of `metaserve serve`; a flag goes before a",
    "variable. A `METASERVE_*` variable that is not listed here stops the start, with the nearest",
    "name that is.",
    "",
    "| Variable | Flag | Default | Allowed | What it does |",
    "| --- | --- | --- | --- | --- |",
)


def _default(field: dict[str, Any]) -> str:
    default = field["default"]
    if default is None:
        return "none"
    return f"`{default:g}`" if isinstance(default, float) else f"`{str(default).lower()}`"


def _allowed(field: dict[str, Any]) -> str:
    """Return a field's choices, or its type and bounds."""
    kind = next((one for one in field.get("anyOf", ()) if one["type"] != "null"), field)
    if "enum" in kind:
        return ", ".join(f"`{choice}`" for choice in kind["enum"])
    words = {"string": "text", "integer": "whole number", "boolean": "`true`, `false`"}
    name = "path" if kind.get("format") == "path" else words.get(kind["type"], kind["type"])
    bounds = [
        f"{sign} {kind[key]:.12g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"))
        if key in kind
    ]
    return " ".join([name, ", ".join(bounds)]).strip()


if __name__ == "__main__":
    print(settings_page(), end="")
