"""A server of a few lines on a real socket, whose replies a test decides."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
OVERLOADED = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 3\r\nContent-Length: 32\r\n\r\n"
    b'{"error": {"code":"overloaded"}}'
)


@dataclass
class Exchange:
    """One request, as the server saw it.

    Attributes:
        number: 0 for the first.
        head: its head.
        body: its body.
        writer: to answer with.
    """

    number: int
    head: bytes
    body: bytes
    writer: asyncio.StreamWriter


Answer = Callable[[Exchange], Awaitable[None]]


async def answer_ok(exchange: Exchange) -> None:
    exchange.writer.write(OK)


@dataclass
class TinyServer:
    """Where it listens, and what came."""

    url: str
    exchanges: list[Exchange] = field(default_factory=list)


@contextmanager
def tiny_server(answer: Answer = answer_ok) -> Iterator[TinyServer]:
    """Serve from a thread until the block ends."""
    loop = asyncio.new_event_loop()
    served = TinyServer("")
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await _converse(reader, writer, served, answer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the caller left, or the test is over
        finally:
            tasks.discard(task)
            writer.close()

    server = loop.run_until_complete(asyncio.start_server(connected, "127.0.0.1", 0, backlog=1000))
    served.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    thread = threading.Thread(target=loop.run_forever, name="tiny-server", daemon=True)
    thread.start()
    try:
        yield served
    finally:

        async def end() -> None:
            server.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


async def _converse(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, served: TinyServer, answer: Answer
) -> None:
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        exchange = Exchange(len(served.exchanges), head, await reader.readexactly(length), writer)
        served.exchanges.append(exchange)
        await answer(exchange)
        await writer.drain()
