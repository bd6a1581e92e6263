"""The parent of a service's processes: starts them, watches them, ends them.

    signals ----\
    SIGCHLD -----> select() --> a process has ended: start it again, later each time
    reports ----/               SIGTERM, SIGINT: passed on; the engine process goes last

It waits in `select` and costs nothing while nothing happens. The processes hold the other end of a
pipe: when the supervisor is killed they read its end, finish what they have, and go.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import selectors
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from app.engine.shared.board import Board
from app.errors import StartupError
from app.first_use import locate_package
from app.listener import bind, url_of, what_to_type
from app.logs import is_text
from app.processes.child import Child, in_words
from app.processes.metrics_port import serve_metrics_apart
from app.processes.metrics_whole import whole_registry
from app.processes.roster import Roster
from app.processes.runtime_folder import RuntimeFolder, runtime_folder
from app.processes.seat import Seat, engine_path
from app.processes.shape import Shape
from app.settings import PREFIX, Settings, as_environment
from models.package import open_package

log = logging.getLogger("metaserve.supervisor")

# Beyond the drain, for everything: connections get 2 s for their refusals, engine and threads 1 s
# each. The engine process ends last; nobody waits for it any more.
GRACE_SECONDS = 5.0
LAST_SECONDS = 0.5
# Before the service was first ready: nothing that it has would be freed by waiting.
MOST_FAILED_STARTS = 3
WORKER, ENGINE = "app.processes.worker", "app.processes.engine_process"


def supervise(settings: Settings, shape: Shape) -> int:
    """Serve with several processes until a signal comes; returns the exit code.

    Raises:
        StartupError: the service cannot start.
        PackageError: there is no such package.
        SystemExit: it was to be exported on first use, and that failed or was ended.
    """
    relay = not is_text(settings.log_format, sys.stderr)
    package = locate_package(settings, log.info, relay)
    settings = settings.model_copy(update={"model": str(package.resolve())})
    key = open_package(package).manifest.key
    with runtime_folder() as folder, bind(settings.host, settings.port) as listener:
        changed = settings.model_dump(mode="json", exclude_defaults=True)
        url = url_of(listener)
        log.info("listening on %s, loading %s", url, package, extra={"fields": changed})
        supervisor = Supervisor(settings, shape, listener, folder, key)
        registry = whole_registry(folder.path, supervisor.board, supervisor.roster)
        with serve_metrics_apart(settings, registry):
            failure = supervisor.run()
    if failure is not None:
        raise StartupError(failure)
    log.info("stopped")
    return 0


class Supervisor:
    """Runs the processes of a service.

    Args:
        settings: of the service; the model is a package directory.
        shape: which processes.
        listener: the HTTP port, which all workers accept from.
        folder: the runtime directory.
        package: the key of the package, which every process must find.
    """

    def __init__(
        self,
        settings: Settings,
        shape: Shape,
        listener: socket.socket,
        folder: RuntimeFolder,
        package: str,
    ) -> None:
        self._settings = settings
        self._shape = shape
        self._folder = folder.path
        self._folder_lock = folder.lock
        self._package = package
        self._listener = listener
        self._url = url_of(listener)
        rows = shape.workers + shape.shares_engine
        self.board = Board.create(rows)
        self.roster = Roster.create(shape.workers, rows)
        self._selector = selectors.DefaultSelector()
        self._is_announced = False
        self._is_stopping = False
        self._end_by = math.inf
        self._kill_at: dict[str, float] = {}
        self._failure: str | None = None
        self._failed_starts: Counter[str] = Counter()
        # Both ends stay open here; the reading ends, inherited, show when all writers are gone.
        self._life = os.pipe()
        self._engine_life = os.pipe()
        self._socket = socket.socket(socket.AF_UNIX)
        self._engine = self._engine_child() if shape.shares_engine else None
        self._workers = [self._worker_child(row) for row in range(shape.workers)]

    def run(self) -> str | None:
        """Run until a signal comes; returns why the service could not start, None if it could."""
        with self._hearing_signals() as signals:
            self._selector.register(signals, selectors.EVENT_READ, lambda: self._hear(signals))
            while not (self._is_stopping and not any(child.pid for child in self._children)):
                for key, _ in self._selector.select(self._seconds_to_wait()):
                    key.data()
                self._turn()
        self._selector.close()
        self._socket.close()
        for descriptor in (*self._life, *self._engine_life):
            os.close(descriptor)
        self.board.close()
        self.roster.close()
        return self._failure

    @property
    def _children(self) -> list[Child]:
        return [*([self._engine] if self._engine else []), *self._workers]

    def _seat(self, name: str, row: int, listener: int, life: int) -> Seat:
        return Seat(
            name=name,
            row=row,
            workers=self._shape.workers,
            shares_engine=self._shape.shares_engine,
            folder=self._folder,
            listener=listener,
            board=self.board.descriptor,
            roster=self.roster.descriptor,
            life=life,
            package=self._package,
        )

    def _worker_child(self, row: int) -> Child:
        seat = self._seat(f"worker-{row}", row, self._listener.fileno(), self._life[0])
        # The engine process lives as long as anybody holds the writing end of its pipe.
        descriptors = (seat.listener, *self._shared(seat), self._engine_life[1])
        environment = self._environment(self._shape.worker_threads)
        return Child(seat, WORKER, environment, descriptors)

    def _shared(self, seat: Seat) -> Sequence[int]:
        return seat.board, seat.roster, seat.life, self._folder_lock

    def _engine_child(self) -> Child:
        # Held here, so that connections wait in it while the process is started again.
        self._socket.bind(engine_path(self._folder))
        self._socket.listen(2 * self._shape.workers)
        fileno = self._socket.fileno()
        seat = self._seat("engine", self._shape.workers, fileno, self._engine_life[0])
        environment = self._environment(self._shape.engine_threads)
        return Child(seat, ENGINE, environment, (fileno, *self._shared(seat)))

    def _environment(self, threads: int) -> Mapping[str, str]:
        settings = self._settings.model_copy(update={"threads": threads})
        others = {
            key: value for key, value in os.environ.items() if not key.upper().startswith(PREFIX)
        }
        # Read when prometheus_client is imported: values live in files that all processes see.
        return others | as_environment(settings) | {"PROMETHEUS_MULTIPROC_DIR": self._folder}

    @contextmanager
    def _hearing_signals(self) -> Iterator[socket.socket]:
        """Give a socket from which the numbers of signals are read."""
        reading, writing = socket.socketpair()
        reading.setblocking(False)
        writing.setblocking(False)
        numbers = signal.SIGTERM, signal.SIGINT, signal.SIGCHLD
        # Before the handlers, which do nothing: a signal in between would be lost.
        wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
        before: dict[signal.Signals, Any] = {
            number: signal.signal(number, lambda *_: None) for number in numbers
        }
        try:
            yield reading
        finally:
            signal.set_wakeup_fd(wakeup)
            if self._is_stopping:  # a signal more must not keep what is left from being removed
                before[signal.SIGTERM] = signal.SIG_IGN
            for number, handler in before.items():
                signal.signal(number, handler)
            reading.close()
            writing.close()

    def _hear(self, signals: socket.socket) -> None:
        with suppress(BlockingIOError):
            for number in signals.recv(4096):
                if number in (signal.SIGTERM, signal.SIGINT):
                    log.info("%s: passing it on", signal.Signals(number).name)
                    self._stop(signal.Signals(number))

    def _stop(self, number: signal.Signals) -> None:
        """Pass a signal on to the workers; a second SIGTERM skips their drain delay."""
        delay = self._settings.drain_delay_s if number == signal.SIGTERM else 0.0
        if self._is_stopping:
            delay = 0.0
        self._is_stopping = True
        until = time.monotonic() + delay + self._settings.drain_timeout_s + GRACE_SECONDS
        self._end_by = min(until, self._end_by)
        workers_end_by = self._end_by - (LAST_SECONDS if self._engine else 0.0)
        # The workers have it too; nothing must be accepted once they have closed theirs.
        self._listener.close()
        for worker in self._workers:
            # One that still loads leaves at SIGTERM, and may not have a handler for SIGINT yet.
            worker.signal(number if worker.is_ready else signal.SIGTERM)
            self._kill_at[worker.name] = workers_end_by

    def _turn(self) -> None:
        """Do what is due."""
        for child in self._children:
            code = child.poll()
            if code is not None:
                self._bury(child, code)
        reap_orphans({child.pid for child in self._children})
        if self._is_stopping:
            self._end_engine_last()
        else:
            for child in self._children:
                if child.pid is None and child.due_at <= time.monotonic():
                    self._start(child)
        for child in self._children:
            if child.pid and time.monotonic() >= self._kill_at.get(child.name, math.inf):
                log.warning("%s does not end: killing it", child.name)
                child.signal(signal.SIGKILL)
                self._kill_at[child.name] = math.inf  # once

    def _start(self, child: Child) -> None:
        try:
            pid = child.start()
        except OSError as error:  # no memory, no process ids, no descriptors left
            seconds = child.forget()
            self._failed_starts[child.name] += 1
            if not self._is_announced and self._failed_starts[child.name] >= MOST_FAILED_STARTS:
                self._failure = f"{child.name} cannot be started: {error}; {_what_to_raise(error)}"
                self._stop(signal.SIGINT)
                return
            log.error("%s cannot be started (%s); again in %g s", child.name, error, seconds)
            return
        self.roster.enter(child.seat.row, pid)
        assert child.report is not None
        self._selector.register(child.report, selectors.EVENT_READ, lambda: self._listen(child))
        log.debug("%s started as process %d", child.name, pid)

    def _listen(self, child: Child) -> None:
        if child.listen():
            if self._is_announced:
                log.info("%s serves again", child.name)
            elif all(worker.is_ready for worker in self._workers):
                self._is_announced = True
                log.info("ready: %s", what_to_type(self._settings, self._url))

    def _bury(self, child: Child, code: int) -> None:
        """Take note of an end, and plan a new beginning."""
        self.board.withdraw(child.seat.row)
        self.roster.leave(child.seat.row)
        if child.report is not None:
            self._selector.unregister(child.report)
        ended_at_first = child.failure is not None and not child.has_been_ready
        seconds = child.forget()
        if self._is_stopping:
            return
        if ended_at_first and not self._is_announced:
            self._failure = child.failure
            self._stop(signal.SIGINT)
            return
        self.roster.count_restart(child.seat.row)
        reason = f": {child.failure}" if child.failure else ""
        if code == -signal.SIGBUS:
            reason = f"; is the disk of {self._folder} full?"
        log.error("%s %s%s; starting it again in %g s", child.name, in_words(code), reason, seconds)

    def _end_engine_last(self) -> None:
        engine = self._engine
        if engine is None or engine.name in self._kill_at or any(w.pid for w in self._workers):
            return
        engine.signal(signal.SIGTERM)
        self._kill_at[engine.name] = self._end_by

    def _seconds_to_wait(self) -> float | None:
        """Return how long nothing is due; None while only an event can change that."""
        dues = [self._kill_at.get(child.name, math.inf) for child in self._children if child.pid]
        if not self._is_stopping:
            dues += [child.due_at for child in self._children if child.pid is None]
        first = min(dues, default=math.inf)
        return max(first - time.monotonic(), 0.0) if first < math.inf else None


def reap_orphans(own: Container[int | None]) -> None:
    """Take note of the ends of processes that came to process 1 because their parents had ended.

    In a container that is us: compilers of an engine that was killed, what was begun in a shell
    beside it. They would stay in the table of processes for good.

    Args:
        own: children whose end somebody else takes note of.
    """
    if os.getpid() != 1:
        return
    with suppress(ChildProcessError):
        # Only looked at, since it may be one of ours; then its end wakes us once more.
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid in own:
                return
            os.waitpid(ended.si_pid, os.WNOHANG)


def _what_to_raise(error: OSError) -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "allow more open files (ulimit -n), or set fewer METASERVE_WORKERS"
    return "allow more memory and processes, or set fewer METASERVE_WORKERS"
