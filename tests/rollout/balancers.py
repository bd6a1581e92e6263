"""Two balancers that learn late of an instance that goes.

Connections   as kube-proxy: a new connection goes to any instance of the set and stays there
Requests      as an ingress: a real HAProxy, which keeps connections to the instances, sends each
              request to any instance of the set, and never sends one twice
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, cast

import uvloop

from tests.required import missing
from tests.servers import WAIT_SECONDS, wait_until


class Balancer(Protocol):
    """What clients call, and whom it sends them to.

    Attributes:
        port: where it listens, on this machine.
    """

    port: int

    def enter(self, port: int) -> None:
        """Take an instance into the set."""

    def leave(self, port: int) -> None:
        """Take an instance out of the set; connections that there are stay."""


class Connections:
    """A balancer of connections, in the thread that `balance_connections` runs."""

    def __init__(self) -> None:
        self.port = 0
        self._set: tuple[int, ...] = ()
        self._turn = 0

    def enter(self, port: int) -> None:
        self._set = (*self._set, port)

    def leave(self, port: int) -> None:
        self._set = tuple(one for one in self._set if one != port)

    def next_instance(self) -> int:
        """Return the instance whose turn it is."""
        self._turn += 1
        return self._set[self._turn % len(self._set)]


class _Side(asyncio.Protocol):
    """One of two connections; what comes on it goes out on the other, its end too."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.other: asyncio.Transport | None = None
        self._early = b""  # what came before there was another

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self._early += data
        elif not self.other.is_closing():
            self.other.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.other is not None and exc is None:
            self.other.close()
        elif self.other is not None:
            self.other.abort()

    def join(self, other: _Side) -> None:
        """Begin to pass on."""
        self.other = other.transport
        self.other.write(self._early)


class _Client(_Side):
    """A client's connection."""

    def __init__(self, balancer: Connections) -> None:
        super().__init__()
        self._balancer = balancer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, instance = await loop.create_connection(
                _Side, "127.0.0.1", self._balancer.next_instance()
            )
        except OSError:
            self.transport.abort()  # as the instance would refuse it
            return
        instance.join(self)
        self.join(instance)
        if self.transport.is_closing():  # the client has gone meanwhile
            instance.transport.abort()


@contextmanager
def balance_connections() -> Iterator[Balancer]:
    """Run a balancer of connections in a thread."""
    balancer = Connections()
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    balancer.port = listener.getsockname()[1]
    loop = uvloop.new_event_loop()
    stopped = asyncio.Event()

    async def serve() -> None:
        server = await loop.create_server(lambda: _Client(balancer), sock=listener)
        await stopped.wait()
        server.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    try:
        yield balancer
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive(), "the balancer hangs"
        loop.close()


CONFIGURATION = """
global
    stats socket {control} level admin
    nbthread 1
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
    retries 0
    http-reuse always
frontend clients
    bind fd@{listener}
    default_backend instances
backend instances
    balance roundrobin
    server-template instance 1-{slots} 127.0.0.1:1 disabled
"""


class Requests:
    """A balancer of requests: HAProxy, told through its socket.

    Args:
        port: where it listens.
        control: its socket.
    """

    def __init__(self, port: int, control: Path) -> None:
        self.port = port
        self._control = control
        self._slots: dict[int, int] = {}  # of each port; one may come again
        self._used = 0

    def enter(self, port: int) -> None:
        self._used += 1
        self._slots[port] = self._used
        server = f"instances/instance{self._used}"
        self.tell(f"set server {server} addr 127.0.0.1 port {port}")
        self.tell(f"set server {server} state ready")

    def leave(self, port: int) -> None:
        self.tell(f"set server instances/instance{self._slots[port]} state maint")

    def count(self, column: str) -> int:
        """Return a column of the backend's statistics."""
        text = self.tell("show stat").removeprefix("# ")
        (row,) = (
            one
            for one in csv.DictReader(text.splitlines())
            if (one["pxname"], one["svname"]) == ("instances", "BACKEND")
        )
        return int(row[column])

    def tell(self, command: str) -> str:
        """Give HAProxy a command; returns what it says."""
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(WAIT_SECONDS)
            control.connect(str(self._control))
            control.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: control.recv(65536), b"")).decode()


@contextmanager
def balance_requests(folder: Path, slots: int = 32) -> Iterator[Requests]:
    """Run HAProxy.

    Args:
        folder: for its files.
        slots: instances that it may ever have.
    """
    program = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        missing("there is no haproxy here, the balancer of requests")
    control, configuration = folder / "control", folder / "haproxy.cfg"
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        text = CONFIGURATION.format(control=control, listener=listener.fileno(), slots=slots)
        configuration.write_text(text)
        process = subprocess.Popen(
            [program, "-db", "-f", str(configuration)],
            pass_fds=[listener.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until(lambda: control.exists() or process.poll() is not None, "HAProxy starts")
            assert process.poll() is None, process.communicate()[1]
            yield Requests(listener.getsockname()[1], control)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=WAIT_SECONDS)
            process.kill()
            process.wait()
