"""A private directory for the time that a service runs: its engine's socket, its metrics' files."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from app.errors import StartupError

log = logging.getLogger("metaserve.supervisor")

# A unix socket's path holds 107 bytes on Linux, 103 on macOS.
LONGEST_PATH = 90
SHARED_MEMORY = "/dev/shm"
# Each process has three files of 64 KiB, and rarely more.
ROOM_BYTES = 8 << 20
PREFIX = "metaserve."
LOCK = "lock"
UNLOCKED_SECONDS = 3600.0


@dataclass(frozen=True)
class RuntimeFolder:
    """The directory, and what keeps it.

    Attributes:
        path: of the directory.
        lock: a descriptor; nobody removes the directory while a process has it.
    """

    path: str
    lock: int


@contextmanager
def runtime_folder(places: Sequence[str] | None = None) -> Iterator[RuntimeFolder]:
    """Make the directory, readable by this user alone, and remove it at the end.

    Those that killed services left behind go as well.

    Args:
        places: to try in turn; /dev/shm and the temporary directory when None.

    Raises:
        StartupError: none of them can be written.
    """
    places = _usual_places() if places is None else places
    for place in places:
        _sweep(place)
    folder = _make(places)
    try:
        yield folder
    finally:
        _remove(folder.path)
        os.close(folder.lock)


def _remove(path: str) -> None:
    """Remove a directory, its lock last: what is left of it meanwhile can still be swept."""
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.name != LOCK:
                os.unlink(entry.path)
    shutil.rmtree(path, ignore_errors=True)


def _lock(folder: str) -> int:
    """Lock the directory before anybody can find its lock free."""
    unseen = os.path.join(folder, f"{LOCK}.new")
    lock = os.open(unseen, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(unseen, os.path.join(folder, LOCK))
    return lock


def _sweep(place: str) -> None:
    """Remove what services of this user left when they were killed."""
    with suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            if not entry.name.startswith(PREFIX) or not entry.is_dir(follow_symlinks=False):
                continue
            with suppress(OSError):
                if entry.stat(follow_symlinks=False).st_uid == os.geteuid() and _is_left(entry):
                    _remove(entry.path)
                    log.info("removed %s, which a killed service had left", entry.path)


def _is_left(entry: os.DirEntry[str]) -> bool:
    """Return whether a directory has a lock that no process holds, or has had none for long."""
    try:
        lock = os.open(os.path.join(entry.path, LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        # Its service was killed while it made or removed it, if not just now.
        age_seconds = time.time() - entry.stat(follow_symlinks=False).st_mtime
        return age_seconds > UNLOCKED_SECONDS
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True


def _make(places: Sequence[str]) -> RuntimeFolder:
    for place in places:
        if len(place) > LONGEST_PATH - len(f"/{PREFIX}12345678/engine"):
            continue
        try:
            path = tempfile.mkdtemp(prefix=PREFIX, dir=place)
        except OSError:
            continue
        try:
            return RuntimeFolder(path, _lock(path))
        except OSError:  # a full disk, or one without locks
            _remove(path)
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
