"""Structured logs: one JSON object a line for machines, or one readable line for a terminal."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

import orjson


class JsonFormatter(logging.Formatter):
    """One JSON object a line; a record's `fields` become members of it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
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


def configure_logs(level: str, log_format: Literal["auto", "json", "text"]) -> None:
    """Send every log line of the process to standard error in one form."""
    handler = logging.StreamHandler(sys.stderr)
    as_text = log_format == "text" or (log_format == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    # The server's own lines about starting and stopping say less than ours.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("asyncio").setLevel(max(logging.WARNING, logging.root.level))
    # It warns of every body that is not well formed; the request's own line says so.
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)


def _printable(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and " " not in text else repr(text)
