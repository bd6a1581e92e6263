"""`metaserve serve`: chooses the shape of the service and runs it."""

from __future__ import annotations

import resource

from app.errors import StartupError
from app.logs import configure_logs
from app.processes.shape import choose_shape
from app.settings import Settings
from app.signals import ending_with_0

# A process has up to 30 of its own.
LEAST_OPEN_FILES = 64


def serve(settings: Settings) -> int:
    """Serve until a signal comes; returns the exit code.

    Raises:
        StartupError: the service cannot start.
        PackageError: the package cannot be used.
        SystemExit: it was to be exported on first use, and that failed or was ended.
    """
    configure_logs(settings.log_level, settings.log_format)
    check_open_files()
    with ending_with_0():
        shape = choose_shape(settings)
        if shape.is_one_process:
            from app.main import serve_alone

            return serve_alone(settings)
        # A supervisor loads no HTTP server and no runtime; the test of the rooms looks.
        from app.processes.supervisor import supervise

        return supervise(settings, shape)


def check_open_files() -> None:
    """Refuse to serve where no room is left for connections.

    Raises:
        StartupError: the process may open too few files.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed < LEAST_OPEN_FILES:
        raise StartupError(
            f"only {allowed} open files are allowed, and every connection is one; allow at least "
            f"{LEAST_OPEN_FILES}, better thousands (ulimit -n)"
        )
