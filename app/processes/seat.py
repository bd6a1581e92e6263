"""Seat: what the supervisor hands a process of the service: who it is, and what it inherits."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass

from models.package import Package, PackageError

READY = "ready"
FAILED = "failed "


@dataclass(frozen=True)
class Seat:
    """A process's place in the service; crosses to it as one argument.

    Attributes:
        name: `worker-0`, `worker-1`, ... or `engine`.
        row: its own on the board and in the roster.
        workers: how many HTTP processes there are; they have the first rows.
        shares_engine: whether one engine process, in the row after theirs, serves them.
        folder: the service's runtime directory.
        listener: descriptor of the HTTP port, or of the engine's unix socket.
        board: descriptor of the board.
        roster: descriptor of the roster.
        life: descriptor that reads its end when this process is to go too.
        package: the key of the package that the service was started with.
        report: descriptor of the pipe to the supervisor.
    """

    name: str
    row: int
    workers: int
    shares_engine: bool
    folder: str
    listener: int
    board: int
    roster: int
    life: int
    package: str
    report: int = -1

    @property
    def rows(self) -> int:
        """How many processes there are, without the supervisor."""
        return self.workers + self.shares_engine

    @property
    def engine_path(self) -> str:
        """Where the engine process is connected to."""
        return engine_path(self.folder)

    def check_package(self, package: Package) -> None:
        """Refuse a package that came into the place of the service's own.

        Raises:
            PackageError: it is another one.
        """
        if package.manifest.key != self.package:
            manifest = package.manifest
            raise PackageError(
                f"{package.path} holds another package now ({manifest.name} {manifest.version}) "
                "than when the service was started; restart the service to serve it, or put the "
                "old one back"
            )

    def as_argument(self) -> str:
        """Return what `parse` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, argument: str) -> Seat:
        """Return the seat that an argument holds."""
        return cls(**json.loads(argument))

    def report_ready(self) -> None:
        """Tell the supervisor that this process serves."""
        self._tell(READY)

    def report_failure(self, sentence: str) -> None:
        """Tell the supervisor why this process cannot start."""
        self._tell(FAILED + sentence.replace("\n", " "))

    def _tell(self, line: str) -> None:
        with suppress(OSError):  # the supervisor is gone
            os.write(self.report, f"{line}\n".encode())


def engine_path(folder: str) -> str:
    """Return the path of the engine process's socket in a runtime directory."""
    return os.path.join(folder, "engine")
