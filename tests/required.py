"""What a test cannot run without: elsewhere it skips with the reason, in CI it fails with it."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import NoReturn

import pytest

MAY_NOT_SKIP = "METASERVE_TESTS_MAY_NOT_SKIP"
"""The variable that CI sets to 1: there a missing library is a failure."""

# Taken out of the environment, where the service would refuse it as a setting it does not know;
# conftest.py imports this module before any test runs.
skipping_is_allowed = os.environ.pop(MAY_NOT_SKIP, "0") != "1"


def require(name: str) -> ModuleType:
    """Return a module; without it the test skips, or fails where it may not skip."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(f"{name} does not import: {error}")


def missing(reason: str) -> NoReturn:
    """Skip the test for a reason, or fail it where it may not skip."""
    if skipping_is_allowed:
        pytest.skip(reason)
    pytest.fail(f"{MAY_NOT_SKIP}=1, but {reason}")
