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
from app.engine.board import Board
from app.engine.host import EngineHost
from app.errors import StartupError
from app.logs import configure_logs
from app.main import end_in_spite_of_threads
from app.metrics import Metrics
from app.processes.metrics_whole import keep_values_in_files
from app.processes.seat import Seat
from app.settings import Settings, load_settings
from models.package import PackageError, open_package

log = logging.getLogger("metaserve")


def main(argument: str) -> int:
    """Serve the HTTP processes until the supervisor says stop, or all others are gone."""
    seat = Seat.parse(argument)
    try:
        settings = load_settings()
        configure_logs(settings.log_level, settings.log_format, seat.name)
        serve(settings, seat)
    except (StartupError, PackageError) as error:
        seat.report_failure(str(error))
        return 2
    except Exception as error:
        log.exception("the engine process hit a fault of ours")
        seat.report_failure(f"the engine cannot be started: {error}")
        return 1
    end_in_spite_of_threads()
    return 0


def serve(settings: Settings, seat: Seat) -> None:
    """Load the package and answer the HTTP processes.

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
    warm = open_core(settings, open_package(Path(settings.model)), observer)
    listener = socket.socket(fileno=seat.listener)
    host = EngineHost(warm, listener, Board(seat.board, seat.rows), seat.row)
    hosts.append(host)
    signal.signal(signal.SIGTERM, lambda *_: host.stop())
    signal.signal(signal.SIGINT, lambda *_: host.stop())
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
    sys.exit(main(sys.argv[1]))
