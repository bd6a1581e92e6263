"""The files in which processes share their metrics, on blocks that are there.

prometheus_client maps files with holes; where the disk is full, a write into a hole ends the
process with SIGBUS. Here a file gets its blocks when it is made or grows, and a value for which
there is no room is kept in memory.
"""

from __future__ import annotations

import errno
import logging
import os

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

from app.errors import StartupError

log = logging.getLogger("metaserve")

FIRST_BYTES = 1 << 16  # as prometheus_client has it
_FULL = (errno.ENOSPC, errno.EDQUOT)


class ReservedDict(MmapedDict):
    """A `MmapedDict` whose file has no holes.

    Args:
        filename: of the file; one that is there is gone on with.
        read_mode: whether it is only read.

    Raises:
        StartupError: there is no room for the first blocks.
    """

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        self._unkept: dict[str, tuple[float, float]] = {}
        if not read_mode and not reserve(filename, FIRST_BYTES):
            folder = os.path.dirname(filename)
            raise StartupError(
                f"the disk of {folder} is full, and the processes share their metrics there; make "
                "room, or set TMPDIR to another directory"
            )
        super().__init__(filename, read_mode)  # type: ignore[no-untyped-call]

    def read_value(self, key: str) -> tuple[float, float]:
        """Return value and timestamp; a new key has zeros."""
        if self._has_place(key):
            value: tuple[float, float] = super().read_value(key)  # type: ignore[no-untyped-call]
            return value
        return self._unkept.setdefault(key, (0.0, 0.0))

    def write_value(self, key: str, value: float, timestamp: float) -> None:
        """Keep a value, in the file where it has a place there."""
        if self._has_place(key):
            super().write_value(key, value, timestamp)  # type: ignore[no-untyped-call]
        else:
            self._unkept[key] = value, timestamp

    def _has_place(self, key: str) -> bool:
        if key in self._positions:
            return True
        # Once full, always full: the file is not tried again for every request.
        most = self._used + len(key.encode()) + 32
        if self._unkept or (most > self._capacity and not reserve(self._fname, 2 * self._capacity)):
            if not self._unkept:
                folder = os.path.dirname(self._fname)
                log.warning("the disk of %s is full: new metrics are not shown", folder)
            return False
        return True


def reserve(filename: str, size: int) -> bool:
    """Give a file blocks up to a size; returns whether there was room."""
    if not hasattr(os, "posix_fallocate"):
        return True
    try:
        descriptor = os.open(filename, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, size)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in _FULL:
            return False
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
    return True


def keep_values_in_files(name: str) -> None:
    """Let the values of metrics that are made from now on be seen by all processes.

    Args:
        name: of this process; one that is started again has the same.
    """
    values.MmapedDict = ReservedDict  # type: ignore[attr-defined]
    values.ValueClass = values.MultiProcessValue(lambda: name)  # type: ignore[no-untyped-call]
