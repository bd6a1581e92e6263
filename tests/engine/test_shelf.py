"""ProfileShelf: one process measures at a time, a killed one gives way, all take what it put."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from app.engine.base import Profile
from app.engine.shelf import ProfileShelf
from tests.engine.doubles import PATIENCE_SECONDS

PROFILE = Profile(
    {1: 0.1, 2: 0.15},
    2,
    lanes=3,
    threads=3,
    lane_batch_seconds={1: 0.2},
    lane_batch_size=1,
    wide_up_to=2,
    pads_from={2: 2},
)
# Said by who gives up waiting: a warm-up that hangs does not keep the others from serving.
GOING_ON = "others warm up"
HOLDER = """
import sys
from app.engine.shelf import ProfileShelf
with getattr(ProfileShelf(sys.argv[1]), sys.argv[2])():
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another_process(folder: Path, how: str) -> Iterator[subprocess.Popen[str]]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def entering(hold: Callable[[], AbstractContextManager[None]]) -> threading.Event:
    """Enter on a thread; returns what is set as soon as that has worked."""
    entered = threading.Event()

    def enter() -> None:
        with hold():
            entered.set()

    threading.Thread(target=enter, daemon=True).start()
    return entered


@pytest.mark.parametrize(
    ("theirs", "ours"), [("turn", "turn"), ("loading", "turn"), ("turn", "loading")]
)
def test_who_measures_is_alone_until_it_ends_or_is_killed(
    tmp_path: Path, theirs: str, ours: str, caplog: pytest.LogCaptureFixture
) -> None:
    with held_by_another_process(tmp_path, theirs) as holder:
        with getattr(ProfileShelf(tmp_path, 0.0), ours)():
            assert GOING_ON in caplog.text
        caplog.clear()
        entered = entering(getattr(ProfileShelf(tmp_path), ours))
        holder.kill()
        assert entered.wait(PATIENCE_SECONDS)
    assert GOING_ON not in caplog.text


def test_processes_load_side_by_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with held_by_another_process(tmp_path, "loading"), ProfileShelf(tmp_path, 0.0).loading():
        assert GOING_ON not in caplog.text


def test_what_was_put_is_taken_under_the_same_key_and_no_other(tmp_path: Path) -> None:
    ProfileShelf(tmp_path).put("one", PROFILE)
    assert ProfileShelf(tmp_path).take("one") == PROFILE
    assert ProfileShelf(tmp_path).take("two") is None
    assert [path.name for path in tmp_path.iterdir()] == ["profile-one.json"]


@pytest.mark.parametrize("content", ["", "{}", '{"batch_seconds": {"1": 0.1', "null"])
def test_what_is_not_a_profile_is_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "profile-one.json").write_text(content)
    assert ProfileShelf(tmp_path).take("one") is None


def test_a_profile_that_cannot_be_kept_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ProfileShelf(tmp_path / "gone").put("one", PROFILE)
    assert "cannot be handed on" in caplog.text
