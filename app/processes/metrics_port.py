"""A port for `/metrics` alone, which orchestrators scrape and callers do not reach."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import prometheus_client
from prometheus_client import CollectorRegistry

from app.errors import StartupError
from app.settings import Settings

log = logging.getLogger("metaserve")


@contextmanager
def serve_metrics_apart(settings: Settings, registry: CollectorRegistry) -> Iterator[None]:
    """Serve a registry from a thread, if the settings name a port for it.

    Raises:
        StartupError: the port cannot be opened.
    """
    port = settings.metrics_port
    if port is None:
        yield
        return
    if port == settings.port != 0:
        raise StartupError(f"METASERVE_METRICS_PORT and METASERVE_PORT are both {port}; change one")
    try:
        server, thread = prometheus_client.start_http_server(port, settings.host, registry)
    except OSError as error:
        raise StartupError(
            f"METASERVE_METRICS_PORT={port} cannot be opened: {error.strerror}"
        ) from error
    log.info("metrics on port %d", server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
