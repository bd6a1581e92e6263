"""A small server in the shape of the Hugging Face hub, on loopback, with faults to order."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal

COMMIT = "c0ffee" + "0" * 34
Fault = Literal["cut", "reset", "stall"]


@dataclass(frozen=True)
class Asked:
    """One request that came."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Hub:
    """What is stored and what is to go wrong.

    Attributes:
        repositories: repository -> file -> content; changed by tests as they like.
        announced: sha256 -> the one to announce in its place.
        gated: repositories that want a token.
        status: answered to everything when set.
        faults: of the next downloads, one each, in the middle of the body.
        stalls: whether even the first question gets no answer.
        together: where set, questions wait for each other, so many at a time.
        asked: every request so far.
    """

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    announced: dict[str, str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    status: int | None = None
    faults: list[Fault] = field(default_factory=list)
    stalls: bool = False
    together: threading.Barrier | None = None
    asked: list[Asked] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is to be."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def downloads(self) -> list[Asked]:
        """The requests that fetched bytes from where large files are."""
        return [one for one in self.asked if one.method == "GET" and "/blob/" in one.path]

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables that send the library here and nowhere else."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "*",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        hub = self.server.hub
        hub.asked.append(Asked(self.command, self.path, dict(self.headers)))
        if hub.stalls:
            hub.released.wait(60)
            self.close_connection = True
            return
        if hub.together is not None and self.command == "HEAD":
            hub.together.wait(60)
        if hub.status is not None:
            self._send(hub.status, {})
            return
        if self.path.startswith("/blob/"):
            self._blob(self.path.removeprefix("/blob/"))
            return
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if found is None:
            self._send(404, {})
            return
        self._resolve(*found.groups())

    def _resolve(self, repository: str, revision: str, file: str) -> None:
        hub = self.server.hub
        files = hub.repositories.get(repository)
        if repository in hub.gated:
            self._send(401, {"X-Error-Code": "GatedRepo"})
        elif files is None:
            self._send(401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in ("main", "v1", COMMIT):
            self._send(404, {"X-Error-Code": "RevisionNotFound"})
        elif file not in files:
            self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif file.endswith(".json"):  # small files are answered here, under git's hash
            etag = hashlib.sha1(files[file]).hexdigest()
            self._send(200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, files[file])
        else:
            sha256 = hashlib.sha256(files[file]).hexdigest()
            headers = {
                "ETag": '"of-the-pointer"',
                "X-Linked-Etag": f'"{hub.announced.get(sha256, sha256)}"',
                "X-Linked-Size": str(len(files[file])),
                "X-Repo-Commit": COMMIT,
                # Another host's name, as the storage is: the library treats it as one.
                "Location": f"http://localhost:{hub.port}/blob/{sha256}",
            }
            self._send(302, headers)

    def _blob(self, sha256: str) -> None:
        hub = self.server.hub
        contents = [content for files in hub.repositories.values() for content in files.values()]
        (content,) = {one for one in contents if hashlib.sha256(one).hexdigest() == sha256}
        first = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        rest = content[first:]
        status = 206 if "Range" in self.headers else 200
        headers = {"Content-Disposition": 'inline; filename="model.safetensors";'}
        if status == 206:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        fault = hub.faults.pop(0) if hub.faults else None
        self._send(status, headers, rest, fault)

    def _send(
        self, status: int, headers: dict[str, str], body: bytes = b"", fault: Fault | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None:
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.close_connection = True
        if fault == "stall":
            self.server.hub.released.wait(60)
        elif fault == "reset":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that left, which is what some tests are about


@contextmanager
def running_hub(repositories: Mapping[str, dict[str, bytes]] | None = None) -> Iterator[Hub]:
    """Serve repositories from a thread."""
    hub = Hub(dict(repositories or {}))
    server = _Server(hub)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="hub", daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.released.set()
        server.shutdown()
        server.server_close()
        thread.join(20)
    assert not thread.is_alive(), "the hub did not stop within 20 s"
