"""A private directory for the time that a service runs: its engine's socket, its metrics' files."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from app.errors import StartupError

# A unix socket's path holds 107 bytes on Linux, 103 on macOS.
LONGEST_PATH = 90
SHARED_MEMORY = "/dev/shm"
# Each process has three files of 64 KiB, and rarely more.
ROOM_BYTES = 8 << 20


@contextmanager
def runtime_folder(places: Sequence[str] | None = None) -> Iterator[str]:
    """Make the directory, readable by this user alone, and remove it at the end.

    One that a killed service left behind is never used again.

    Args:
        places: to try in turn; /dev/shm and the temporary directory when None.

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
    """Return memory before a disk, which others fill, unless somebody has chosen."""
    try:
        disk = tempfile.gettempdir()
    except FileNotFoundError:
        return (SHARED_MEMORY,)
    if "TMPDIR" in os.environ or not _has_room(SHARED_MEMORY):
        return disk, SHARED_MEMORY
    return SHARED_MEMORY, disk


def _has_room(place: str) -> bool:
    try:
        return shutil.disk_usage(place).free >= ROOM_BYTES
    except OSError:
        return False
