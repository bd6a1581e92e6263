"""What a signal does to a command that has not begun to hear it, or no longer does.

A command that writes files ends as its own code would, so that nothing half written is left; one
that serves ends at once. Process 1 of a container hears no signal that it has no handler for; every
other process would be ended by it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)


def be_ended_as_process_1() -> None:
    """Let SIGTERM end this process as it would end any other, until somebody else hears it."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))


@contextmanager
def ending_with_0() -> Iterator[None]:
    """Let SIGTERM end a service with 0 while it starts: there is nothing to finish yet.

    At its end SIGTERM changes nothing any more. In between the service hears it itself.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    after = signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    try:
        yield
        after = signal.SIG_IGN  # it ends with 0 from here on, however often it is told
    finally:
        signal.signal(signal.SIGTERM, after)


@contextmanager
def ending_by_exception() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into SystemExit, with the code that shells give them.

    A signal that was ignored stays so. Libraries catch what they should not: an error that comes
    after a signal is taken for its work.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    told: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        told.append(number)
        raise SystemExit(128 + number)

    before = {
        number: signal.signal(number, stop)
        for number in ENDING
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
        if told:  # a library took the exception for its own and went on
            raise SystemExit(128 + told[0])
    except Exception:
        if told:
            raise SystemExit(128 + told[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
