"""Real servers on real sockets: one in a thread of this process, one as a process of its own."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx

from app.assemble import start_core
from app.backends.base import Backend
from app.backends.fake import FakeBackend
from app.engine.base import Profile
from app.engine.timing import ServiceTimes
from app.http.app import create_app
from app.http.state import LoadedModel, ServiceState
from app.listener import bind, url_of
from app.main import build_state, load_model, wire_model
from app.server import Server
from app.settings import Settings
from app.types import Batch, Rows
from models.package import PRETRAINED, open_package

EMBEDDED = PRETRAINED / "caformer_digits"
METASERVE = (str(Path(sysconfig.get_path("scripts")) / "metaserve"),)
WAIT_SECONDS = 20.0
"""How long any one thing may take before a test fails with a message."""


class WatchedBackend:
    """Another backend behind a gate, with a record of what reached it.

    Args:
        inner: what answers; a `FakeBackend` of the embedded package's shapes when None.
        gate_open: whether batches pass at once; else they wait for `gate.set()`.
    """

    def __init__(self, inner: Backend | None = None, *, gate_open: bool = True) -> None:
        self._inner = inner or fake_backend()
        self.info = self._inner.info
        self.gate = threading.Event()
        self.closed = False
        self._batches: list[Batch] = []
        self._changed = threading.Condition()
        if gate_open:
            self.gate.set()

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        with self._changed:
            self._batches.append(batch)
            self._changed.notify_all()
        if not self.gate.wait(timeout=60):
            raise TimeoutError("the watched backend's gate stayed shut for 60 s")
        return self._inner.run(batch, deadline)

    def close(self) -> None:
        self.closed = True
        self._inner.close()

    @property
    def batches(self) -> list[Batch]:
        """Every batch that came so far, those behind the gate too."""
        with self._changed:
            return list(self._batches)

    @property
    def images(self) -> int:
        """How many images came so far."""
        return sum(len(batch) for batch in self.batches)

    def wait_for_batches(self, count: int) -> None:
        """Return once so many batches have come, running or done."""
        with self._changed:
            came = self._changed.wait_for(lambda: len(self._batches) >= count, WAIT_SECONDS)
        assert came, f"{len(self._batches)} batches came within {WAIT_SECONDS:g} s, not {count}"


def fake_backend(package: Path = EMBEDDED) -> FakeBackend:
    """Return a FakeBackend of a package's shapes, so that its labels fit."""
    manifest = open_package(package).manifest
    return FakeBackend(manifest.input.size, manifest.classes, manifest.embedding_dim)


@dataclass(frozen=True)
class RunningService:
    """A service that answers.

    Attributes:
        url: its base, without a slash at the end.
        state: what its routes share.
        server: the uvicorn server.
        client: an HTTP client of it; closed with the service.
    """

    url: str
    state: ServiceState
    server: Server
    client: httpx.Client

    @property
    def address(self) -> tuple[str, int]:
        """Where a raw socket connects to."""
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port

    def connect(self) -> socket.socket:
        """Open a raw socket to the service."""
        return socket.create_connection(self.address, timeout=WAIT_SECONDS)

    def metric(self, name: str, **labels: str) -> float:
        """Return a metric's value, 0 where it was never touched."""
        return self.state.metrics.registry.get_sample_value(name, labels) or 0.0

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Ask again and again, over HTTP so that the service's loop turns, until it is so."""
        wait_until(condition, what, between=lambda: self.client.get("/livez"))


@contextmanager
def running_service(
    backend: Backend | Literal["onnxruntime"] | None = None,
    *,
    package: Path = EMBEDDED,
    loaded: bool = True,
    batch_seconds: Mapping[int, float] | None = None,
    api_keys: frozenset[str] | None = None,
    **settings: Any,
) -> Iterator[RunningService]:
    """Serve from a thread; check afterwards that no thread is left.

    Args:
        backend: what answers; a FakeBackend when None, the real ONNX Runtime by its name. The
            gate of a WatchedBackend is opened at the end, so that nothing stays behind it.
        package: the model package.
        loaded: whether the model is loaded; else the service stays not ready.
        batch_seconds: durations the engine believes in; with a fake backend it knows none.
        api_keys: keys that are let in.
        settings: fields of `Settings` that differ from these tests' defaults.
    """
    threads_before = set(threading.enumerate())
    quick: dict[str, Any] = {"drain_delay_s": 0, "drain_timeout_s": 5, "threads": 2}
    quick |= {"host": "127.0.0.1", "port": 0, "max_batch_size": 8, "model": str(package)}
    state = build_state(Settings(**(quick | settings)))
    state.api_keys = api_keys or state.api_keys
    if loaded:
        state.loaded = (
            load_model(state)
            if backend == "onnxruntime"
            else _load(state, backend or fake_backend(package), batch_seconds or {})
        )
    server = Server(create_app(state), state)
    listener = bind(state.settings.host, state.settings.port)
    url = url_of(listener)
    thread = threading.Thread(target=server.run, args=([listener],), name="server", daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the server starts")
        assert server.started, "the server's thread ended before it had started"
        with httpx.Client(base_url=url, timeout=WAIT_SECONDS, trust_env=False) as client:
            yield RunningService(url, state, server, client)
    finally:
        if isinstance(backend, WatchedBackend):
            backend.gate.set()
        server.stop()
        thread.join(WAIT_SECONDS)
    assert not thread.is_alive(), f"the server did not stop within {WAIT_SECONDS:g} s"
    ours = set(threading.enumerate()) - threads_before
    for one in ours:  # those that have been told to end may take a moment
        one.join(WAIT_SECONDS)
    left = [one.name for one in ours if one.is_alive()]
    assert not left, f"threads are left behind: {left}"


def _load(state: ServiceState, backend: Backend, batch_seconds: Mapping[int, float]) -> LoadedModel:
    """Load a backend without a proof and a warm-up; it may be behind a gate."""
    times = ServiceTimes(batch_seconds)
    profile = Profile(times.as_dict(), state.settings.max_batch_size)
    observer = state.metrics.batch_observer(backend.info.name)
    return wire_model(state, start_core(state.settings, backend, times, profile, None, observer))


@dataclass
class ServiceProcess:
    """`metaserve serve` in a process of its own.

    Attributes:
        process: to be signalled and waited for.
        url: base address, once `wait_ready` or `wait_listening` returned.
        lines: every line of standard error so far.
    """

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def records(self) -> list[dict[str, Any]]:
        """The log lines that are JSON objects."""
        with self._changed:
            return [json.loads(line) for line in self.lines if line.startswith("{")]

    def wait_for_log(self, text: str, seconds: float = 180.0) -> dict[str, Any]:
        """Return the first log record whose message holds a text, waiting for it."""

        def found() -> list[dict[str, Any]]:
            return [one for one in self.records if text in one["message"]]

        with self._changed:
            self._changed.wait_for(lambda: found() or self.process.poll() is not None, seconds)
        shown = "\n".join(self.lines)
        assert found(), f"no log line says {text!r} (exit {self.process.poll()}):\n{shown}"
        return found()[0]

    def wait_listening(self) -> None:
        """Return once the port is open; the model may still be loading."""
        message = self.wait_for_log("listening on http://")["message"]
        self.url = message.split()[2].rstrip(",")

    def wait_ready(self) -> None:
        """Return once `/readyz` says so."""
        self.wait_listening()
        self.wait_for_log("ready: ")
        reply = httpx.get(f"{self.url}/readyz", timeout=WAIT_SECONDS, trust_env=False)
        assert reply.status_code == 200, reply.text

    def wait_exit(self, seconds: float = 60.0) -> int:
        """Return the exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            shown = "\n".join(self.lines)
            raise AssertionError(f"still running after {seconds:g} s:\n{shown}") from error

    def _collect(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._changed:
                self.lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        self.process.wait()  # standard error closes a moment before the process is gone
        with self._changed:
            self._changed.notify_all()


@contextmanager
def service_process(
    env: Mapping[str, str] | None = None,
    args: Sequence[str] = (),
    *,
    wait: Literal["ready", "listening", "nothing"] = "ready",
    command: Sequence[str] = METASERVE,
) -> Iterator[ServiceProcess]:
    """Run `metaserve serve` on a free port; kill it at the end, if it still runs.

    Args:
        env: variables beyond those of this process, whose own METASERVE_ ones do not count.
        args: further flags.
        wait: for what, before the process is handed over.
        command: how `metaserve` is run.
    """
    inherited = {name: value for name, value in os.environ.items() if "METASERVE_" not in name}
    chosen = {
        "METASERVE_PORT": "0",
        "METASERVE_LOG_FORMAT": "json",
        "METASERVE_DRAIN_DELAY_S": "0",
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [*command, "serve", *args],
        env=inherited | chosen | dict(env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    service = ServiceProcess(process)
    reader = threading.Thread(target=service._collect, name="log reader", daemon=True)
    reader.start()
    try:
        if wait == "ready":
            service.wait_ready()
        elif wait == "listening":
            service.wait_listening()
        yield service
    finally:
        process.kill()
        process.wait(WAIT_SECONDS)
        reader.join(WAIT_SECONDS)
        assert process.stderr is not None
        process.stderr.close()


def wait_until(
    condition: Callable[[], bool],
    what: str,
    *,
    seconds: float = WAIT_SECONDS,
    between: Callable[[], object] | None = None,
) -> None:
    """Return once a condition holds.

    Args:
        condition: asked again and again.
        what: for the message, as in "it did not happen that ...".
        seconds: how long at most.
        between: something useful to do between two questions; a short pause when None.
    """
    pause = threading.Event()
    asked_until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < asked_until, f"not within {seconds:g} s: {what}"
        if between is None:
            pause.wait(0.002)
        else:
            between()
