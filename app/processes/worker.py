"""One HTTP process of several: `python -m app.processes.worker SEAT`, started by the supervisor."""

from __future__ import annotations

import socket
import sys
from functools import partial

from app.engine.shared.board import Board
from app.engine.shared.remote import RemoteEngine
from app.engine.shared.wire import Greeting
from app.engine.shelf import ProfileShelf
from app.garbage import keep_all_for_good
from app.http.app import create_app
from app.http.state import LoadedModel
from app.main import build_state, load_and_run, load_model, show_model
from app.metrics import Metrics
from app.processes.metric_files import keep_values_in_files
from app.processes.metrics_whole import whole_registry
from app.processes.roster import Roster
from app.processes.run_child import run_child
from app.processes.seat import Seat
from app.processes.worker_server import WorkerServer
from app.settings import Settings
from models.package import LABELS, WORDNET_IDS


def serve(settings: Settings, seat: Seat) -> None:
    """Serve this process's share of the callers until the supervisor says stop, or is gone.

    Raises:
        StartupError: a setting cannot be met, or the model cannot be loaded.
        PackageError: the package is damaged.
    """
    board = Board(seat.board, seat.rows)
    roster = Roster(seat.roster, seat.workers, seat.rows)
    keep_values_in_files(seat.name)
    state = build_state(settings, Metrics(whole_registry(seat.folder, board, roster)))
    seat.check_package(state.package)
    state.board = board
    listener = socket.socket(fileno=seat.listener)
    app = create_app(state)
    if not seat.shares_engine:
        server = WorkerServer(app, state, seat, board, roster)
        load_and_run(server, listener, partial(load_model, state, ProfileShelf(seat.folder)))
        return
    # The engine process checks all files; these are read here, where another may be put any time.
    state.package.check_files((LABELS, WORDNET_IDS))
    _ = state.package.labels, state.package.wordnet_ids

    def renew(greeting: Greeting) -> None:
        before, info = state.loaded, greeting.info
        if before is None or before.backend != info:
            show_model(state, info)
        if before is None:
            keep_all_for_good()
        state.loaded = LoadedModel(
            engine, info, greeting.golden, greeting.profile, lambda: engine.is_ready
        )

    engine = RemoteEngine(
        seat.engine_path,
        board,
        row=seat.workers,
        package=seat.package,
        on_greeting=renew,
        queue_budget_seconds=settings.queue_budget_ms / 1000,
    )
    WorkerServer(app, state, seat, board, roster, on_start=engine.start).run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(run_child(sys.argv[1], serve))
