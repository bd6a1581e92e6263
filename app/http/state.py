"""What the routes share: the settings, the metrics, and the model once it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import orjson

from app.backends.base import BackendInfo
from app.engine.base import Engine, EngineStatus, GoldenCheck, Profile
from app.engine.shared.board import Board
from app.errors import BackendUnavailable, Draining, NotReady, Refused
from app.http.pool import CpuPool
from app.metrics import Metrics
from app.settings import Settings
from models.package import Package


@dataclass(frozen=True)
class LoadedModel:
    """A warm engine and what is known of it.

    Attributes:
        engine: answers images.
        backend: what runs the network.
        golden: how this machine's answers differ from torch in float32; None for a fake.
        profile: what warm-up measured.
        is_connected: whether the engine answers; one in this process always does.
    """

    engine: Engine
    backend: BackendInfo
    golden: GoldenCheck | None
    profile: Profile
    is_connected: Callable[[], bool] = lambda: True


@dataclass
class ServiceState:
    """One service's state; lives on `app.state.service`.

    Attributes:
        settings: as read at start.
        package: the model to serve.
        metrics: all of them.
        pool: threads for what would hold up the event loop: images, large bodies and replies.
        api_keys: keys that are let in; None lets everybody in.
        loaded: the model, None while it loads.
        draining: SIGTERM came: still serving, no longer ready.
        board: how the engines of all processes fare; None where this is the only process.
    """

    settings: Settings
    package: Package
    metrics: Metrics
    pool: CpuPool
    api_keys: frozenset[str] | None = None
    loaded: LoadedModel | None = None
    draining: bool = False
    board: Board | None = None

    @cached_property
    def reply_head(self) -> bytes:
        """The JSON with which every result begins: who answers, and a comma."""
        manifest = self.package.manifest
        head = orjson.dumps({"model": manifest.name, "version": manifest.version})
        return head[:-1] + b","

    def model(self) -> LoadedModel:
        """Return the loaded model.

        Raises:
            NotReady: it is still loading.
        """
        if self.loaded is None:
            raise NotReady("the model is still loading; try again in a moment")
        return self.loaded

    def check_ready(self) -> None:
        """Refuse unless the service is between the end of warm-up and SIGTERM.

        Raises:
            Refused: and says why it is not ready.
        """
        if self.draining:
            raise Draining("the service is stopping")
        if not self.model().is_connected():
            raise BackendUnavailable("the engine process has ended and is being started again")

    @property
    def is_ready(self) -> bool:
        """Whether `check_ready` passes."""
        try:
            self.check_ready()
        except Refused:
            return False
        return True

    def stalled(self) -> EngineStatus | None:
        """Return the status of an engine of the service that has made no progress for too long."""
        statuses = [self.loaded.engine.status()] if self.loaded else []
        if self.board is not None:
            statuses += [self.board.read(row) for row in range(self.board.rows)]
        worst = max(statuses, key=lambda status: status.stalled_seconds, default=None)
        if worst is None or worst.stalled_seconds <= self.settings.stall_seconds:
            return None
        return worst
