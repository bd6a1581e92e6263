"""One server for every test that leaves it as it found it."""

from __future__ import annotations

import atexit
import tempfile
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from tests.triton.server import Repository, TritonServer, triton_server

MODEL = "caformer_digits"
GATED = "gated"
MAX_BATCH_SIZE = 8


@cache
def shared_server() -> TritonServer:
    """Return the server, started with the first call and ended with the test run.

    It serves the embedded package as `MODEL`, and as `GATED` behind `gate()`.
    """
    stack = ExitStack()
    atexit.register(stack.close)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="metaserve-triton-")))
    repository = Repository(folder / "models")
    repository.add(MODEL, max_batch_size=MAX_BATCH_SIZE)
    repository.add(GATED, gate=folder / "gate", max_queue_size=4)
    return stack.enter_context(triton_server(folder, repository))


def gate() -> Path:
    """Return the file without which `GATED` answers nothing."""
    return shared_server().folder / "gate"
