"""WorkerDesk: what a host keeps for one worker: its slots, its requests, what it is owed."""

from __future__ import annotations

import math
import os
import socket
import struct
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from app.engine.core import EngineCore
from app.engine.shared.slots import Slots
from app.engine.shared.wire import (
    CANCEL,
    DONE,
    GONE,
    MESSAGE,
    REFUSE,
    SUBMIT,
    WireError,
    pack_failed,
    pack_message,
)
from app.engine.window import Request
from app.errors import DRAINING, Draining, ServiceError
from app.types import Row

NO_PIXELS = np.empty(0, np.uint8)
_CREDENTIALS = struct.Struct("3i")


class WorkerDesk:
    """One worker as its host sees it.

    Its methods belong to the host's loop; answers alone come from engine threads. What waits can be
    withdrawn from the core, by one; what runs is answered by the core, once. So each slot goes back
    exactly once, and memory that a batch reads stays until the batch is over.

    Args:
        connection: non-blocking.
        core: answers the requests.
        ring: wakes the host's loop; called once for the answers of a batch.

    Attributes:
        slots: None until the worker has sent them, and once it is gone.
        unsent: bytes that the connection did not take yet.
        is_behind: whether the loop waits until it takes more.
        greeted_at: when the worker was.
    """

    def __init__(
        self, connection: socket.socket, core: EngineCore, ring: Callable[[], None]
    ) -> None:
        self.connection = connection
        self.name = _name_of(connection)
        self.slots: Slots | None = None
        self.unsent = bytearray()
        self.is_behind = False
        self.greeted_at = 0.0
        self._core = core
        self._ring = ring
        self._requests: dict[int, tuple[Request, int]] = {}
        self._busy: set[int] = set()
        self._answers: deque[bytes] = deque()
        self._rest = b""

    @property
    def has_answers(self) -> bool:
        """Whether engine threads have left answers."""
        return bool(self._answers)

    def take(self, data: bytes) -> None:
        """Act on messages; a last one that is not whole is kept for the next time.

        Raises:
            WireError: one of them cannot be.
        """
        data = self._rest + data
        end = len(data) - len(data) % MESSAGE.size
        self._rest = data[end:]
        now = time.monotonic()
        for kind, _, slot, zero, id, deadline, enqueued_at in MESSAGE.iter_unpack(
            memoryview(data)[:end]
        ):
            if zero:
                raise WireError("a message is not what it should be where it should be empty")
            if kind == SUBMIT:
                self._submit(id, slot, deadline, min(enqueued_at, now))
            elif kind == CANCEL:
                self._cancel(id)
            elif kind == REFUSE:
                self._refuse_waiting()
            else:
                raise WireError(f"there is no message number {kind} to a host")
        self._core.announce()

    def collect(self) -> bytearray:
        """Return everything that is to be sent; what was is to be taken out of it."""
        while self._answers:
            self.unsent += self._answers.popleft()
        return self.unsent

    def close(self) -> None:
        """Forget the worker, and what of its images waits; what runs is answered to nobody."""
        self.slots = None
        for id, (request, _) in list(self._requests.items()):
            if self._core.withdraw(request):
                del self._requests[id]
        self.connection.close()

    def _submit(self, id: int, slot: int, deadline: float, enqueued_at: float) -> None:
        slots = self.slots
        assert slots is not None, "a request before its slots: this is a bug"
        if slot >= slots.count:
            raise WireError(f"there is no slot {slot}, only {slots.count}")
        if slot in self._busy or id in self._requests:
            raise WireError(f"request {id} or its slot {slot} is not answered yet")
        if math.isnan(deadline) or math.isnan(enqueued_at):
            raise WireError(f"request {id} has no deadline")

        def reply(answer: Row | ServiceError) -> None:
            done, _ = self._requests.pop(id)
            done.pixels = NO_PIXELS  # the core may remember the request for longer than the slot
            slots = self.slots
            if slots is None:  # its worker is gone
                return
            if isinstance(answer, Row):
                slots.write_row(slot, answer.logits, answer.embedding)
                times = answer.queue_seconds, answer.inference_seconds
                self._hand_back(slot, pack_message(DONE, id, slot, *times))
            else:
                slots.write_text(slot, answer.message)
                self._hand_back(slot, pack_failed(id, slot, answer))

        request = Request(slots.pixels(slot), deadline, enqueued_at, reply, self._ring)
        self._busy.add(slot)
        self._requests[id] = request, slot
        try:
            self._core.submit(request, announce=False)
        except ServiceError as error:
            request.answer(error)

    def _cancel(self, id: int) -> None:
        request, slot = self._requests.get(id, (None, 0))
        # One that runs is left alone: its batch reads the slot, and answers it soon.
        if request is not None and self._core.withdraw(request):
            del self._requests[id]
            self._hand_back(slot, pack_message(GONE, id, slot))

    def _refuse_waiting(self) -> None:
        for request, _ in list(self._requests.values()):
            if self._core.withdraw(request):
                request.answer(Draining(DRAINING))

    def _hand_back(self, slot: int, message: bytes) -> None:
        self._busy.discard(slot)  # before the worker can know of it
        self._answers.append(message)


def _name_of(connection: socket.socket) -> str:
    """Return what to call a worker in the log."""
    if not hasattr(socket, "SO_PEERCRED"):
        return "an HTTP process"
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, _, _ = _CREDENTIALS.unpack(peer)
    return f"HTTP process {pid}" if pid != os.getpid() else "an HTTP side of this process"
