"""The one door to NVIDIA's TensorRT libraries; serving and exporting both go through it."""

from __future__ import annotations

import platform
from types import ModuleType
from typing import Any, Literal

TensorRTName = Literal["tensorrt", "tensorrt_rtx"]
"""Two products with the same names inside; an engine of one does not run in the other."""

_ADVICE = {
    "tensorrt": "install metaserve[tensorrt] with NVIDIA's own index: "
    "pip install --extra-index-url https://pypi.nvidia.com 'metaserve[tensorrt]'",
    "tensorrt_rtx": "install it with: pip install tensorrt-rtx",
}
# `Severity` counts from internal errors (0) and errors (1) to verbose chatter (4).
_ERROR = 1


def import_tensorrt(name: TensorRTName = "tensorrt") -> ModuleType:
    """Import one of the two libraries; nothing of it is touched yet.

    Raises:
        ImportError: it is missing or broken; the message is one sentence that says what to do.
    """
    try:
        if name == "tensorrt":
            import tensorrt as module
        else:
            import tensorrt_rtx as module
    except (ImportError, OSError) as error:  # OSError: the wrapper is there, its libraries are not
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else "does not load"
        raise ImportError(f"{name} {reason}; {_ADVICE[name]}") from error
    library: ModuleType = module
    return library


def operating_system() -> str:
    """Return what an engine is tied to, for example `linux-x86_64`."""
    return f"{platform.system()}-{platform.machine()}".lower()


def error_log(trt: Any) -> Any:
    """Return a logger of the library that keeps its errors in `errors`, a list of sentences.

    The library raises nothing: what went wrong is said here and nowhere else.
    """

    class ErrorLog(trt.ILogger):  # type: ignore[misc]  # a class of the module passed in
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity.value <= _ERROR:
                self.errors.append(message)

    return ErrorLog()


def first_error(log: Any) -> str:
    """Return the first error that was logged as a part of a sentence; the later ones follow it."""
    errors: list[str] = log.errors
    return errors[0].splitlines()[0].strip() if errors and errors[0].strip() else "no reason given"
