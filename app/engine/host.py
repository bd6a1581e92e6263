"""EngineHost: one EngineCore for several HTTP processes; messages in, messages out."""

from __future__ import annotations

import socket
from typing import Protocol

from app.backends.base import BackendInfo
from app.engine.base import GoldenCheck, Profile
from app.engine.board import Board
from app.engine.core import EngineCore


class Warm(Protocol):
    """A core that answers, and what is known of it; see `app.assemble.WarmCore`."""

    @property
    def core(self) -> EngineCore:
        """With its threads started."""
        ...

    @property
    def backend(self) -> BackendInfo:
        """What runs the network."""
        ...

    @property
    def golden(self) -> GoldenCheck | None:
        """How this machine's answers differ from torch in float32."""
        ...

    @property
    def profile(self) -> Profile:
        """What warm-up measured."""
        ...


class EngineHost:
    """Serves a core to the workers that connect.

    Args:
        warm: the core, closed with the host, and what is known of it.
        listener: a listening unix stream socket, inherited; workers may have connected already.
        board: where the engine's status is published.
        row: of this engine on the board.
        close_timeout_seconds: how long `stop` lets admitted requests finish.
    """

    def __init__(
        self,
        warm: Warm,
        listener: socket.socket,
        board: Board,
        row: int,
        close_timeout_seconds: float = 30.0,
    ) -> None:
        raise NotImplementedError

    def serve(self) -> None:
        """Serve until `stop`; returns once the admitted requests are answered."""
        raise NotImplementedError

    def stop(self) -> None:
        """Refuse new images, answer the admitted ones, let `serve` return; from any thread."""
        raise NotImplementedError
