"""The HTTP server's life: a port, a loop, and a SIGTERM that loses nothing.

SIGTERM -> unready at once, still serving -> drain delay over: stop accepting, finish what was
admitted -> exit 0. A second SIGTERM skips the delay. SIGINT, from a keyboard, has no delay.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from app.http.protocol import protocol_class
from app.http.proxied import ForwardedOnly
from app.http.state import ServiceState
from app.listener import serve_accepted, take_waiting

log = logging.getLogger("metaserve.server")

# What the server gives connections beyond the drain timeout, for the refusals to be written.
GRACE_SECONDS = 2.0


class Server(uvicorn.Server):
    """uvicorn, but SIGTERM starts a drain and the process ends with 0."""

    def __init__(self, app: ASGIApp, state: ServiceState) -> None:
        settings = state.settings
        config = uvicorn.Config(
            app,
            http=protocol_class(settings.receive_timeout_ms / 1000),
            ws="none",
            timeout_keep_alive=settings.keep_alive_s,  # type: ignore[arg-type]  # a float will do
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,  # `ForwardedOnly` does it
            timeout_graceful_shutdown=int(settings.drain_timeout_s + GRACE_SECONDS),
        )
        config.app = ForwardedOnly(app, config.forwarded_allow_ips)
        super().__init__(config)
        self.state = state
        self._signals: list[tuple[signal.Signals, bool]] = []
        self._stop_at: float | None = None

    def new_protocol(self) -> asyncio.Protocol:
        """Return what speaks on a new connection."""
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
            _loop=None,
        )
        return protocol

    def stop(self) -> None:
        """Stop without a drain, from any thread."""
        self.should_exit = True

    def stop_without_delay(self) -> None:
        """Begin to drain at the next tick."""
        self._stop_at = time.monotonic()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Turn readiness off and take note of the signal; `on_tick` does the rest."""
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
            # What is cut off now is reported as an error of the framework; it was asked for.
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        first = not self.state.draining
        self.state.draining = True
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
        self.state.draining = True
        engine = self.state.loaded.engine if self.state.loaded else None
        timer = None
        if engine is not None:
            loop = asyncio.get_running_loop()
            timer = loop.call_later(self.state.settings.drain_timeout_s, engine.refuse_waiting)
        await self._close_ports(sockets or [])
        await super().shutdown(sockets)
        if timer is not None:
            timer.cancel()
        log.info("stopped")

    async def _close_ports(self, listeners: Sequence[socket.socket]) -> None:
        """Cease to accept; those that the kernel has let in would be reset, and are served."""
        for listener in listeners:
            listener.setblocking(False)
        last = [one for listener in listeners for one in take_waiting(listener)]
        for server in self.servers:
            server.close()
        for connection in last:
            await serve_accepted(self.new_protocol, connection)

    def _take(self, sig: signal.Signals, first: bool) -> None:
        loading = self.state.loaded is None
        delay = self.state.settings.drain_delay_s
        if first and sig == signal.SIGTERM and not loading:
            self._stop_at = time.monotonic() + delay
            log.info("%s: unready, serving for %g s more, then stopping", sig.name, delay)
        else:
            self.stop_without_delay()
            log.info("%s: stopping", sig.name)
