"""`python -m app.probe [PATH]`: exit code 0 when the service on this machine answers 200, else 1.

For health checks that run a command beside the service, as Docker's HEALTHCHECK does. It is run
again and again and imports next to nothing; so it reads two of the variables itself.
"""

from __future__ import annotations

import os
import socket
import sys

# As in app.settings, whose import would cost more than the rest of the probe; a test compares.
HOST, PORT = "127.0.0.1", "8000"
# An address to listen on that is none to call -> one that reaches it.
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
# Below the timeout of a health check (Docker's is 30 s unless it is set), so that this says why.
TIMEOUT_SECONDS = 4.0


def main(arguments: list[str]) -> int:
    """Ask one path, `/readyz` unless another is given; returns the exit code."""
    path = arguments[0] if arguments else "/readyz"
    host = os.environ.get("METASERVE_HOST") or HOST
    port = os.environ.get("METASERVE_PORT") or PORT
    try:
        answer = ask(LOOPBACK.get(host, host), int(port), path)
    except (OSError, ValueError, OverflowError) as error:
        print(f"metaserve: {path} on {host} port {port} cannot be asked: {error}", file=sys.stderr)
        return 1
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 200 "):
        return 0
    said = f"{head[9:12].decode('latin-1')} {body.decode('utf-8', 'replace')}".strip() or "nothing"
    print(f"metaserve: {path} on {host} port {port} answers {said}", file=sys.stderr)
    return 1


def ask(host: str, port: int, path: str) -> bytes:
    """Return all that the service answers to a GET request.

    Raises:
        OSError: nobody answers.
    """
    with socket.create_connection((host, port), TIMEOUT_SECONDS) as connection:
        request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        return b"".join(iter(lambda: connection.recv(65536), b""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
