"""The Dockerfile's promises that can be read; tests/image holds a built image to the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)


def stages() -> dict[str, tuple[str, list[str]]]:
    """Return stage -> (what it starts from, its instructions)."""
    found: dict[str, tuple[str, list[str]]] = {}
    instructions: list[str] = []
    for line in re.sub(r"\\\n\s*", " ", DOCKERFILE).splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)$", line):
            instructions = []
            found[match[2]] = (match[1], instructions)
        elif line.strip() and not line.startswith("#"):
            instructions.append(line)
    return found


def lineage(stage: str) -> Iterator[str]:
    """Return a stage's instructions after those it starts from."""
    start, own = stages()[stage]
    if start in stages():
        yield from lineage(start)
    yield from own


def last(stage: str, instruction: str) -> str:
    return [line for line in lineage(stage) if line.startswith(instruction + " ")][-1]


def test_the_default_is_the_image_without_torch() -> None:
    assert list(stages())[-1] == "cpu"


@pytest.mark.parametrize("stage", ["cpu", "gpu", "export"])
def test_an_image_runs_as_a_numbered_user_above_those_of_hosts(stage: str) -> None:
    user = re.fullmatch(r"USER (\d+):(\d+)", last(stage, "USER"))
    assert user is not None
    assert int(user[1]) > 10_000


@pytest.mark.parametrize("stage", ["cpu", "gpu", "export"])
def test_no_shell_stands_between_the_engine_and_the_service(stage: str) -> None:
    assert last(stage, "ENTRYPOINT") == 'ENTRYPOINT ["metaserve"]'
    assert last(stage, "CMD").startswith("CMD [")


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_an_image_that_serves_asks_its_readiness(stage: str) -> None:
    assert '["python3", "-m", "app.probe"]' in last(stage, "HEALTHCHECK")
    assert last(stage, "STOPSIGNAL") == "STOPSIGNAL SIGTERM"


@pytest.mark.parametrize("stage", ["cpu", "gpu", "export"])
def test_nothing_is_installed_in_the_final_stages(stage: str) -> None:
    runs = [line for line in lineage(stage) if line.startswith("RUN ")]
    assert not [line for line in runs if re.search(r"\b(pip|apt|apt-get|curl)\b", line)]


def test_the_version_label_is_the_packages() -> None:
    assert VERSION is not None
    assert f"ARG VERSION={VERSION[1]}" in stages()["base"][1]


def test_what_is_copied_exists_and_is_let_through() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert "*" in ignored
    let_through = [line.removeprefix("!") for line in ignored if line.startswith("!")]
    for _, instructions in stages().values():
        for line in instructions:
            if not line.startswith("COPY ") or "--from=" in line:
                continue
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert any(source == one or source.startswith(f"{one}/") for one in let_through), (
                    f"{source} is kept out by .dockerignore"
                )
