"""The end of a process in which native code may still run."""

from __future__ import annotations

import logging
import os
import threading


def end_in_spite_of_threads() -> None:
    """End the process now, with 0, if native code still runs in a thread of ours."""
    if any(thread.name.startswith(("load", "engine-", "cpu")) for thread in threading.enumerate()):
        # Still loading, a batch that hangs, a long decode: their native code must not meet an
        # interpreter that is being taken down.
        logging.shutdown()
        os._exit(0)
