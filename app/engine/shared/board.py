"""Board: how every engine of a service fares, in memory that all of its processes see.

One row an engine, written by the process that owns it and read by all:

    beat_at, depth, in flight, running, wait_seconds, stalled_seconds, flags   7 x float64
    length of the text                                                         uint32
    the last error's text, UTF-8                                               the rest

A reader may see a row half old and half new; every value stands for itself and is an estimate.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
import time

from app.engine.base import EngineStatus

_NUMBERS = struct.Struct("<7d")
_LENGTH = struct.Struct("<I")
_TEXT_AT = _NUMBERS.size + _LENGTH.size
ROW_BYTES = 512
_READY, _PENDING, _DRAINING = 1, 2, 4
STUCK_SECONDS = 1.0
"""A process publishes ten times a second; one that has not for so long answers nobody."""


class Board:
    """Rows of engine statuses in shared memory.

    The memory has no name: whoever inherits the descriptor sees it, and it is gone with the last
    process, however that ends.

    Args:
        descriptor: of `create`, inherited.
        rows: as many as were created.
    """

    def __init__(self, descriptor: int, rows: int) -> None:
        self.descriptor = descriptor
        self.rows = rows
        self._memory = mmap.mmap(descriptor, rows * ROW_BYTES)

    @classmethod
    def create(cls, rows: int) -> Board:
        """Make an empty board; its descriptor is not inherited unless that is asked for."""
        descriptor = shared_memory("metaserve-board", rows * ROW_BYTES)
        return cls(descriptor, rows)

    def publish(
        self, row: int, status: EngineStatus, *, ready: bool = True, draining: bool = False
    ) -> None:
        """Write how an engine fares, and whether its process answers and is about to end."""
        is_pending = bool(status.queue_depth or status.in_flight)
        text = (status.last_error or "").encode()[: ROW_BYTES - _TEXT_AT]
        start = row * ROW_BYTES
        _LENGTH.pack_into(self._memory, start + _NUMBERS.size, 0)
        self._memory[start + _TEXT_AT : start + _TEXT_AT + len(text)] = text
        _LENGTH.pack_into(self._memory, start + _NUMBERS.size, len(text))
        _NUMBERS.pack_into(
            self._memory,
            start,
            time.monotonic(),
            status.queue_depth,
            status.in_flight,
            status.running_batches,
            status.predicted_wait_seconds,
            status.stalled_seconds,
            _READY * ready + _PENDING * is_pending + _DRAINING * draining,
        )

    def withdraw(self, row: int) -> None:
        """Forget an engine that is gone."""
        self._memory[row * ROW_BYTES : (row + 1) * ROW_BYTES] = bytes(ROW_BYTES)

    def is_ready(self, row: int) -> bool:
        """Tell whether an engine answers."""
        return bool(int(self._numbers(row)[6]) & _READY)

    def is_draining(self, row: int) -> bool:
        """Tell whether an engine's process is about to end."""
        return bool(int(self._numbers(row)[6]) & _DRAINING)

    def answers(self, row: int) -> bool:
        """Tell whether an engine is ready, and not stuck since."""
        return self.is_ready(row) and self.age_seconds(row) < STUCK_SECONDS

    def age_seconds(self, row: int) -> float:
        """Return how long ago an engine published."""
        return time.monotonic() - self._numbers(row)[0]

    def read(self, row: int) -> EngineStatus:
        """Return how an engine fares; of one that stopped writing, how long it has been stalled."""
        beat_at, depth, in_flight, running, wait, stalled, flags = self._numbers(row)
        if int(flags) & _PENDING:
            stalled += time.monotonic() - beat_at
        start = row * ROW_BYTES
        (length,) = _LENGTH.unpack_from(self._memory, start + _NUMBERS.size)
        text = self._memory[start + _TEXT_AT : start + _TEXT_AT + length]
        last_error = text.decode("utf-8", "replace") or None
        return EngineStatus(int(depth), int(in_flight), int(running), wait, stalled, last_error)

    def close(self) -> None:
        """Unmap; the memory lives as long as another process has it."""
        self._memory.close()
        os.close(self.descriptor)

    def _numbers(self, row: int) -> tuple[float, ...]:
        return _NUMBERS.unpack_from(self._memory, row * ROW_BYTES)


def shared_memory(name: str, size: int) -> int:
    """Return a descriptor of zeroed memory that processes share by inheriting or sending it.

    Not a file under /dev/shm: containers give that 64 MB, and a killed process leaves it behind.

    Args:
        name: shown in /proc, for whoever looks.
        size: bytes.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(name)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor
