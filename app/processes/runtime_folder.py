"""A private directory for the time that a service runs: its engine's socket, its metrics' files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from app.errors import StartupError

# A unix socket's path holds 107 bytes on Linux, 103 on macOS.
LONGEST_PATH = 90
SHARED_MEMORY = "/dev/shm"


@contextmanager
def runtime_folder(places: Sequence[str] | None = None) -> Iterator[str]:
    """Make the directory, readable by this user alone, and remove it at the end.

    One that a killed service left behind is never used again.

    Args:
        places: to try in turn; the temporary directory, then /dev/shm, when None.

    Raises:
        StartupError: none of them can be written.
    """
    folder = _make(_usual_places() if places is None else places)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _make(places: Sequence[str]) -> str:
    for place in places:
        if len(place) > LONGEST_PATH - len("/metaserve.12345678/engine"):
            continue
        try:
            return tempfile.mkdtemp(prefix="metaserve.", dir=place)
        except OSError:
            continue
    raise StartupError(
        "several processes need a directory that can be written; mount one at /tmp, or set TMPDIR "
        "to a short path"
    )


def _usual_places() -> Sequence[str]:
    try:
        return tempfile.gettempdir(), SHARED_MEMORY
    except FileNotFoundError:
        return (SHARED_MEMORY,)
