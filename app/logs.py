"""Structured logs: one JSON object a line for machines, or one readable line for a terminal."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import select
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import lru_cache
from typing import Literal, TextIO

import orjson

MOST_LINES = 1000
"""How many waiting lines go out in one system call."""
PAUSE_SECONDS = 0.01
"""How long lines gather after that."""


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    """Return a moment of UTC to the second; lines of one second share it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a record's `fields` become members of it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": f"{_second(int(record.created))}.{int(record.created % 1 * 1e3):03d}+00:00",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except TypeError:  # a path that is no UTF-8 holds what only escapes can write
            return json.dumps(line, default=str)


class TextFormatter(logging.Formatter):
    """Time, level, message, then the fields as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; what came from outside cannot break it in two."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S.%f")[:-3]
        fields: dict[str, object] = getattr(record, "fields", {})
        words = [time, record.levelname.lower(), record.getMessage()]
        words += [
            f"{key}={_printable(value)}" for key, value in fields.items() if value is not None
        ]
        line = " ".join(words)
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class BackgroundHandler(logging.Handler):
    """Hands finished lines to a thread that writes them, so that nobody waits for a reader.

    A pipe whose reader has stopped blocks its writer; requests, probes and the end of the process
    must not wait for it. Lines beyond `capacity` are dropped, and how many is said when there is
    room again.
    """

    def __init__(self, stream: TextIO, capacity: int = 10_000) -> None:
        super().__init__()
        self._stream = stream
        # Bounded here: `queue.Queue` is, too, and costs ten times as much a line.
        self._lines: queue.SimpleQueue[str | threading.Event | None] = queue.SimpleQueue()
        self._capacity = capacity
        self._dropped = 0
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._write, name="logs", daemon=True)
        self._writer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        try:
            if self._lines.qsize() >= self._capacity:
                self._dropped += 1
                return
            if self._dropped:
                self._lines.put(self.format(_dropped_lines(self._dropped)))
                self._dropped = 0
            self._lines.put(self.format(record))
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Wait until everything so far is written, for about a second at most."""
        written = threading.Event()
        self._lines.put(written)
        written.wait(1.0)

    def close(self) -> None:
        """Write what waits, for about a second at most, and end the thread."""
        self._closing.set()
        self._lines.put(None)
        self._writer.join(1.0)
        super().close()

    def _write(self) -> None:
        items: list[str | threading.Event | None] = []
        while None not in items:
            items = [self._lines.get()]
            while len(items) < MOST_LINES and not self._lines.empty():  # nobody else takes any
                items.append(self._lines.get())
            with contextlib.suppress(OSError, ValueError):  # nobody reads any more
                self._write_text("".join(f"{line}\n" for line in items if isinstance(line, str)))
            for written in items:
                if isinstance(written, threading.Event):
                    written.set()
            # To be woken for each line costs whoever logs it more than the line.
            self._closing.wait(PAUSE_SECONDS)

    def _write_text(self, text: str) -> None:
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):  # a stream in memory
            self._stream.write(text)
            return
        # Past the stream's buffer, whose lock a blocked writer would hold when the process ends.
        for piece in whole_lines(text.encode("utf-8", "backslashreplace")):
            rest = memoryview(piece)
            while rest:
                rest = rest[os.write(descriptor, rest) :]


def whole_lines(text: bytes, most: int = select.PIPE_BUF) -> Iterator[bytes]:
    """Cut lines into pieces that a pipe takes at once.

    Several processes write to one pipe; the kernel may put another's line into the middle of a
    longer piece. A line that is longer stands alone.
    """
    start = 0
    while start < len(text):
        end = text.rfind(b"\n", start, start + most) + 1
        end = end or text.find(b"\n", start) + 1 or len(text)
        yield text[start:end]
        start = end


def _dropped_lines(count: int) -> logging.LogRecord:
    said = f"{count} log lines were dropped: their reader did not keep up"
    return logging.LogRecord("metaserve.logs", logging.WARNING, "", 0, said, None, None)


LogFormat = Literal["auto", "json", "text"]


def is_text(log_format: LogFormat, stream: TextIO | None) -> bool:
    """Return whether log lines on a stream are for people to read."""
    return log_format == "text" or (log_format == "auto" and stream is not None and stream.isatty())


def configure_logs(level: str, log_format: LogFormat, process: str | None = None) -> None:
    """Send every log line of the process to standard error in one form.

    Args:
        level: least severity.
        log_format: for people or machines.
        process: a field of every line, where a service has several processes.
    """
    stream = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - it stays open to the end
    handler = BackgroundHandler(stream)
    handler.setFormatter(TextFormatter() if is_text(log_format, stream) else JsonFormatter())
    if process is not None:
        handler.addFilter(_name_process(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # No line of ours says which thread, process or source line wrote it; finding out takes longer
    # than the rest of a record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None  # as the logging HOWTO has it
    # The server's own lines about starting and stopping say less than ours.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(max(logging.WARNING, logging.root.level))
    # It warns of every body that is not well formed; the request's own line says so.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def _name_process(process: str) -> Callable[[logging.LogRecord], bool]:
    def name(record: logging.LogRecord) -> bool:
        record.fields = {"process": process, **getattr(record, "fields", {})}
        return True

    return name


def _printable(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)
