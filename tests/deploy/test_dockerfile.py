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
    # Comments first: they may stand within an instruction and do not end it.
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.M)
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if match := re.match(r"FROM (\S+) AS (\S+)$", line):
            instructions = []
            found[match[2]] = (match[1], instructions)
        elif line.strip():
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
    installs = re.compile(r"\bpip3? |\b(apt|apt-get|curl)\b")
    assert not [line for line in runs if installs.search(line)]


@pytest.mark.parametrize("stage", ["cpu", "gpu", "export"])
def test_an_image_holds_what_its_own_lock_names(stage: str) -> None:
    start, built = stages()[f"build-{stage}"]
    lock = f"deploy/requirements/{stage}.txt"
    assert start == "build"
    assert f"COPY {lock} {lock}" in built
    (run,) = (line for line in built if line.startswith("RUN "))
    assert run.endswith(f" deploy/install.sh {lock}")
    copies = [line for line in lineage(stage) if line.startswith("COPY ")]
    assert copies == [f"COPY --from=build-{stage} /opt/metaserve /opt/metaserve"]


def test_whatever_is_installed_has_a_hash() -> None:
    script = (ROOT / "deploy/install.sh").read_text("utf-8")
    installs = [
        command
        for text in (script, *(line for one in stages().values() for line in one[1]))
        for command in re.split(r"\n|&&|;", text)
        if re.search(r"\bpip\b.*\binstall\b", command)
    ]
    from_locks = [one for one in installs if "--no-index /wheel/" not in one]
    assert (len(installs), len(from_locks)) == (3, 2)  # what builds, what is served, our wheel
    for one in from_locks:
        assert "--require-hashes" in one
        assert "--no-deps" in one


@pytest.mark.parametrize("stage", ["cpu", "gpu"])
def test_an_image_that_serves_is_reachable_from_outside_of_it(stage: str) -> None:
    variables = [line for line in lineage(stage) if line.startswith("ENV ")]
    assert re.findall(r"METASERVE_HOST=(\S+)", " ".join(variables)) == ["0.0.0.0"]


def test_an_image_says_what_it_is() -> None:
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="(.*?)"', last("cpu", "LABEL")))
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    assert labels.pop("description")
    assert labels == {
        "title": "metaserve",
        "version": "${VERSION}",
        "revision": "${REVISION}",
        "licenses": "Apache-2.0",
    }
    assert f'license = "{labels["licenses"]}"' in project


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
