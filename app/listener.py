"""The listening socket: opened once, emptied at the end, and how callers reach it."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Iterator

from app.errors import StartupError
from app.settings import Settings

log = logging.getLogger("metaserve.server")

BACKLOG = 2048
# Of callers that arrive without end, when the port closes.
MOST_AT_THE_END = 4096


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


def complain(error: OSError) -> None:
    """Say that a connection waits in vain."""
    is_full = error.errno in (errno.EMFILE, errno.ENFILE)
    remedy = "; allow more open files (ulimit -n)" if is_full else ""
    log.error("connections cannot be accepted: %s%s", error, remedy)


def take_waiting(
    listener: socket.socket, on_error: Callable[[OSError], None] = complain
) -> Iterator[socket.socket]:
    """Accept the connections that wait, before the port closes: they would be reset.

    Args:
        listener: non-blocking.
        on_error: told why the rest of them is left.
    """
    for _ in range(MOST_AT_THE_END):
        try:
            connection, _ = listener.accept()
        except (ConnectionAbortedError, InterruptedError):
            continue  # the caller left
        except BlockingIOError:
            return  # none is left
        except OSError as error:
            on_error(error)
            return
        connection.setblocking(False)
        yield connection


async def serve_accepted(
    new_protocol: Callable[[], asyncio.Protocol], connection: socket.socket
) -> None:
    """Let a protocol speak on an accepted connection."""
    try:
        await asyncio.get_running_loop().connect_accepted_socket(new_protocol, connection)
    except OSError:  # it was reset before anything was said
        connection.close()


def url_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def what_to_type(settings: Settings, url: str) -> str:
    """Return what a person who reads the log may try."""
    key = " -H 'Authorization: Bearer <key>'" if settings.api_keys_file is not None else ""
    return f"try  curl{key} --data-binary @IMAGE {url}/classify  or open {url}/docs"
