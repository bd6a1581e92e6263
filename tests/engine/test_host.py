"""EngineHost against workers that are not what they should be; the others never suffer."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from app.engine.base import Profile
from app.engine.shared import wire
from app.engine.shared.board import shared_memory
from app.engine.shared.host import REST_SECONDS
from app.engine.shared.link import connect
from app.engine.shared.slots import SlotPool, slot_bytes
from app.engine.shared.wire import CANCEL, DONE, FAILED, GONE, REFUSE, SUBMIT, Attach, pack_message
from tests.engine.doubles import (
    FAR_AHEAD,
    PATIENCE_SECONDS,
    WatchedBackend,
    assert_row_of,
    pixels_of,
    run,
    running,
)
from tests.engine.processes import (
    PACKAGE,
    Place,
    connected,
    eventually,
    hosted,
    meeting_place,
    slot_maps,
)

INFO = WatchedBackend().info
SLOTS = 3
PAST = -1.0


@pytest.fixture
def place() -> Iterator[Place]:
    with meeting_place() as place:
        yield place


@dataclass
class RawWorker:
    """A worker that says what a test wants it to say."""

    connection: socket.socket
    pool: SlotPool

    def say(self, *messages: bytes) -> None:
        self.connection.sendall(b"".join(messages))

    def submit(self, id: int, slot: int, *, deadline: float = FAR_AHEAD) -> bytes:
        self.pool.pixels(slot)[...] = id
        return pack_message(SUBMIT, id, slot, deadline, time.monotonic())

    def hear(self) -> tuple[int, int, int]:
        """Return kind, id and slot of the next message."""
        data = read(self.connection, wire.MESSAGE.size)
        kind, _, slot, _, id, _, _ = wire.MESSAGE.unpack(data)
        return kind, id, slot

    def is_dropped(self) -> bool:
        try:
            return self.connection.recv(1) == b""
        except ConnectionResetError:
            return True


def read(connection: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = connection.recv(count - len(data))
        assert more, "the host closed the connection"
        data += more
    return data


def greeted(place: Place) -> socket.socket:
    """Connect, and read Hello."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(PATIENCE_SECONDS)
    connection.connect(place.path)
    length = wire.unpack_hello_head(read(connection, wire.HEAD.size))
    wire.unpack_greeting(read(connection, length))
    return connection


def verdict(connection: socket.socket) -> str:
    (length,) = wire.VERDICT.unpack(read(connection, wire.VERDICT.size))
    return read(connection, length).decode()


@contextmanager
def raw_worker(place: Place) -> Iterator[RawWorker]:
    with greeted(place) as connection:
        pool = SlotPool(INFO, SLOTS)
        attach = Attach(time.monotonic(), SLOTS, slot_bytes(INFO))
        socket.send_fds(connection, [wire.pack_attach(attach)], [pool.descriptor])
        pool.close_descriptor()
        assert verdict(connection) == ""
        yield RawWorker(connection, pool)


@contextmanager
def at_work(place: Place, backend: WatchedBackend) -> Iterator[None]:
    with running(backend, clock=time.monotonic) as core, hosted(place, core, backend):
        yield


async def a_neighbour_is_served(place: Place) -> None:
    async with connected(place) as engine:
        row = await engine.infer(pixels_of(77), deadline=time.monotonic() + PATIENCE_SECONDS)
        assert_row_of(77, row)


def test_many_messages_in_one_piece_and_one_in_many_pieces_are_all_answered(place: Place) -> None:
    with at_work(place, WatchedBackend()), raw_worker(place) as worker:
        worker.say(*(worker.submit(id, id - 1) for id in (1, 2, 3)))
        assert sorted(worker.hear() for _ in range(3)) == [(DONE, id, id - 1) for id in (1, 2, 3)]
        for byte in worker.submit(4, 2):
            worker.say(bytes([byte]))
        assert worker.hear() == (DONE, 4, 2)


def test_cancel_gives_back_the_slot_of_one_that_waits_and_leaves_one_that_runs(
    place: Place,
) -> None:
    backend = WatchedBackend(shut=True)
    with at_work(place, backend), raw_worker(place) as worker:
        worker.say(worker.submit(1, 0))
        backend.wait_for_batch()
        worker.say(worker.submit(2, 1), pack_message(CANCEL, 2), pack_message(CANCEL, 1))
        assert worker.hear() == (GONE, 2, 1)
        worker.say(worker.submit(3, 1), pack_message(CANCEL, 99), pack_message(REFUSE))
        assert worker.hear() == (FAILED, 3, 1)
        backend.gate.set()
        assert worker.hear() == (DONE, 1, 0)
    assert backend.batches == [[1]]


def swap(at: int, value: bytes) -> Callable[[RawWorker], bytes]:
    def spoilt(worker: RawWorker) -> bytes:
        message = bytearray(worker.submit(2, 1))
        message[at : at + len(value)] = value
        return bytes(message)

    return spoilt


@pytest.mark.parametrize(
    ("spoilt", "words"),
    [
        (swap(0, b"\0"), "no message number 0"),
        (swap(0, bytes([DONE])), "no message number 4"),
        (swap(2, b"\3\0"), "no slot 3, only 3"),
        (swap(4, b"\1\0\0\0"), "where it should be empty"),
        (swap(16, b"\xff" * 8), "has no deadline"),
        (swap(24, b"\xff" * 8), "has no deadline"),
        (lambda worker: worker.submit(1, 1), "request 1 or its slot 1 is not answered"),
        (lambda worker: worker.submit(2, 0), "request 2 or its slot 0 is not answered"),
        (lambda worker: b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "where it should be empty"),
    ],
)
def test_a_malformed_message_closes_that_connection_and_no_other(
    place: Place,
    caplog: pytest.LogCaptureFixture,
    spoilt: Callable[[RawWorker], bytes],
    words: str,
) -> None:
    backend = WatchedBackend(shut=True)
    with caplog.at_level(logging.WARNING), at_work(place, backend):
        with raw_worker(place) as other, raw_worker(place) as worker:
            worker.say(worker.submit(1, 0))
            backend.wait_for_batch()
            other.say(other.submit(50, 0))
            worker.say(spoilt(worker))
            assert worker.is_dropped()
            backend.gate.set()
            assert other.hear() == (DONE, 50, 0)
        run(a_neighbour_is_served(place))
    assert words in caplog.text
    eventually(lambda: held_slot_maps() <= 2, "only what the tests hold is mapped")


def held_slot_maps() -> int:
    """Count slot memories that are held by more than garbage, as the frames of faults are."""
    gc.collect()
    return slot_maps()


def test_a_worker_that_does_not_fit_is_told_why(place: Place) -> None:
    size, now = slot_bytes(INFO), time.monotonic
    offers: dict[str, tuple[bytes, int, int]] = {
        "does not offer its slots": (bytes(wire.HEAD.size), SLOTS, 0),
        "does not speak like": (bytes(wire.HEAD.size), SLOTS, 1),
        "version 9": (wire.HEAD.pack(wire.ATTACH, 9, 0.0, SLOTS, size), SLOTS, 1),
        "slots of 64 bytes": (wire.pack_attach(Attach(now(), SLOTS, 64)), SLOTS, 1),
        "offers 0 slots": (wire.pack_attach(Attach(now(), 0, size)), SLOTS, 1),
        "offers 70000 slots": (wire.pack_attach(Attach(now(), 70_000, size)), SLOTS, 1),
        "too small for 3 slots": (wire.pack_attach(Attach(now(), SLOTS, size)), SLOTS - 1, 1),
        "time namespaces": (wire.pack_attach(Attach(now() - 3600, SLOTS, size)), SLOTS, 1),
        "do not run them": (wire.pack_attach(Attach(now() + 3600, SLOTS, size)), SLOTS, 1),
    }
    with at_work(place, WatchedBackend()):
        for words, (head, slots, descriptors) in offers.items():
            with greeted(place) as connection:
                memory = shared_memory("metaserve-test", slots * size)
                socket.send_fds(connection, [head], [memory] * descriptors)
                os.close(memory)
                assert words in verdict(connection)
                assert connection.recv(1) == b"", "the connection is closed"
        run(a_neighbour_is_served(place))


def test_a_worker_that_leaves_at_any_point_costs_nothing(place: Place) -> None:
    backend = WatchedBackend(shut=True)
    with at_work(place, backend):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(place.path)
        greeted(place).close()
        with raw_worker(place) as worker:
            worker.say(worker.submit(1, 0)[:20])
        with raw_worker(place) as worker:
            worker.say(worker.submit(1, 0))
            backend.wait_for_batch()
        backend.gate.set()
        run(a_neighbour_is_served(place))


def test_a_worker_that_does_not_read_is_dropped_and_holds_up_nobody(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    def talk_without_listening(worker: RawWorker) -> None:
        late = b"".join(worker.submit(1, 0, deadline=PAST) for _ in range(1000))
        for _ in range(1000):  # the kernel's buffers and the host's own take some of the answers
            worker.say(late)

    caplog.set_level(logging.WARNING)
    with at_work(place, WatchedBackend()), raw_worker(place) as worker:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            talk_without_listening(worker)
        run(a_neighbour_is_served(place))
    assert "does not read its answers" in caplog.text


class Exhausted(socket.socket):
    """A listener of a process that has no descriptors left, the first times."""

    fails = 3
    fails_at: list[float]

    def accept(self) -> tuple[socket.socket, Any]:
        if len(self.fails_at) < self.fails:
            self.fails_at.append(time.monotonic())
            raise OSError(errno.EMFILE, "too many open files")
        return super().accept()


def test_a_host_without_descriptors_rests_and_lets_a_worker_in_later(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    listener = Exhausted(fileno=place.listener.detach())
    listener.fails_at = []
    place.listener = listener

    with caplog.at_level(logging.ERROR), at_work(place, WatchedBackend()):
        run(a_neighbour_is_served(place))

    first, second, third = listener.fails_at
    assert second - first >= REST_SECONDS
    assert third - second >= REST_SECONDS
    assert caplog.text.count("an HTTP process cannot be let in") == 3


def test_a_host_that_rests_can_be_stopped(place: Place) -> None:
    listener = Exhausted(fileno=place.listener.detach())
    listener.fails, listener.fails_at = sys.maxsize, []
    place.listener = listener

    with at_work(place, WatchedBackend()), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place.path)
        eventually(lambda: bool(listener.fails_at), "the host rests")


def test_a_worker_refuses_a_host_of_another_version_in_words(place: Place) -> None:
    async def scenario() -> None:
        place.listener.setblocking(False)
        link = asyncio.ensure_future(connect(place.path, PACKAGE, 1.0, lambda: None))
        connection, _ = await asyncio.get_running_loop().sock_accept(place.listener)
        with connection:
            connection.send(wire.HEAD.pack(wire.HELLO, 2, time.monotonic(), 0, 0))
            with pytest.raises(wire.WireError, match="engine process speaks version 2"):
                await link

    run(scenario())


def test_a_worker_leaves_a_host_of_another_package(place: Place) -> None:
    async def scenario() -> None:
        with pytest.raises(wire.WireError, match="another package than this process; restart"):
            await connect(place.path, "an older one", 1.0, lambda: None)

    with at_work(place, WatchedBackend()):
        run(scenario())


@pytest.mark.parametrize(
    "message", [pack_message(DONE, 5, 0), pack_message(9), pack_message(SUBMIT, 1, 0)]
)
def test_a_worker_leaves_a_host_that_answers_what_was_not_asked(
    place: Place, message: bytes
) -> None:
    greeting = wire.Greeting(PACKAGE, INFO, Profile({}, 1), None)

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        place.listener.setblocking(False)
        answers: list[None] = []
        task = asyncio.ensure_future(
            connect(place.path, PACKAGE, 1.0, lambda: answers.append(None))
        )
        connection, _ = await loop.sock_accept(place.listener)
        with connection:
            connection.send(wire.pack_hello(greeting, time.monotonic()))
            await loop.sock_recv(connection, wire.HEAD.size)
            connection.send(wire.pack_verdict())
            link = await task
            connection.send(message)
            await link.lost
            assert not link.is_open
            assert answers, "its owner hears of it"

    run(scenario())
