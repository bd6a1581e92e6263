"""k8s/README.md names what is there, and the overlay that it shows is one that the tests render."""

from __future__ import annotations

import re

import yaml

from tests.k8s.rendered import ROOT

README = (ROOT / "k8s/README.md").read_text()


def test_every_directory_is_in_the_table_or_named_as_a_part() -> None:
    folders = {
        str(path.parent.relative_to(ROOT / "k8s"))
        for path in (ROOT / "k8s").rglob("kustomization.yaml")
    }
    assert folders <= set(re.findall(r"`([\w/-]+)`", README))
    commands = re.findall(r"(?:apply -k|kubectl kustomize) ((?:k8s|tests)/[\w/-]+)", README)
    assert commands
    assert all((ROOT / command / "kustomization.yaml").is_file() for command in commands)


def test_the_overlay_it_shows_is_rendered_by_the_tests() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    shown = yaml.safe_load(block.replace("../k8s/", "../../../k8s/"))
    rendered = yaml.safe_load((ROOT / "tests/k8s/volume/kustomization.yaml").read_text())
    assert shown.pop("images")[0]["name"] == "metaserve"
    assert shown == rendered
