"""Roster: which processes a service has, in memory that all of them see.

supervisor's pid, then for each row of the board: pid (0: none now), restarts, connections

uint64 each.
"""

from __future__ import annotations

import mmap
import os
import struct

from app.engine.shared.board import shared_memory

_WORD = struct.Struct("<Q")
_WORDS = 3
_PID, _RESTARTS, _CONNECTIONS = range(1, 1 + _WORDS)


class Roster:
    """Process ids, restarts and connections; everybody reads.

    Args:
        descriptor: of `create`, inherited.
        workers: HTTP processes, which have the first rows.
        rows: processes without the supervisor.
    """

    def __init__(self, descriptor: int, workers: int, rows: int) -> None:
        self.descriptor = descriptor
        self.workers = workers
        self._rows = rows
        self._memory = mmap.mmap(descriptor, _size(rows))

    @classmethod
    def create(cls, workers: int, rows: int) -> Roster:
        """Make a roster of this process, the supervisor, alone."""
        roster = cls(shared_memory("metaserve-roster", _size(rows)), workers, rows)
        roster._write(0, os.getpid())
        return roster

    def enter(self, row: int, pid: int) -> None:
        """Note that a process has started."""
        self._write(_PID + _WORDS * row, pid)

    def leave(self, row: int) -> None:
        """Note that it has ended."""
        self._write(_PID + _WORDS * row, 0)
        self.count_connections(row, 0)

    def count_restart(self, row: int) -> None:
        """Note that it is to be started again."""
        word = _RESTARTS + _WORDS * row
        self._write(word, self._read(word) + 1)

    def count_connections(self, row: int, count: int) -> None:
        """Note how many connections a process has open."""
        self._write(_CONNECTIONS + _WORDS * row, count)

    def connections(self, row: int) -> int:
        """Return how many connections a process has open."""
        return self._read(_CONNECTIONS + _WORDS * row)

    @property
    def supervisor(self) -> int:
        """The supervisor's process id."""
        return self._read(0)

    def pids(self) -> dict[str, list[int]]:
        """Return role -> process ids of those that live."""
        found: dict[str, list[int]] = {"supervisor": [self.supervisor]}
        for row in range(self._rows):
            pids = found.setdefault(self._role(row), [])
            if pid := self._read(_PID + _WORDS * row):
                pids.append(pid)
        return found

    def restarts(self) -> dict[str, int]:
        """Return role -> how often such a process was started again."""
        found: dict[str, int] = {}
        for row in range(self._rows):
            role = self._role(row)
            found[role] = found.get(role, 0) + self._read(_RESTARTS + _WORDS * row)
        return found

    def close(self) -> None:
        """Unmap; the memory lives as long as another process has it."""
        self._memory.close()
        os.close(self.descriptor)

    def _role(self, row: int) -> str:
        return "worker" if row < self.workers else "engine"

    def _read(self, word: int) -> int:
        value: int = _WORD.unpack_from(self._memory, word * _WORD.size)[0]
        return value

    def _write(self, word: int, value: int) -> None:
        _WORD.pack_into(self._memory, word * _WORD.size, value)


def _size(rows: int) -> int:
    return _WORD.size * (1 + _WORDS * rows)
