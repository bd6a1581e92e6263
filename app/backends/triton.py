"""Triton: batches go to a Triton Inference Server over gRPC, and survive its absence.

A connection that is lost, to a batch or to the check for life after one that nobody answered, opens
the circuit: everything is refused at once with BackendUnavailable while one probe at a time, each
on a new channel, asks whether the model is ready. The channel of the probe that succeeds is the one
in use from then on, so nothing of the old connection matters any more: back-off, half-open sockets,
addresses that have changed.

An inference changes nothing on the server, so a batch whose connection was lost is sent once more,
if the first probe, sent at once, succeeds: a balancer that dropped an idle connection, or one of
several servers that went away, costs nobody an answer. Not twice: a batch might be what kills it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

import numpy as np

from app.backends.base import BackendInfo
from app.backends.circuit import Circuit
from app.backends.loop_thread import LoopThread
from app.backends.triton_model import Described, check_model
from app.errors import BackendUnavailable, DeadlineExceeded, StartupError
from app.types import Batch, Rows
from models.golden import golden_images
from models.package import Package
from models.tolerances import ELSEWHERE, TOLERANCES

if TYPE_CHECKING:
    from app.backends.triton_connection import TritonConnection

log = logging.getLogger("metaserve.backends")

DEFAULT_PORT = 8001
PROBE_SECONDS = 2.0
PAUSE_SECONDS = 0.25
SAME_SECONDS = 10.0
# Beyond what bounds a call inside the loop; to be exceeded only by a loop that hangs.
GRACE_SECONDS = 10.0

AWAY = "the Triton server cannot be reached; send the request again later"


class TritonBackend:
    """Sends batches to one model of one Triton server.

    Args:
        package: the model that the server is to run; of its files only the golden outputs are read,
            once.
        url: host and port of the server's gRPC endpoint.
        model: its name on the server; the package's when None.
        device: refuse a model that runs elsewhere; `auto` takes any.
        wait_seconds: how long to wait for server and model at the start; 0 asks once.

    Raises:
        StartupError: the client library, the server or the model is missing, or it is another
            model than the package's.
        PackageError: the package has no golden outputs.
    """

    def __init__(
        self,
        package: Package,
        url: str,
        model: str | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        wait_seconds: float = 0.0,
    ) -> None:
        try:
            from app.backends import triton_connection
        except ModuleNotFoundError as error:
            raise StartupError(
                "the triton backend needs the package tritonclient; install metaserve[triton]"
            ) from error
        self._lib = triton_connection
        self._package = package
        self._url = _address(url)
        self._model = model or package.manifest.name
        # Everything below belongs to the loop's thread.
        self._loop = LoopThread("triton")
        self._circuit = Circuit()
        self._first_probe = asyncio.Event()
        self._reconnecting: asyncio.Task[None] | None = None
        self._connection: TritonConnection | None = None
        try:
            described = self._loop.call(self._start(wait_seconds))
            self.info = self._info(described, device)
            self._golden_logits = package.golden[0]
        except BaseException:
            self.close()
            raise

    def run(self, batch: Batch, deadline: float = math.inf) -> Rows:
        """Have the server answer a batch; see `Backend.run`.

        Raises:
            BackendUnavailable: the server is away; at once, once that is known.
            DeadlineExceeded: the deadline passed here, in the server's queue or before the server
                was found again.
            Overloaded: the server's queue is full.
            Exception: the server failed on the batch.
        """
        bound = min(max(deadline - time.monotonic(), 0.0), self._lib.LONGEST_RUN_SECONDS)
        try:
            return self._loop.call(self._answer(batch, deadline), bound + GRACE_SECONDS)
        except (TimeoutError, CancelledError) as error:
            raise BackendUnavailable(AWAY) from error

    def close(self) -> None:
        """Close the connection and end the thread."""
        if self._loop.is_closed:
            return
        try:
            self._loop.call(self._shut(), GRACE_SECONDS)
        finally:
            self._loop.close()

    async def _answer(self, batch: Batch, deadline: float) -> Rows:
        connection = self._in_use()
        try:
            return await connection.infer(batch, deadline)
        except self._lib.ConnectionLost as error:
            self._lost(connection, str(error))
        seconds = min(deadline - time.monotonic(), self._lib.LONGEST_RUN_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                await self._first_probe.wait()
        except TimeoutError as error:
            raise DeadlineExceeded("the deadline passed before Triton was back") from error
        connection = self._in_use()
        try:
            return await connection.infer(batch, deadline)
        except self._lib.ConnectionLost as error:
            self._lost(connection, str(error))
            raise BackendUnavailable(AWAY) from error

    def _in_use(self) -> TritonConnection:
        """Return the connection, or refuse while there is none.

        Raises:
            BackendUnavailable: the circuit is open.
        """
        if self._connection is None or not self._circuit.is_closed:
            raise BackendUnavailable(AWAY)
        return self._connection

    def _lost(self, connection: TritonConnection, reason: str) -> None:
        """Open the circuit and start to probe, unless another connection is in use already."""
        now = time.monotonic()
        if connection is not self._connection or not self._circuit.lost(now):
            return
        log.warning("lost Triton at %s: %s", self._url, reason)
        self._first_probe = asyncio.Event()
        self._reconnecting = asyncio.create_task(self._reconnect(now))

    async def _reconnect(self, lost_at: float) -> None:
        """Probe until the server and its model are back."""
        said = ""
        while not self._circuit.is_closed:
            await asyncio.sleep(self._circuit.seconds_until_probe(time.monotonic()))
            self._circuit.begin_probe(time.monotonic())
            try:
                connection, _ = await self._connect()
                await self._check_same(connection)
            except Exception as error:  # whatever it is, the next probe may find it mended
                self._circuit.probe_failed(time.monotonic())
                if str(error) != said:
                    said = str(error)
                    log.warning("Triton at %s is still away: %s", self._url, said)
                self._first_probe.set()
            else:
                replaced, self._connection = self._connection, connection
                self._circuit.probe_succeeded()
                self._first_probe.set()
                log.info("Triton is back after %.1f s", time.monotonic() - lost_at)
                if replaced is not None:
                    await replaced.close()

    async def _connect(self) -> tuple[TritonConnection, Described]:
        """Open a channel and see that the package's model is ready behind it.

        Raises:
            ConnectionLost: it is not, now.
            StartupError: there is another model, or none.
        """
        connection = self._lib.TritonConnection(self._url, self._model)
        connection.lost.add_done_callback(lambda lost: self._lost(connection, lost.result()))
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                described = await connection.describe()
            where = f"model {self._model} on Triton at {self._url}"
            check_model(described, self._package, where)
        except BaseException as error:
            await connection.close()
            if isinstance(error, TimeoutError):
                raise self._lib.ConnectionLost(f"no answer in {PROBE_SECONDS:g} s") from error
            raise
        return connection, described

    async def _check_same(self, connection: TritonConnection) -> None:
        """See that the model behind a new connection still is the package's.

        Its repository may have changed while it was away. At the start this is the golden check's.

        Raises:
            StartupError: it answers a golden image with other numbers; the connection is closed.
            Exception: it cannot be asked; likewise.
        """
        expected = self._golden_logits
        try:
            images = golden_images(self._package.manifest.input.size, len(expected))
            rows = await connection.infer(images[:1], time.monotonic() + SAME_SECONDS)
            precision = self._package.manifest.precision
            allowed = ELSEWHERE[precision] * TOLERANCES[precision].allowed(expected)
            difference = float(np.abs(rows.logits - expected[:1]).max())
            if not difference <= allowed:  # also true for NaN
                raise StartupError(
                    f"model {self._model} there is another than before: its logits are "
                    f"{difference:.2g} from those of {self._package.path}"
                )
        except BaseException:
            await connection.close()
            raise

    async def _start(self, wait_seconds: float) -> Described:
        until, said = time.monotonic() + wait_seconds, ""
        while True:
            try:
                self._connection, described = await self._connect()
                return described
            except self._lib.ConnectionLost as error:
                if time.monotonic() >= until:
                    raise StartupError(
                        f"Triton at {self._url} cannot be used: {error}; start it, or set "
                        "METASERVE_TRITON_URL, or wait longer with METASERVE_TRITON_WAIT_S"
                    ) from error
                if str(error) != said:
                    said = str(error)
                    log.info("waiting for Triton at %s: %s", self._url, said)
            await asyncio.sleep(min(PAUSE_SECONDS, max(until - time.monotonic(), 0.0)))

    def _info(self, described: Described, device: str) -> BackendInfo:
        if device not in ("auto", described.device):
            raise StartupError(
                f"METASERVE_DEVICE={device} was asked for, but Triton runs {self._model} on "
                f"{described.device}; set METASERVE_DEVICE=auto, or change its instance_group"
            )
        manifest, config = self._package.manifest, described.config
        return BackendInfo(
            name="triton",
            device=described.device,
            precision=manifest.precision,
            runtime=f"Triton {described.server_version} at {self._url}, model {self._model} on "
            f"its {config.backend or config.platform} backend",
            input_size=manifest.input.size,
            classes=manifest.classes,
            embedding_dim=manifest.embedding_dim,
            batches_in_flight=described.lanes,
            max_batch_size=config.max_batch_size,
        )

    async def _shut(self) -> None:
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.wait([self._reconnecting])
        connection, self._connection = self._connection, None
        self._first_probe.set()
        if connection is not None:
            await connection.close()


def _address(url: str) -> str:
    """Return host and port; 8001 is Triton's own.

    Raises:
        StartupError: another scheme than grpc, or more than an address.
    """
    try:
        parts = urlsplit(url if "://" in url else f"grpc://{url}")
        host, port = parts.hostname, DEFAULT_PORT if parts.port is None else parts.port
    except ValueError:  # a bracket without its twin, a port that is no number
        parts, host, port = urlsplit(""), None, DEFAULT_PORT
    beyond = parts.username or parts.path.strip("/") or parts.query or parts.fragment
    if parts.scheme != "grpc" or beyond or not host or not port or re.search(r"\s", url):
        raise StartupError(
            f"METASERVE_TRITON_URL={url.rpartition('@')[2]!r} is no gRPC address; write it like "
            f"localhost:{DEFAULT_PORT} or [::1]:{DEFAULT_PORT}"
        )
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
