"""ProfileShelf: the processes of a service measure one at a time, and hand on what was found.

    nothing there --> load side by side --> one alone: measure, put --> serve
          |                                      the others wait
     it is there --> load ----------------> take it over ------------> serve

They share a machine: two that time their batches at once time each other, and one that is started
again while others serve would time their load.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from app.engine.base import Profile

log = logging.getLogger("metaserve.engine")

# A warm-up takes seconds. One that hangs must not keep every other process from serving.
PATIENCE_SECONDS = 60.0
POLL_SECONDS = 0.02

_PROFILE = TypeAdapter(Profile)


class ProfileShelf:
    """A profile in a folder that processes share.

    Args:
        folder: private to the service and its life.
        patience_seconds: longest wait for others to load or measure.
    """

    def __init__(self, folder: str | Path, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self._folder = Path(folder)
        self._patience_seconds = patience_seconds

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Load in here, side by side with others, while nobody measures."""
        with self._hold(is_alone=False):
            yield

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Measure in here, while nobody else loads or measures."""
        with self._hold(is_alone=True):
            yield

    def take(self, key: str) -> Profile | None:
        """Return what was put under a key; None where there is nothing of use."""
        try:
            return _PROFILE.validate_json(self._path(key).read_bytes())
        except (FileNotFoundError, ValidationError):
            return None

    def put(self, key: str, profile: Profile) -> None:
        """Keep a profile for processes to come."""
        new = self._path(key).with_suffix(f".{os.getpid()}")
        try:
            new.write_bytes(_PROFILE.dump_json(profile))
            new.replace(self._path(key))  # nobody reads half of it
        except OSError as error:  # the next one measures for itself
            log.warning("what was measured cannot be handed on: %s", error)

    @contextmanager
    def _hold(self, *, is_alone: bool) -> Iterator[None]:
        """Hold the lock; the kernel takes it from a process that is killed."""
        with open(self._folder / "warm-up", "wb") as file:
            until = time.monotonic() + self._patience_seconds
            while not _lock(file.fileno(), is_alone):
                if time.monotonic() >= until:
                    log.warning("others warm up for %g s: going on", self._patience_seconds)
                    break
                time.sleep(POLL_SECONDS)
            yield

    def _path(self, key: str) -> Path:
        return self._folder / f"profile-{key}.json"


def _lock(descriptor: int, is_alone: bool) -> bool:
    import fcntl  # not on Windows, where a service is one process

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if is_alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
