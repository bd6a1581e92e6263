r"""EngineHost: one EngineCore for several HTTP processes; messages in, messages out.

    worker A ==socket==\                    +--> engine threads --+
    worker B ==socket===> the host's loop --+                     +--> rows into slots,
    worker C ==socket==/      ^             submit                     answers into outboxes
                              +------------- one ring a batch ---------------+

The loop alone reads and writes the sockets; engine threads leave their answers in a worker's
outbox and ring. It never waits for a worker: what one does not read is kept up to a limit, then
that worker is dropped, as is one that says what cannot be.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
import time
from typing import Protocol

from app.backends.base import BackendInfo
from app.engine.base import GoldenCheck, Profile
from app.engine.core import EngineCore
from app.engine.shared.board import Board
from app.engine.shared.desk import WorkerDesk
from app.engine.shared.slots import Slots, slot_bytes
from app.engine.shared.wire import (
    HEAD,
    Attach,
    Greeting,
    WireError,
    pack_hello,
    pack_verdict,
    unpack_attach,
)

log = logging.getLogger("metaserve.engine")

# Thousands of messages a system call.
READ_BYTES = 64 * 1024
# Twice the answers to every slot that a worker can have.
MAX_UNSENT_BYTES = 256 * 1024
MAX_SLOT_NUMBER = 0xFFFF
# The board follows what happens no closer than this; under load that spares most of its cost.
PUBLISH_SECONDS = 0.002
# While work is pending, so that batches that begin, or hang, are seen.
PENDING_BEAT_SECONDS = 0.02
IDLE_BEAT_SECONDS = 0.25
# Out of descriptors or memory: the loop must not spin on a worker that cannot be let in.
REST_SECONDS = 0.1
# The last answers are in the sockets' buffers by then, or nobody reads them.
FAREWELL_SECONDS = 1.0


class Warm(Protocol):
    """A core that answers, and what is known of it; see `app.assemble.WarmCore`."""

    @property
    def core(self) -> EngineCore:
        """With its threads started."""
        ...

    @property
    def backend(self) -> BackendInfo:
        """What runs the network."""
        ...

    @property
    def golden(self) -> GoldenCheck | None:
        """How this machine's answers differ from torch in float32."""
        ...

    @property
    def profile(self) -> Profile:
        """What warm-up measured."""
        ...


class EngineHost:
    """Serves a core to the workers that connect.

    Args:
        warm: the core, closed with the host, and what is known of it.
        listener: a listening unix stream socket, inherited; workers may have connected already.
        board: where the engine's status is published.
        row: of this engine on the board.
        package: its key; workers that serve another one leave.
        close_timeout_seconds: how long `stop` lets admitted requests finish.
    """

    def __init__(
        self,
        warm: Warm,
        listener: socket.socket,
        board: Board,
        row: int,
        package: str,
        close_timeout_seconds: float = 30.0,
    ) -> None:
        self._core = warm.core
        self._greeting = Greeting(package, warm.backend, warm.profile, warm.golden)
        self._listener = listener
        self._board = board
        self._row = row
        self._close_timeout_seconds = close_timeout_seconds
        self._desks: dict[socket.socket, WorkerDesk] = {}
        self._selector = selectors.DefaultSelector()
        self._alarm, self._bell = socket.socketpair()
        self._alarm.setblocking(False)
        self._bell.setblocking(False)
        self._has_rung = False
        self._rests_until: float | None = None
        self._is_stopping = False
        self._is_over = False
        self._closer: threading.Thread | None = None
        self._published_at = 0.0
        self._has_changed = True
        self._is_pending = False

    def serve(self) -> None:
        """Serve until `stop`; returns once the admitted requests are answered."""
        self._listener.setblocking(False)
        self._listen()
        self._selector.register(self._alarm, selectors.EVENT_READ)
        try:
            while not self._is_over:
                self._turn()
            self._say_farewell()
        finally:
            for desk in list(self._desks.values()):
                self._drop(desk)
            self._board.withdraw(self._row)
            self._selector.close()
            self._alarm.close()
            self._bell.close()

    def stop(self) -> None:
        """Refuse new images, answer the admitted ones, let `serve` return; from any thread."""
        self._is_stopping = True
        self._ring()

    def _turn(self) -> None:
        for key, events in self._selector.select(self._patience()):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._alarm:
                self._alarm.recv(64)
                self._has_rung = False  # before the outboxes are emptied
            else:
                self._attend(key.data, events)
        for desk in list(self._desks.values()):
            if desk.has_answers:
                self._has_changed = True
                self._send(desk)
        if self._patience() == 0:
            self._publish()
        if self._rests_until is not None and time.monotonic() >= self._rests_until:
            self._listen()
        if self._is_stopping and self._closer is None:
            self._begin_close()

    def _patience(self) -> float:
        beat = IDLE_BEAT_SECONDS
        if self._has_changed:
            beat = PUBLISH_SECONDS
        elif self._is_pending:
            beat = PENDING_BEAT_SECONDS
        # A rest ends with a beat, be it a little late.
        return max(self._published_at + beat - time.monotonic(), 0.0)

    def _publish(self) -> None:
        status = self._core.status()
        self._board.publish(self._row, status, ready=not self._is_stopping)
        self._is_pending = bool(status.queue_depth or status.in_flight)
        self._has_changed = False
        self._published_at = time.monotonic()

    def _ring(self) -> None:
        """Wake the loop, from any thread."""
        if not self._has_rung:
            self._has_rung = True
            try:
                self._bell.send(b"\0")
            except OSError:  # the loop has ended: nobody is left to answer
                return

    def _listen(self) -> None:
        self._rests_until = None
        self._selector.register(self._listener, selectors.EVENT_READ)

    def _stop_listening(self) -> None:
        if self._rests_until is None:
            self._selector.unregister(self._listener)
        self._rests_until = None

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError, InterruptedError):
            return
        except OSError as error:
            log.error("an HTTP process cannot be let in: %s", str(error))
            self._stop_listening()
            self._rests_until = time.monotonic() + REST_SECONDS
            return
        connection.setblocking(False)
        desk = WorkerDesk(connection, self._core, self._ring)
        self._desks[connection] = desk
        self._selector.register(connection, selectors.EVENT_READ, desk)
        desk.greeted_at = time.monotonic()
        desk.unsent += pack_hello(self._greeting, desk.greeted_at)
        self._send(desk)

    def _attend(self, desk: WorkerDesk, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._send(desk)
            if events & selectors.EVENT_READ and desk.connection in self._desks:
                self._read(desk)
        except BlockingIOError:
            return
        except WireError as error:
            log.warning("%s is dropped: %s", desk.name, str(error))
            self._drop(desk)
        except OSError as error:
            log.info("%s is gone: %s", desk.name, str(error))
            self._drop(desk)
        except Exception:  # a fault of ours: it must not cost the other workers their engine
            log.exception("%s is dropped", desk.name)
            self._drop(desk)

    def _read(self, desk: WorkerDesk) -> None:
        if desk.slots is None:
            self._attach(desk)
            return
        data = desk.connection.recv(READ_BYTES)
        if not data:
            raise ConnectionResetError("it closed the connection")
        self._has_changed = True
        desk.take(data)

    def _attach(self, desk: WorkerDesk) -> None:
        head, descriptors, _, _ = socket.recv_fds(desk.connection, HEAD.size, 4)
        try:
            if not head:
                raise ConnectionResetError("it closed the connection")
            if len(head) != HEAD.size or len(descriptors) != 1:
                raise WireError("what connects does not offer its slots as a worker does")
            attach = unpack_attach(head)
            self._check(attach, desk.greeted_at, descriptors[0])
            desk.slots = Slots(descriptors[0], self._greeting.info, attach.slots)
            desk.unsent += pack_verdict()
            self._send(desk)
        except WireError as error:
            desk.unsent += pack_verdict(str(error))
            self._send(desk)
            raise
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _check(self, attach: Attach, greeted_at: float, descriptor: int) -> None:
        """Raise WireError where a worker's slots or clock are not what they must be."""
        size = slot_bytes(self._greeting.info)
        if attach.slot_bytes != size:
            raise WireError(
                f"the HTTP process has slots of {attach.slot_bytes} bytes, the model needs {size}; "
                "start both from the same installation"
            )
        if not 1 <= attach.slots <= MAX_SLOT_NUMBER:
            raise WireError(f"the HTTP process offers {attach.slots} slots")
        if os.fstat(descriptor).st_size < attach.slots * size:
            raise WireError(f"the memory of the HTTP process is too small for {attach.slots} slots")
        if not greeted_at <= attach.clock <= time.monotonic():
            raise WireError(
                "the clocks of the HTTP and the engine process differ; "
                "do not run them in different time namespaces"
            )

    def _send(self, desk: WorkerDesk) -> None:
        """Send what a worker is owed, as much as it takes now."""
        unsent = desk.collect()
        try:
            del unsent[: desk.connection.send(unsent)]
        except BlockingIOError:
            pass
        except OSError as error:
            log.info("%s is gone: %s", desk.name, str(error))
            self._drop(desk)
            return
        if len(unsent) > MAX_UNSENT_BYTES:
            log.warning("%s is dropped: it does not read its answers", desk.name)
            self._drop(desk)
            return
        if bool(unsent) != desk.is_behind:
            desk.is_behind = bool(unsent)
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if unsent else 0)
            self._selector.modify(desk.connection, wanted, desk)

    def _drop(self, desk: WorkerDesk) -> None:
        if self._desks.pop(desk.connection, None) is not None:
            self._selector.unregister(desk.connection)
            desk.close()
            self._has_changed = True

    def _begin_close(self) -> None:
        self._stop_listening()
        self._publish()
        self._closer = threading.Thread(target=self._close_core, name="engine-close", daemon=True)
        self._closer.start()

    def _close_core(self) -> None:
        try:
            self._core.close(self._close_timeout_seconds)
        finally:
            self._is_over = True
            self._ring()

    def _say_farewell(self) -> None:
        """Send the last answers to those who read them."""
        until = time.monotonic() + FAREWELL_SECONDS
        for desk in list(self._desks.values()):
            desk.connection.settimeout(max(until - time.monotonic(), 0.001))
            try:
                desk.connection.sendall(desk.collect())
            except OSError as error:
                log.info("%s is gone: %s", desk.name, str(error))
