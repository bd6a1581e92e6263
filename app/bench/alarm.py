"""Wakes an event loop at a point in time, to some ten microseconds.

libuv counts whole milliseconds: uvloop wakes up to one late, or spins through the last one, and a
sparse millisecond is more than many a reply takes. Linux has timers that are file descriptors;
Python offers them from 3.13 on.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import time
from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_NONBLOCK_CLOEXEC = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
_ABSOLUTE = 1


class _TimerSpec(ctypes.Structure):
    """`struct itimerspec` where a long holds a second, as on every 64-bit Linux."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Alarm:
    """One alarm; setting it again replaces what was set.

    Args:
        loop: that is woken.
        ring: called at the time that was set, or a little later.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop = loop
        self._ring = ring
        self._fd = _timer_fd()
        self._spec = _TimerSpec()
        if self._fd is not None:
            loop.add_reader(self._fd, self._rang)

    def set(self, when: float) -> None:
        """Ring at a `time.monotonic()`."""
        if self._fd is None:
            delay = max(0.0, when - time.monotonic())
            self._loop.call_later(math.ceil(delay * 1000) / 1000, self._ring)
            return
        # Zero would switch the timer off; what has passed rings at once.
        fraction, whole = math.modf(max(when, 1e-6))
        self._spec.value_s, self._spec.value_ns = int(whole), int(fraction * 1e9)
        _libc.timerfd_settime(self._fd, _ABSOLUTE, ctypes.byref(self._spec), None)

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd is not None:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)

    def _rang(self) -> None:
        assert self._fd is not None
        with contextlib.suppress(BlockingIOError):  # it was set again meanwhile
            os.read(self._fd, 8)
            self._ring()


_libc = ctypes.CDLL(None)


def _timer_fd() -> int | None:
    """Return a timer's descriptor, None where there is none to be had."""
    try:
        fd: int = _libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC)
    except AttributeError:
        return None  # no Linux
    return fd if fd >= 0 else None
