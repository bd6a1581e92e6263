"""The download code against a server in the shape of the hub: one fault, one sentence."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import resource
import subprocess
import sys
import termios
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.export.hub_server import COMMIT, Fault, Hub, running_hub

# Weights in name only: what is downloaded here is never opened.
WEIGHTS = hashlib.shake_256(b"weights").digest(300_000)
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
TIMM, OFFICIAL = "timm/caformer_s18.sail_in1k", "sail/dl"
LIMIT_SECONDS = 60

# What `metaserve export` does before it opens the weights, without the seconds that torch takes.
SCRIPT = """
import json, sys
from export.source import SourceError, Wanted, find_source
from models.package import PackageError
try:
    wanted = Wanted(**json.loads(sys.argv[1]))
    found = find_source(wanted, lambda line: print(line, file=sys.stderr))
except (SourceError, PackageError, ValueError) as error:
    print(f"metaserve: {error}", file=sys.stderr)
    sys.exit(2)
print(json.dumps([str(found.checkpoint), found.file, found.repository, found.commit]))
"""


@dataclass(frozen=True)
class Fetcher:
    """Fetches in a process of its own, with a cache of its own."""

    hub: Hub
    home: Path
    variables: dict[str, str] = field(default_factory=dict)

    def run(self, variant: str = "caformer_s18.sail_in1k", **wanted: str) -> Any:
        """Return what was found: path, file, repository and commit."""
        done = self.start({"variant": variant} | wanted)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def refuse(self, variant: str = "caformer_s18.sail_in1k", **wanted: str) -> str:
        """Return the one sentence that an attempt ends with."""
        done = self.start({"variant": variant} | wanted)
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        *_, sentence = done.stderr.splitlines()
        assert [line for line in done.stderr.splitlines() if "metaserve:" in line] == [sentence]
        return sentence

    def start(
        self, wanted: dict[str, str], file_limit: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        def limit() -> None:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        return subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(wanted)],
            env=os.environ | self.hub.environment(self.home) | self.variables,
            capture_output=True,
            text=True,
            timeout=LIMIT_SECONDS,
            preexec_fn=limit,
        )


@pytest.fixture
def hub() -> Iterator[Hub]:
    repositories = {
        TIMM: {"model.safetensors": WEIGHTS},
        OFFICIAL: {"caformer/caformer_s18_384_in21ft1k.pth": WEIGHTS},
    }
    with running_hub(repositories) as running:
        yield running


@pytest.fixture
def fetcher(hub: Hub, tmp_path: Path) -> Fetcher:
    return Fetcher(hub, tmp_path / "home")


@pytest.mark.parametrize(
    ("variant", "repository", "file"),
    [
        ("caformer_s18.sail_in1k", TIMM, "model.safetensors"),
        ("timm/caformer_s18.sail_in1k", TIMM, "model.safetensors"),
        ("caformer_s18_384_in21ft1k", OFFICIAL, "caformer/caformer_s18_384_in21ft1k.pth"),
    ],
)
def test_a_name_says_whose_file_is_fetched(
    fetcher: Fetcher, variant: str, repository: str, file: str
) -> None:
    path, *found = fetcher.run(variant)
    assert found == [file, repository, COMMIT]
    assert Path(path).read_bytes() == WEIGHTS
    assert Path(path).is_relative_to(fetcher.home)
    asked = [(one.method, one.path) for one in fetcher.hub.asked]
    assert ("HEAD", f"/{repository}/resolve/main/{file}") in asked
    assert len(fetcher.hub.downloads) == 1


def test_a_second_time_nothing_is_downloaded(fetcher: Fetcher) -> None:
    first = fetcher.run()
    assert fetcher.run() == first
    assert len(fetcher.hub.downloads) == 1


@pytest.mark.parametrize("state", ["offline", "down", "overloaded"])
def test_what_is_in_the_cache_serves_where_the_hub_does_not(fetcher: Fetcher, state: str) -> None:
    first = fetcher.run()
    if state == "overloaded":
        fetcher.hub.status = 503
    variables = {"offline": {"HF_HUB_OFFLINE": "1"}, "down": {"HF_ENDPOINT": "http://127.0.0.1:9"}}
    apart = replace(fetcher, variables=variables.get(state, {}))
    done = apart.start({"variant": "caformer_s18.sail_in1k"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == first
    assert "the hub cannot be reached, so the file in the cache is taken" in done.stderr


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_can_be_chosen(fetcher: Fetcher, revision: str) -> None:
    assert fetcher.run(revision=revision)[-1] == COMMIT
    assert f"/{TIMM}/resolve/{revision}/model.safetensors" in {
        one.path for one in fetcher.hub.asked
    }


def test_a_cut_connection_is_resumed_where_it_broke(fetcher: Fetcher) -> None:
    # The library keeps what has arrived in pieces of 10 MiB.
    piece = 10 * 2**20
    large = hashlib.shake_256(b"large").digest(2 * piece + 1000)
    fetcher.hub.repositories[TIMM] = {"model.safetensors": large}
    fetcher.hub.faults = ["cut"]
    path, *_ = fetcher.run()
    assert Path(path).read_bytes() == large
    ranges = [one.headers.get("Range") for one in fetcher.hub.downloads]
    assert ranges == [None, f"bytes={piece}-"]


@pytest.mark.parametrize("variables", [{}, {"HF_HUB_DISABLE_SYMLINKS": "1"}])
def test_a_file_that_is_not_what_was_announced_is_refused_and_removed(
    hub: Hub, tmp_path: Path, variables: dict[str, str]
) -> None:
    fetcher = Fetcher(hub, tmp_path / "home", variables)
    fetcher.hub.announced = {SHA256: "0" * 64}
    sentence = fetcher.refuse()
    assert f"damaged (sha256 {SHA256[:12]}..., the hub announces 000000000000...)" in sentence
    kept = [path for path in fetcher.home.rglob("*") if path.is_file() or path.is_symlink()]
    assert not [path for path in kept if "blobs" in path.parts or "snapshots" in path.parts]
    fetcher.hub.announced = {}
    path, *_ = fetcher.run()
    assert Path(path).read_bytes() == WEIGHTS
    assert len(fetcher.hub.downloads) == 2


def test_a_cached_file_that_was_damaged_later_is_not_used(fetcher: Fetcher) -> None:
    path, *_ = fetcher.run()
    Path(path).resolve().write_bytes(WEIGHTS[::-1])
    assert "was removed; try again" in fetcher.refuse()
    path, *_ = fetcher.run()
    assert Path(path).read_bytes() == WEIGHTS


def test_a_pinned_hash_is_kept(fetcher: Fetcher) -> None:
    assert fetcher.run(sha256=SHA256.upper())
    sentence = fetcher.refuse(sha256="0" * 64)
    assert f"has sha256 {SHA256}, not {'0' * 64} as --sha256 wants" in sentence
    assert "64 hexadecimal digits" in fetcher.refuse(sha256="abc")


def test_what_is_not_there_is_named_with_where_to_get_it(fetcher: Fetcher) -> None:
    del fetcher.hub.repositories[TIMM]["model.safetensors"]
    assert fetcher.refuse() == (
        f"metaserve: model.safetensors of {TIMM} cannot be fetched: the repository holds no such "
        f"file; you can download {fetcher.hub.url}/{TIMM}/resolve/main/model.safetensors "
        "and run `metaserve export caformer_s18.sail_in1k --checkpoint FILE --labels imagenet-1k`"
    )


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ("caformer_m36.sail_in1k", "there is no such repository, or it is private and wants"),
        ("caformer_s18", "caformer/caformer_s18.pth of sail/dl cannot be fetched: the repository"),
        ("hf-hub:nobody/nothing", "config.json of nobody/nothing cannot be fetched: there is no"),
        ("hf-hub:what?/is this", "hf-hub: wants USER/REPOSITORY after it, not 'what?/is this'"),
    ],
)
def test_a_repository_or_file_that_is_missing_is_named(
    fetcher: Fetcher, variant: str, says: str
) -> None:
    assert says in fetcher.refuse(variant)


def test_a_revision_that_is_missing_is_named(fetcher: Fetcher) -> None:
    assert "the repository has no revision 'v2'" in fetcher.refuse(revision="v2")


def test_a_gated_repository_says_what_is_to_be_done(fetcher: Fetcher) -> None:
    fetcher.hub.gated.add(TIMM)
    assert "its owner wants to be asked first" in fetcher.refuse()


@pytest.mark.parametrize("status", [401, 403, 500, 503])
def test_a_hub_that_refuses_or_fails_is_quoted(fetcher: Fetcher, status: int) -> None:
    fetcher.hub.status = status
    assert f"the hub answers with status {status}" in fetcher.refuse()


def test_a_hub_that_is_down_is_one_sentence(tmp_path: Path) -> None:
    with running_hub() as gone:
        pass  # its port is closed again
    sentence = Fetcher(gone, tmp_path).refuse()
    assert f"127.0.0.1:{gone.port} cannot be reached ([Errno 111] Connection refused)" in sentence
    assert "--checkpoint FILE" in sentence


def test_a_hub_that_never_answers_is_not_waited_for_without_end(fetcher: Fetcher) -> None:
    fetcher.hub.stalls = True
    hasty = replace(fetcher, variables={"HF_HUB_ETAG_TIMEOUT": "1"})
    assert "cannot be reached (timed out)" in hasty.refuse()


@pytest.mark.parametrize("fault", ["cut", "stall"])
def test_a_download_that_breaks_again_and_again_ends_in_a_sentence(
    fetcher: Fetcher, fault: Fault
) -> None:
    # Half of nothing: after the first attempt no byte comes any more, and the library gives up.
    fetcher.hub.repositories[TIMM] = {"model.safetensors": b"x"}
    fetcher.hub.faults = [fault] * 50
    hasty = replace(fetcher, variables={"HF_HUB_DOWNLOAD_TIMEOUT": "1"})
    assert "cannot be fetched: " in hasty.refuse()
    fetcher.hub.faults = []
    assert Path(fetcher.run()[0]).read_bytes() == b"x"


def test_a_reset_connection_ends_in_a_sentence_and_the_next_try_succeeds(fetcher: Fetcher) -> None:
    fetcher.hub.faults = ["reset"]
    assert "cannot be fetched: " in fetcher.refuse()
    assert Path(fetcher.run()[0]).read_bytes() == WEIGHTS


def test_a_full_disk_is_named(fetcher: Fetcher) -> None:
    # A limit on the size of files fails in the same write as a full disk.
    done = fetcher.start({"variant": "caformer_s18.sail_in1k"}, file_limit=100_000)
    assert done.returncode == 2, done.stderr
    assert "it cannot be stored: File too large" in done.stderr.splitlines()[-1]


def test_a_cache_that_cannot_be_written_is_named(fetcher: Fetcher) -> None:
    fetcher.home.write_text("a file where a folder should be")
    assert "it cannot be stored: Not a directory" in fetcher.refuse()


def test_progress_is_a_bar_on_a_terminal_and_a_line_elsewhere(fetcher: Fetcher) -> None:
    wanted = json.dumps({"variant": "caformer_s18.sail_in1k"})
    done = fetcher.start(json.loads(wanted))
    assert done.stderr == f"fetching model.safetensors of {TIMM}\n"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    terminal = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, wanted],
        env=os.environ | fetcher.hub.environment(fetcher.home.with_name("other home")),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # how a terminal says that nobody writes any more
        pass
    os.close(ours)
    assert terminal.wait(LIMIT_SECONDS) == 0, shown
    assert b"model.safetensors: 100%" in shown
    assert b"300k/300k" in shown


def test_a_users_fine_tune_brings_its_configuration_and_both_are_of_one_commit(
    fetcher: Fetcher,
) -> None:
    config = json.dumps({"architecture": "caformer_s18", "num_classes": 2}).encode()
    fetcher.hub.repositories["me/pets"] = {"config.json": config, "model.safetensors": WEIGHTS}
    assert fetcher.run("hf-hub:me/pets@v1")[1:] == ["model.safetensors", "me/pets", COMMIT]
    paths = {one.path for one in fetcher.hub.asked}
    assert "/me/pets/resolve/v1/config.json" in paths
    assert f"/me/pets/resolve/{COMMIT}/model.safetensors" in paths
    assert "the revision is given twice" in fetcher.refuse("hf-hub:me/pets@v1", revision="main")


def test_a_fine_tune_that_is_only_pickled_is_taken_and_said_to_be(fetcher: Fetcher) -> None:
    config = json.dumps({"architecture": "caformer_s18", "num_classes": 2}).encode()
    fetcher.hub.repositories["me/pets"] = {"config.json": config, "pytorch_model.bin": WEIGHTS}
    done = fetcher.start({"variant": "hf-hub:me/pets"})
    assert json.loads(done.stdout)[1] == "pytorch_model.bin"
    assert "it holds no model.safetensors, so pytorch_model.bin is taken" in done.stderr


def test_catalogue_weights_never_fall_back_to_another_file(fetcher: Fetcher) -> None:
    fetcher.hub.repositories[TIMM] = {"pytorch_model.bin": WEIGHTS}
    assert "the repository holds no such file" in fetcher.refuse()
    assert not fetcher.hub.downloads
