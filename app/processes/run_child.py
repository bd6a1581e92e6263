"""What every process that the supervisor starts does around its serving."""

from __future__ import annotations

import logging
from collections.abc import Callable

from app.ending import end_in_spite_of_threads
from app.errors import StartupError
from app.logs import configure_logs
from app.processes.seat import Seat
from app.settings import Settings, load_settings
from models.package import PackageError

log = logging.getLogger("metaserve")


def run_child(argument: str, serve: Callable[[Settings, Seat], None]) -> int:
    """Serve until the end, and tell the supervisor in a sentence what goes wrong.

    Args:
        argument: a seat.
        serve: returns once the process is to end.

    Returns:
        The exit code.
    """
    seat = Seat.parse(argument)
    try:
        settings = load_settings()
        configure_logs(settings.log_level, settings.log_format, seat.name)
        serve(settings, seat)
    except (StartupError, PackageError) as error:
        seat.report_failure(str(error))
        return 2
    except Exception as error:
        log.exception("%s hit a fault of ours", seat.name)
        seat.report_failure(f"{seat.name} hit a fault of ours: {error!r}")
        return 1
    end_in_spite_of_threads()
    return 0
