"""RemoteEngine: the engine's promise, kept by another process."""

from __future__ import annotations

from app.engine.base import EngineStatus
from app.engine.board import Board
from app.engine.wire import Greeting
from app.types import Pixels, Row


class RemoteEngine:
    """Keeps the Engine promise through an `EngineHost`; belongs to one event loop.

    Args:
        path: of the host's listening unix socket, which outlives any one host.
        board: where the host publishes its status.
        row: of the engine on the board.
        queue_budget_seconds: longest predicted wait at which an image is handed over.
        close_timeout_seconds: how long `aclose` lets admitted requests finish.
        patience_seconds: how long the requests of a host that died wait for the next one.
    """

    def __init__(
        self,
        path: str,
        board: Board,
        row: int,
        *,
        queue_budget_seconds: float,
        close_timeout_seconds: float = 1.0,
        patience_seconds: float = 10.0,
    ) -> None:
        raise NotImplementedError

    async def start(self) -> None:
        """Connect in the background, and again whenever the host is gone."""
        raise NotImplementedError

    async def until_ready(self) -> Greeting:
        """Wait for a host, and return what it said of itself."""
        raise NotImplementedError

    @property
    def loaded(self) -> Greeting | None:
        """What the latest host said of itself; None before the first one answered."""
        raise NotImplementedError

    @property
    def is_ready(self) -> bool:
        """Whether a host answers now."""
        raise NotImplementedError

    async def infer(self, pixels: Pixels, *, deadline: float) -> Row:
        """Answer one image; see `Engine.infer`."""
        raise NotImplementedError

    def check_admission(self, deadline: float, *, ahead_seconds: float = 0.0) -> None:
        """Raise what `infer` would raise now, as far as the board tells."""
        raise NotImplementedError

    def status(self) -> EngineStatus:
        """Return how the engine fares."""
        raise NotImplementedError

    def refuse_waiting(self) -> None:
        """Answer everything of this process that waits with Draining."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Refuse new images, answer the admitted ones, disconnect."""
        raise NotImplementedError
