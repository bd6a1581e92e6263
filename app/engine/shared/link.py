"""Link: one connection of an HTTP process to an engine process, with the slots that belong to it.

Every connection has slots of its own: a host that was thought dead and writes late writes where
nobody reads any more.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from app.engine.shared.slots import SlotPool, slot_bytes, slot_count
from app.engine.shared.wire import (
    CANCEL,
    DONE,
    FAILED,
    GONE,
    HEAD,
    MAX_TEXT_BYTES,
    MESSAGE,
    REFUSE,
    SUBMIT,
    VERDICT,
    Attach,
    Greeting,
    WireError,
    error_of,
    pack_attach,
    pack_message,
    unpack_greeting,
    unpack_hello_head,
)
from app.errors import ServiceError
from app.types import Pixels, Row

log = logging.getLogger("metaserve.engine")


@dataclass(slots=True, eq=False)
class Call:
    """One image on its way to a host and back.

    Attributes:
        id: never used twice by a process, so that no answer can be taken for another.
        pixels: uint8 (S, S, 3); kept until the answer is there, in case the host dies.
        deadline: absolute `time.monotonic()` seconds.
        enqueued_at: likewise.
        future: of whoever waits; done when nobody does any more.
        retried: a host died of it, or with it, already.
        slot: where it lies while a host has it.
    """

    id: int
    pixels: Pixels = field(repr=False)
    deadline: float
    enqueued_at: float
    future: asyncio.Future[Row]
    retried: bool = False
    slot: int = -1

    def settle(self, answer: Row | ServiceError) -> None:
        """Hand the answer to whoever waits, if anybody still does."""
        if self.future.done():
            return
        if isinstance(answer, ServiceError):
            self.future.set_exception(answer)
        else:
            self.future.set_result(answer)


class Link(asyncio.Protocol):
    """Calls go out, answers come in; messages of one turn of the loop are sent together.

    Args:
        greeting: of the host.
        pool: attached to the host.
        on_answers: called after answers have come in, and when the link is lost.

    Attributes:
        calls: those that the host has, by id.
        progress_at: when something last came back, or began to be waited for.
        lost: done once the connection is gone.
    """

    def __init__(self, greeting: Greeting, pool: SlotPool, on_answers: Callable[[], None]) -> None:
        self.greeting = greeting
        self.pool = pool
        self.calls: dict[int, Call] = {}
        self.progress_at = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[None] = self._loop.create_future()
        self._on_answers = on_answers
        self._transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = []
        self._rest = b""

    @property
    def is_open(self) -> bool:
        """Whether calls can be handed over."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for one of the calls."""
        return any(not call.future.done() for call in self.calls.values())

    def takes(self, pixels: Pixels) -> bool:
        """Tell whether pixels are of the size that the host's network takes."""
        side = self.greeting.info.input_size
        return pixels.shape == (side, side, 3) and pixels.dtype == np.uint8

    def hand_over(self, call: Call) -> bool:
        """Put a call's pixels into a slot and send it; False when no slot is free.

        Raises:
            ValueError: the host's network takes pixels of another shape or type.
        """
        if not self.takes(call.pixels):
            side = self.greeting.info.input_size
            found = f"{call.pixels.dtype} {call.pixels.shape}"
            raise ValueError(f"pixels are {found}, not uint8 {(side, side, 3)}")
        slot = self.pool.acquire()
        if slot is None:
            return False
        self.pool.pixels(slot)[...] = call.pixels
        call.slot = slot
        if not self.calls:
            self.progress_at = time.monotonic()
        self.calls[call.id] = call
        self._send(pack_message(SUBMIT, call.id, slot, call.deadline, call.enqueued_at))
        return True

    def cancel(self, call: Call) -> None:
        """Tell the host that nobody waits for a call; its slot comes back all the same."""
        if call.id in self.calls:
            self._send(pack_message(CANCEL, call.id))

    def refuse_waiting(self) -> None:
        """Let the host refuse what waits."""
        self._send(pack_message(REFUSE))

    def abort(self) -> None:
        """Disconnect at once."""
        if self._transport is not None:
            self._transport.abort()

    async def close(self, timeout_seconds: float) -> None:
        """Send what is unsent and disconnect; a host that reads nothing is not waited for."""
        if self._transport is None:
            return
        self._flush()
        self._transport.close()
        try:
            await asyncio.wait((self.lost,), timeout=timeout_seconds)
        finally:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop has classes of its own

    def data_received(self, data: bytes) -> None:
        """Settle the calls that are answered; what cannot be closes the link."""
        self.progress_at = time.monotonic()
        data = self._rest + data
        end = len(data) - len(data) % MESSAGE.size
        self._rest = data[end:]
        try:
            for kind, code, slot, _, id, first, second in MESSAGE.iter_unpack(
                memoryview(data)[:end]
            ):
                self._take(kind, code, slot, id, first, second)
        except WireError as error:
            log.error("the engine process is left: %s", str(error))
            self.abort()
        self._on_answers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits for it; the calls that are left are theirs to settle."""
        if not self.lost.done():
            self.lost.set_result(None)
        self._on_answers()

    def _take(self, kind: int, code: int, slot: int, id: int, first: float, second: float) -> None:
        call = self.calls.get(id)
        if call is None or call.slot != slot:
            raise WireError(f"it answers request {id} in slot {slot}, which it does not have")
        answer: Row | ServiceError | None = None
        if kind == DONE:
            answer = Row(*self.pool.read_row(slot), first, second)
        elif kind == FAILED:
            answer = error_of(code, self.pool.read_text(slot), first)
        elif kind != GONE:
            raise WireError(f"there is no message number {kind} from a host")
        del self.calls[id]
        self.pool.release(slot)
        if answer is not None:
            call.settle(answer)

    def _send(self, message: bytes) -> None:
        self._unsent.append(message)
        if len(self._unsent) == 1:
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        if self._unsent and self.is_open:
            assert self._transport is not None
            self._transport.write(b"".join(self._unsent))
        self._unsent.clear()


async def connect(
    path: str, package: str, queue_budget_seconds: float, on_answers: Callable[[], None]
) -> Link:
    """Connect to a host and attach slots to it; waits as long as the host loads.

    Args:
        path: of its socket.
        package: the key of what it must serve.
        queue_budget_seconds: which the number of slots follows.
        on_answers: see `Link`.

    Raises:
        OSError: nobody listens, or the host closed the connection.
        WireError: host and worker do not fit together; the message says why.
    """
    loop = asyncio.get_running_loop()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        # At once or not at all: asyncio's own connect takes a full backlog for a connection.
        connection.connect(path)
        length = unpack_hello_head(await _read(connection, HEAD.size))
        greeting = unpack_greeting(await _read(connection, length))
        if greeting.package != package:
            raise WireError("it serves another package than this process; restart the service")
        pool = SlotPool(
            greeting.info, slot_count(greeting.info, greeting.profile, queue_budget_seconds)
        )
        try:
            attach = Attach(time.monotonic(), pool.count, slot_bytes(greeting.info))
            socket.send_fds(connection, [pack_attach(attach)], [pool.descriptor])
        finally:
            pool.close_descriptor()
        (length,) = VERDICT.unpack(await _read(connection, VERDICT.size))
        if length:
            why_not = await _read(connection, min(length, MAX_TEXT_BYTES))
            raise WireError(why_not.decode("utf-8", "replace"))
        link = Link(greeting, pool, on_answers)
        await loop.create_unix_connection(lambda: link, sock=connection)
    except BaseException:
        connection.close()
        raise
    return link


async def _read(connection: socket.socket, count: int) -> bytes:
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < count:
        more = await loop.sock_recv(connection, count - len(data))
        if not more:
            raise ConnectionResetError("the engine process closed the connection")
        data += more
    return data
