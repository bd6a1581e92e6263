"""The process that owns the device, for all HTTP processes; the supervisor starts it.

`python -m app.processes.engine_process SEAT`
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from pathlib import Path

from prometheus_client import CollectorRegistry

from app.assemble import open_core
from app.engine.shared.board import Board
from app.engine.shared.host import EngineHost
from app.engine.shelf import ProfileShelf
from app.garbage import keep_all_for_good
from app.metrics import Metrics
from app.processes.metric_files import keep_values_in_files
from app.processes.run_child import run_child
from app.processes.seat import Seat
from app.settings import Settings
from models.package import open_package

log = logging.getLogger("metaserve")


def serve(settings: Settings, seat: Seat) -> None:
    """Load the package and answer the HTTP processes until told to stop, or all are gone.

    While the package loads, SIGTERM ends the process at once: there is nobody to answer yet.

    Raises:
        StartupError: the backend cannot run here.
        PackageError: the package is damaged, or its numbers are not reproduced.
    """
    hosts: list[EngineHost] = []
    threading.Thread(
        target=_outlive_nobody, args=(seat.life, hosts), name="life", daemon=True
    ).start()
    keep_values_in_files(seat.name)
    observer = Metrics(CollectorRegistry()).batch_observer(settings.backend)
    package = open_package(Path(settings.model))
    seat.check_package(package)
    warm = open_core(settings, package, observer, ProfileShelf(seat.folder))
    listener = socket.socket(fileno=seat.listener)
    board = Board(seat.board, seat.rows)
    host = EngineHost(warm, listener, board, seat.row, seat.package)
    hosts.append(host)
    signal.signal(signal.SIGTERM, lambda *_: host.stop())
    signal.signal(signal.SIGINT, lambda *_: host.stop())
    keep_all_for_good()
    seat.report_ready()
    host.serve()


def _outlive_nobody(life: int, hosts: list[EngineHost]) -> None:
    """Stop when the supervisor and all workers, who hold the other end, are gone."""
    os.read(life, 1)
    if not hosts:
        os._exit(1)
    log.error("all other processes are gone: stopping")
    hosts[0].stop()


if __name__ == "__main__":
    sys.exit(run_child(sys.argv[1], serve))
