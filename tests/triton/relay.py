"""Relay: a network between a service and Triton that can fail in every way a network can."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any

PATIENCE_SECONDS = 30.0


class Relay:
    """Passes bytes between its own port and another one, until it cuts them off or holds them."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._changing = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._swallowed: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._passes = threading.Event()
        self._passes.set()
        self._spawn(self._accept)

    @property
    def url(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """End every connection there is; new ones may come."""
        with self._changing:  # a caller is back before the last of these is closed
            cut, self._sockets = self._sockets, []
        for one in cut:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def swallow(self) -> None:
        """Drop what comes on the connections there are, and say nothing; new ones pass."""
        self._swallowed.update(self._sockets)

    def hold(self) -> None:
        """Keep whatever comes, as the kernel does for a server that is stopped."""
        self._passes.clear()

    def release(self) -> None:
        """Deliver what was held, and all that comes."""
        self._passes.set()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.release()
        self.cut()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target, timeout=PATIENCE_SECONDS)
                far.settimeout(None)
                with self._changing:
                    self._sockets += [near, far]
                self._spawn(lambda a=near, b=far: self._pass(a, b))
                self._spawn(lambda a=far, b=near: self._pass(a, b))

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                self._passes.wait()
                if source not in self._swallowed:
                    target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def _spawn(self, work: Any) -> None:
        thread = threading.Thread(target=work, name="relay", daemon=True)
        self._threads.append(thread)
        thread.start()
