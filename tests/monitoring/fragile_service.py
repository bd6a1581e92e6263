"""`metaserve` whose fake backend fails on every batch that holds a black image."""

from __future__ import annotations

import math
import sys

from app.backends.fake import FakeBackend
from app.cli import main
from app.types import Batch, Rows

_run = FakeBackend.run


def run_unless_black(self: FakeBackend, batch: Batch, deadline: float = math.inf) -> Rows:
    """Answer as the fake backend does, or fail."""
    if not batch.any(axis=(1, 2, 3)).all():
        raise RuntimeError("a black image")
    return _run(self, batch, deadline)


if __name__ == "__main__":
    FakeBackend.run = run_unless_black  # type: ignore[method-assign]
    sys.exit(main())
