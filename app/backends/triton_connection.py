"""One gRPC channel to a Triton server: calls that always end, and errors in our words."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import numpy as np
from tritonclient.grpc.aio import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from app.backends.triton_model import Described
from app.errors import DeadlineExceeded, Overloaded, StartupError, first_line
from app.types import Batch, Rows

SILENCE_SECONDS = 2.0
"""How long a batch may take before the server is asked whether it lives, and again and again.

One whose deadline ends it sooner has it asked then."""

ALIVE_SECONDS = 2.0
"""How long that answer may take."""

LONGEST_RUN_SECONDS = 120.0
"""Of a batch without a deadline, as golden check and warm-up send them."""

_CHANNEL = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # Channels share sockets otherwise, and a new one would inherit the dead one's.
    ("grpc.use_local_subchannel_pool", 1),
    # Proxy variables are for the web; a model server is a neighbour.
    ("grpc.enable_http_proxy", 0),
    # No keep-alive pings: Triton cuts who sends them more often than every five minutes. A run that
    # takes long asks for life with a call of its own instead, see `_check_alive`.
)


class ConnectionLost(Exception):
    """The server cannot be reached, hangs, or has the model no more; says why."""


class InferenceError(Exception):
    """The server refuses this batch, or fails on it."""


class TritonConnection:
    """A channel, made at once and connected with the first call.

    Args:
        url: host and port.
        model: its name on the server.

    Attributes:
        lost: done, with the reason, once the server gives no sign of life or the channel is closed.
    """

    def __init__(self, url: str, model: str) -> None:
        self._client = InferenceServerClient(url, channel_args=_CHANNEL)
        self._url = url
        self._model = model
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._life_check: asyncio.Task[None] | None = None

    async def infer(self, batch: Batch, deadline: float) -> Rows:
        """Answer a batch.

        Args:
            batch: uint8 (N, S, S, 3).
            deadline: absolute `time.monotonic()` seconds.

        Raises:
            ConnectionLost: nobody answers, or another server than before.
            DeadlineExceeded: the deadline passed here or in Triton's queue.
            Overloaded: Triton's queue is full.
            InferenceError: Triton refuses this batch, or fails on it.
        """
        seconds = min(deadline - time.monotonic(), LONGEST_RUN_SECONDS)
        if seconds <= 0:
            raise DeadlineExceeded("the deadline passed before the batch was sent")
        images = InferInput("images", list(batch.shape), "UINT8")
        images.set_data_from_numpy(batch)
        call = self._client.infer(
            self._model,
            [images],
            timeout=math.ceil(seconds * 1e6),  # microseconds, of Triton's queue
            client_timeout=seconds,
        )
        result = await self._answer_of(asyncio.ensure_future(call))
        return Rows(_array(result, "logits"), _array(result, "embedding"))

    async def describe(self) -> Described:
        """Ask what the server and its model are.

        Raises:
            ConnectionLost: the server cannot be reached, or the model is not ready.
            StartupError: the server has no model of that name.
        """
        client, timeout = self._client, ALIVE_SECONDS
        try:
            # Not the server's own readiness: any model that fails to load takes it away.
            if not await client.is_model_ready(self._model, client_timeout=timeout):
                raise ConnectionLost(await self._why_not_ready())
            server, metadata, config = await asyncio.gather(
                client.get_server_metadata(client_timeout=timeout),
                client.get_model_metadata(self._model, client_timeout=timeout),
                client.get_model_config(self._model, client_timeout=timeout),
            )
        except InferenceServerException as error:
            raise ConnectionLost(_said(error)) from error
        return Described(server.version, metadata, config.config)

    async def close(self) -> None:
        """Close the channel; calls that still wait on it end with ConnectionLost."""
        self._lose("the connection was closed")
        if self._life_check is not None:
            self._life_check.cancel()
        await self._client.close()

    async def _answer_of(self, call: asyncio.Future[Any]) -> Any:
        """Wait for a call as long as the server shows signs of life."""
        try:
            while await self._is_silent(call):
                self._check_alive()
            if call.done() and not call.cancelled():
                return call.result()
            raise ConnectionLost(self.lost.result())
        except InferenceServerException as error:
            ours = _in_our_words(error)
            if isinstance(ours, DeadlineExceeded):
                self._check_alive()  # nobody may be there, and no batch may ever wait long enough
            raise ours from error
        finally:
            call.cancel()

    async def _is_silent(self, call: asyncio.Future[Any]) -> bool:
        """Wait for a call or the loss of the connection; True when neither comes for long."""
        done, _ = await asyncio.wait(
            [call, self.lost], timeout=SILENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        return not done

    def _check_alive(self) -> None:
        """See to it that the server is asked; callers do not wait for its answer."""
        if not self.lost.done() and (self._life_check is None or self._life_check.done()):
            self._life_check = asyncio.create_task(self._ask_alive())

    async def _ask_alive(self) -> None:
        try:
            await self._client.is_server_live(client_timeout=ALIVE_SECONDS)
        except InferenceServerException as error:
            self._lose(f"it does not answer: {_said(error)}")

    def _lose(self, reason: str) -> None:
        if not self.lost.done():
            self.lost.set_result(reason)

    async def _why_not_ready(self) -> str:
        """Return the state of the model.

        Raises:
            StartupError: there is no such model.
        """
        index = await self._client.get_model_repository_index(client_timeout=ALIVE_SECONDS)
        for entry in index.models:
            if entry.name == self._model:
                state = f"is {entry.state.lower()}" if entry.state else "is not loaded"
                reason = f" ({entry.reason.splitlines()[0]})" if entry.reason else ""
                return f"model {self._model} {state}{reason}"
        names = ", ".join(sorted({entry.name for entry in index.models})) or "none"
        raise StartupError(
            f"Triton at {self._url} has no model {self._model!r}, its models: {names}; set "
            "METASERVE_TRITON_MODEL, or add it with `metaserve export --format triton`"
        )


def _array(result: Any, name: str) -> Any:
    """Return an output in memory of its own: the client's lies in the message, read-only."""
    array = result.as_numpy(name)
    if array is None:
        raise RuntimeError(f"Triton answered without {name}")
    return np.array(array)


def _in_our_words(error: Any) -> Exception:
    """Return what Triton's refusal means here.

    Triton says UNAVAILABLE to three things that differ much, so the text decides (seen in 2.51).
    """
    status, text = error.status(), error.message()
    if status == "StatusCode.DEADLINE_EXCEEDED" or "Request timeout expired" in text:
        return DeadlineExceeded("the deadline passed before Triton answered")
    if "Exceeds maximum queue size" in text:
        return Overloaded("the queue of the Triton server is full; send the request again later")
    if status in ("StatusCode.UNAVAILABLE", "StatusCode.NOT_FOUND", "StatusCode.CANCELLED"):
        return ConnectionLost(_said(error))
    return InferenceError(_said(error))


def _said(error: Any) -> str:
    return first_line(Exception(error.message() or error.status()))
