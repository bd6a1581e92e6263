"""The listening socket: opened once, and how callers reach it."""

from __future__ import annotations

import errno
import socket

from app.errors import StartupError
from app.settings import Settings

BACKLOG = 2048


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


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def what_to_type(settings: Settings, url: str) -> str:
    """Return what a person who reads the log may try."""
    key = " -H 'Authorization: Bearer <key>'" if settings.api_keys_file is not None else ""
    return f"try  curl{key} --data-binary @IMAGE {url}/classify  or open {url}/docs"
