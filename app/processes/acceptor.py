"""Acceptor: takes connections from a port that several processes accept from, a few at a time.

An event loop's own server accepts all that wait in one go, so that one process would get every
connection of a caller that opens them together. Accepting one in each turn of the loop does not
help: whoever is awake takes the next before another has woken up. So a process that has clearly
more connections than another holds back for a moment, and takes some of what is still there
afterwards.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from app.listener import complain, serve_accepted, take_waiting

# Out of descriptors or memory: the loop must not spin on a connection that cannot be taken.
REST_SECONDS = 0.1
QUIET_SECONDS = 10.0
# An idle process needs a tenth of it to wake up, one on a busy machine several times that: the
# further ahead, the longer.
HOLD_BACK_SECONDS = 0.001
MOST_HOLD_BACKS = 5
# Being ahead by so little is chance where callers come and go; of many connections, by a part.
FREE_LEAD = 2
FREE_PART = 16
# What still waits after a hold-back is taken in portions that double while nobody else comes: a
# process is never held to less than 3200 connections a second.
FIRST_PORTION = 2
MOST_AT_ONCE = 16


class Acceptor:
    """Accepts for one process while it may.

    Args:
        listener: shared with other processes, non-blocking.
        new_protocol: makes what speaks on a connection.
        may_accept: whether this process should take connections now.
        lead: how many connections more than another process this one has, beyond what is chance.
        counted: told of each connection before it is served.
    """

    def __init__(
        self,
        listener: socket.socket,
        new_protocol: Callable[[], asyncio.Protocol],
        may_accept: Callable[[], bool],
        lead: Callable[[], int],
        counted: Callable[[], None],
    ) -> None:
        self._listener = listener
        self._new_protocol = new_protocol
        self._may_accept = may_accept
        self._lead = lead
        self._counted = counted
        self._loop = asyncio.get_running_loop()
        self._is_open = False
        self._rests_until = 0.0
        self._has_held_back = False
        self._quiet_until = 0.0
        self._portion = FIRST_PORTION
        self._tasks: set[asyncio.Task[object]] = set()

    @property
    def arriving(self) -> int:
        """How many connections have been accepted and are not served yet."""
        return len(self._tasks)

    def update(self) -> None:
        """Begin or cease to accept, as is right now; called again and again."""
        wanted = self._may_accept() and self._loop.time() >= self._rests_until
        if wanted and not self._is_open:
            self._loop.add_reader(self._listener, self._accept_some)
        elif self._is_open and not wanted:
            self._loop.remove_reader(self._listener)
        self._is_open = wanted

    async def close(self) -> None:
        """Take what the kernel has let in, and close the port.

        What is left in its queue is reset when the last process closes it.
        """
        may_accept, self._may_accept = self._may_accept(), lambda: False
        self.update()
        if may_accept:
            for connection in take_waiting(self._listener, self._complain):
                self._begin(connection)
        self._listener.close()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _accept_some(self) -> None:
        """Take up to what makes this process clearly ahead; then hold back once, and take some."""
        if not self._may_accept():
            self.update()
            return
        lead = self._lead()
        if lead > 0 and not self._has_held_back:
            self._has_held_back = True
            self._rest(HOLD_BACK_SECONDS * min(lead, MOST_HOLD_BACKS))
            return
        self._has_held_back = False
        if lead > 0:
            self._accept(self._portion)
            self._portion = min(2 * self._portion, MOST_AT_ONCE)
        else:
            self._portion = FIRST_PORTION
            self._accept(min(1 - lead, MOST_AT_ONCE))

    def _accept(self, most: int) -> None:
        for _ in range(most):
            try:
                connection, _ = self._listener.accept()
            except (ConnectionAbortedError, InterruptedError):
                continue  # the caller left
            except BlockingIOError:
                return  # there is none, or another process was faster
            except OSError as error:
                self._complain(error)
                self._rest(REST_SECONDS)
                return
            connection.setblocking(False)
            self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        task = self._loop.create_task(serve_accepted(self._new_protocol, connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._counted()

    def _complain(self, error: OSError) -> None:
        """Say that a connection waits in vain; again only after a while."""
        if self._loop.time() < self._quiet_until:
            return
        self._quiet_until = self._loop.time() + QUIET_SECONDS
        complain(error)

    def _rest(self, seconds: float) -> None:
        self._rests_until = self._loop.time() + seconds
        self.update()
        self._loop.call_later(seconds, self.update)


def lead_beyond_chance(connections: int, least: int) -> int:
    """Return how many connections more than another process one has, less what is chance.

    Args:
        connections: its own.
        least: of any other.
    """
    return connections - least - max(FREE_LEAD, connections // FREE_PART)
