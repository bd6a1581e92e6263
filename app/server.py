"""The HTTP server's life: a port, a loop, and a SIGTERM that loses nothing.

SIGTERM -> unready at once, still serving -> drain delay over: stop accepting, finish what was
admitted -> exit 0. A second SIGTERM skips the delay. SIGINT, from a keyboard, has no delay.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from app.errors import StartupError
from app.http.protocol import protocol_class
from app.http.state import ServiceState

log = logging.getLogger("metaserve.server")

BACKLOG = 2048
# Longer than balancers keep idle connections (60 s is usual), so that they close first and none of
# them sends a request into a connection that is being closed.
KEEP_ALIVE_SECONDS = 75
# What the server gives connections beyond the drain timeout, for the refusals to be written.
GRACE_SECONDS = 2.0


def bind(host: str, port: int) -> socket.socket:
    """Open the listening socket.

    Raises:
        StartupError: the port is taken or forbidden, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        if isinstance(error.__context__, socket.gaierror) or isinstance(error, socket.gaierror):
            raise StartupError(f"METASERVE_HOST={host!r} is no address of this machine") from error
        reasons = {
            errno.EADDRINUSE: f"port {port} is in use; stop the other program or choose another "
            f"port, for example METASERVE_PORT={port + 1 if port < 65535 else 8000}",
            errno.EACCES: f"port {port} needs privileges; choose one above 1023",
            errno.EADDRNOTAVAIL: f"METASERVE_HOST={host!r} is no address of this machine",
        }
        fallback = f"cannot listen on {host}:{port}: {error.strerror}"
        raise StartupError(reasons.get(error.errno or 0, fallback)) from error


class Server(uvicorn.Server):
    """uvicorn, but SIGTERM starts a drain and the process ends with 0."""

    def __init__(self, app: ASGIApp, state: ServiceState) -> None:
        settings = state.settings
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol_class(settings.receive_timeout_ms / 1000),
                ws="none",
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                access_log=False,
                log_config=None,
                server_header=False,
                timeout_graceful_shutdown=int(settings.drain_timeout_s + GRACE_SECONDS),
            )
        )
        self._state = state
        self._signals: list[tuple[signal.Signals, bool]] = []
        self._stop_at: float | None = None

    def stop(self) -> None:
        """Stop without a drain, from any thread."""
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Turn readiness off and take note of the signal; `on_tick` does the rest."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        first = not self._state.draining
        self._state.draining = True
        self._signals.append((signal.Signals(sig), first))

    async def on_tick(self, counter: int) -> bool:
        """Move the drain on; called ten times a second."""
        while self._signals:
            self._take(*self._signals.pop(0))
        if self._stop_at is not None and time.monotonic() >= self._stop_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, finish what was admitted, refuse what does not finish in time."""
        self._state.draining = True
        engine = self._state.loaded.engine if self._state.loaded else None
        timer = None
        if engine is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self._state.settings.drain_timeout_s, engine.refuse_waiting)
        await super().shutdown(sockets)
        if timer is not None:
            timer.cancel()
        log.info("stopped")

    def _take(self, sig: signal.Signals, first: bool) -> None:
        loading = self._state.loaded is None
        delay = self._state.settings.drain_delay_s
        if first and sig == signal.SIGTERM and not loading:
            self._stop_at = time.monotonic() + delay
            log.info("%s: unready, serving for %g s more, then stopping", sig.name, delay)
        else:
            self._stop_at = time.monotonic()
            log.info("%s: stopping", sig.name)
