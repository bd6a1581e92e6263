"""Clients that never try again, and count what becomes of every request."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from examples.digits.data import held_out

PNG, DIGIT = held_out()[0]
TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class Kind:
    """How a client asks.

    Attributes:
        period: seconds from one of its requests to the next; one that is late is sent as soon as
            may be. 0 is a closed loop.
        keeps: whether it keeps its connection until an answer says `Connection: close`; else it
            opens one for each request.
    """

    period: float
    keeps: bool = True


class Clients:
    """A thread for each client.

    Args:
        port: whom they ask, on this machine.
        kinds: one client each.
    """

    def __init__(self, port: int, kinds: Sequence[Kind]) -> None:
        self.answered = 0
        self.failures: Counter[str] = Counter()
        self.connections = 0
        self.longest_late_seconds = 0.0
        self._port = port
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._began_at = time.monotonic()
        self._threads = [
            # Their first requests are spread over a period.
            threading.Thread(
                target=self._run, args=(kind, index / len(kinds) * kind.period), daemon=True
            )
            for index, kind in enumerate(kinds)
        ]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(2 * TIMEOUT_SECONDS)
            assert not thread.is_alive(), "a client hangs"

    def _run(self, kind: Kind, start: float) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT_SECONDS)
        due_at = self._began_at + start
        while not self._stopping.wait(max(due_at - time.monotonic(), 0.0)):
            late_seconds = time.monotonic() - due_at
            opens = connection.sock is None
            failure = ask(connection)
            if not kind.keeps:
                connection.close()
            self._note(late_seconds, opens, failure)
            due_at = due_at + kind.period if kind.period else time.monotonic()
        connection.close()

    def _note(self, late_seconds: float, opens: bool, failure: str | None) -> None:
        with self._lock:
            self.connections += opens
            self.longest_late_seconds = max(self.longest_late_seconds, late_seconds)
            if failure is None:
                self.answered += 1
            else:
                self.failures[failure] += 1


def ask(connection: http.client.HTTPConnection) -> str | None:
    """Send one request, once; returns what is wrong with its answer.

    After an answer that says `Connection: close` the next request opens a new connection.
    """
    try:
        connection.request("POST", "/classify?top_k=1", PNG)
        reply = connection.getresponse()
        body = reply.read()  # raises when it is shorter than announced
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        return f"{type(error).__name__}: {error}"
    if reply.status != 200:
        return f"{reply.status}: {body[:200]!r}"
    try:
        index = json.loads(body)["predictions"][0]["index"]
    except (ValueError, KeyError, IndexError):
        return f"no answer of ours: {body[:200]!r}"
    return None if index == DIGIT else f"the digit is {DIGIT} and not {index}"


def measure_capacity(port: int, connections: int = 8, seconds: float = 2.0) -> tuple[float, int]:
    """Return how many requests a second a closed loop has answered, and how many it had in all."""
    with Clients(port, [Kind(0.0)] * connections) as clients:
        began_at = time.monotonic()
        threading.Event().wait(seconds)
        rate = clients.answered / (time.monotonic() - began_at)
    assert not clients.failures, clients.failures
    return rate, clients.answered
