"""What a load generator is to do: where to, which bytes, when."""

from __future__ import annotations

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal, get_args
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from app.errors import StartupError

Route = Literal["classify", "embed"]
Arrivals = Literal["poisson", "uniform"]


@dataclass(frozen=True)
class Target:
    """Where requests go.

    Attributes:
        host: name or address.
        port: of the server.
        tls: whether it speaks https.
        path: of the route, with what the URL had in front of it.
    """

    host: str
    port: int
    tls: bool
    path: str

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return how to encrypt, None for plain HTTP."""
        return ssl.create_default_context() if self.tls else None


@dataclass(frozen=True)
class Plan:
    """A whole run.

    Attributes:
        target: where requests go.
        requests: heads and bodies as they stand on the wire; sent in turn.
        rates: requests per second, one phase each; none for a closed loop.
        connections: callers of a closed loop, each with one request at a time.
        seconds: of a phase, or of the closed loop.
        warmup_seconds: before that, at the first rate; not counted.
        timeout_seconds: when a reply is given up, from the intended start.
        arrivals: `poisson` as many independent callers make them, or `uniform`.
        seed: of the arrivals.
        max_connections: an open loop holds requests back rather than open more.
    """

    target: Target
    requests: tuple[bytes, ...]
    rates: tuple[float, ...] = ()
    connections: int = 0
    seconds: float = 10.0
    warmup_seconds: float = 1.0
    timeout_seconds: float = 30.0
    arrivals: Arrivals = "poisson"
    seed: int = 0
    max_connections: int = 1000

    @property
    def total_seconds(self) -> float:
        """From the first intended start to the last."""
        return self.warmup_seconds + self.seconds * max(1, len(self.rates))

    def windows(self) -> list[tuple[float, float]]:
        """Return the phases' begins and ends, in seconds from the start of the run."""
        begins = [self.warmup_seconds + n * self.seconds for n in range(max(1, len(self.rates)))]
        return [(begin, begin + self.seconds) for begin in begins]

    def intended_starts(self) -> list[float]:
        """Return when each request of an open loop is to start, ascending seconds."""
        random = np.random.default_rng(self.seed)
        spans = [(0.0, self.warmup_seconds), *self.windows()]
        rates = [self.rates[0], *self.rates]
        starts = [
            begin + _offsets(rate, end - begin, self.arrivals, random)
            for (begin, end), rate in zip(spans, rates, strict=True)
        ]
        all_starts: list[float] = np.concatenate(starts).tolist()
        return all_starts


def _offsets(
    rate: float, seconds: float, arrivals: Arrivals, random: np.random.Generator
) -> NDArray[np.float64]:
    """Return starts within a phase, seconds from its begin."""
    if arrivals == "uniform":
        # From a random fraction on, so that several generators do not send in step.
        return (random.random() + np.arange(int(rate * seconds), dtype=np.float64)) / rate
    return np.sort(random.random(random.poisson(rate * seconds)) * seconds)


def parse_url(url: str, route: str) -> Target:
    """Read a base URL; one that ends in a route is taken without it.

    Raises:
        StartupError: it is none that requests can be sent to.
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urlsplit("")
    if parts.scheme not in ("http", "https") or not host:
        raise StartupError(f"{url!r} is no URL of a service; give one like http://localhost:8000")
    tls = parts.scheme == "https"
    base = parts.path.rstrip("/")
    for known in get_args(Route):
        base = base.removesuffix(f"/{known}")
    return Target(host, port or (443 if tls else 80), tls, f"{base}/{route}")


def build_request(target: Target, body: bytes, headers: Mapping[str, str]) -> bytes:
    """Return a POST as it stands on the wire."""
    host = f"[{target.host}]" if ":" in target.host else target.host
    fields = {"Host": f"{host}:{target.port}", "Content-Type": "application/octet-stream"}
    fields |= {"Content-Length": str(len(body)), **headers}
    lines = [f"POST {target.path} HTTP/1.1", *(f"{name}: {text}" for name, text in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def read_bodies(paths: Sequence[Path]) -> list[bytes]:
    """Read image files; a small drawing where there is none.

    Raises:
        StartupError: one cannot be read.
    """
    if not paths:
        return [_small_image()]
    bodies = []
    for path in paths:
        try:
            bodies.append(path.read_bytes())
        except OSError as error:
            raise StartupError(f"--image {path} cannot be read: {error.strerror}") from error
    return bodies


def _small_image() -> bytes:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (32, 32), "white")
    ImageDraw.Draw(image).line([(8, 6), (22, 6), (14, 26)], fill="black", width=3)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
