"""The one door to the onnxruntime library; serving and exporting both go through it."""

from __future__ import annotations

import os
from types import ModuleType


def import_onnxruntime() -> ModuleType:
    """Import the library with its telemetry off and its own log lines down to errors.

    From 1.32 on it writes a device id and events into the user's cache directory and sends them
    out; a service that works without a network sends nothing.

    Raises:
        ImportError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read while the library loads
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    onnxruntime.set_default_logger_severity(3)
    module: ModuleType = onnxruntime
    return module
