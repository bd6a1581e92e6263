"""What these tests send and how they look at what comes back."""

from __future__ import annotations

import base64
import re
import socket
from collections.abc import Iterable
from io import BytesIO
from typing import Any

import httpx
import numpy as np
from PIL import Image

REFUSED = {"overloaded", "not_ready", "draining", "backend_unavailable"}


def grey(level: int, side: int = 40) -> bytes:
    """Return a PNG of one grey; the fake backend says class `round(level / 255 * 9)` to it."""
    return encode(Image.new("RGB", (side, side), (level, level, level)))


def picture(seed: int = 0, width: int = 61, height: int = 47) -> Image.Image:
    """Return an image of random blobs."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def text(data: bytes) -> str:
    """Return base64."""
    return base64.b64encode(data).decode()


def parts(*images: bytes, name: str = "image") -> list[tuple[str, tuple[str, bytes, str]]]:
    """Return httpx's `files` for images in parts of one name."""
    return [(name, (f"{index}.png", data, "image/png")) for index, data in enumerate(images)]


def without_timing(content: bytes) -> bytes:
    """Return a JSON reply's bytes without the one field that may differ."""
    stripped, count = re.subn(rb',"timing_ms":\{[^}]*\}', b"", content)
    assert count, f"no timings in {content!r}"
    return stripped


def check_error(reply: httpx.Response, status: int, code: str) -> str:
    """Check that a reply is this error in the one shape; return its message."""
    assert (reply.status_code, reply.headers["content-type"]) == (status, "application/json"), (
        f"{reply.status_code} {reply.headers} {reply.text}"
    )
    content = reply.json()
    assert set(content) == {"error", "request_id"}
    assert set(content["error"]) == {"code", "message"}
    assert content["error"]["code"] == code, content
    assert content["request_id"] == reply.headers["x-request-id"]
    if code in REFUSED:
        assert int(reply.headers["retry-after"]) >= 1
    else:
        assert "retry-after" not in reply.headers
    message = content["error"]["message"]
    assert isinstance(message, str)
    assert message
    assert "\n" not in message
    return message


def http(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    """Return a request as it stands on the wire; its length is announced."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Wire:
    """Reads replies from a raw socket, one after the other.

    Attributes:
        sock: the socket.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._rest = b""

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.sock.sendall(piece)

    def read_head(self) -> tuple[int, dict[str, str]]:
        """Read a status line and headers; 100 Continue is one too."""
        while b"\r\n\r\n" not in self._rest:
            assert self._receive(), f"the connection ended after {self._rest!r}"
        head, _, self._rest = self._rest.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = (line.split(": ", 1) for line in lines)
        return int(first.split()[1]), {name.lower(): value for name, value in pairs}

    def read_reply(self) -> httpx.Response:
        """Read a reply with its body."""
        status, headers = self.read_head()
        length = int(headers["content-length"])
        while len(self._rest) < length:
            assert self._receive(), f"the connection ended after {self._rest!r}"
        body, self._rest = self._rest[:length], self._rest[length:]
        return httpx.Response(status, headers=headers, content=body)

    def read_end(self) -> bytes:
        """Read until the other side closes, however it does."""
        while self._receive():
            pass
        return self._rest

    def _receive(self) -> bool:
        try:
            data = self.sock.recv(65536)
        except ConnectionResetError:
            return False
        self._rest += data
        return bool(data)


def best_classes(results: Iterable[dict[str, Any]]) -> list[int | str]:
    """Return each result's best class, or its error's code."""
    return [
        result["error"]["code"] if "error" in result else result["predictions"][0]["index"]
        for result in results
    ]
