"""A missing library is a skip with its reason, and a failure where tests may not skip."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import required

ROOT = Path(__file__).parents[1]


def test_a_module_that_is_there_is_returned() -> None:
    assert required.require("math") is math


def test_a_missing_module_skips_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(required, "skipping_is_allowed", True)
    with pytest.raises(pytest.skip.Exception, match="no_such_library does not import"):
        required.require("no_such_library")


def test_a_missing_module_fails_where_tests_may_not_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(required, "skipping_is_allowed", False)
    with pytest.raises(pytest.fail.Exception, match="no_such_library does not import"):
        required.require("no_such_library")
    with pytest.raises(pytest.fail.Exception, match="no server binary here"):
        required.missing("no server binary here")


def test_the_switch_is_read_once_and_hidden_from_the_service() -> None:
    program = (
        "from tests import required\n"
        "from app.settings import load_settings\n"
        "load_settings()\n"  # refuses METASERVE_ variables it does not know
        "print(required.skipping_is_allowed)\n"
    )
    environment = os.environ | {required.MAY_NOT_SKIP: "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "False\n", done.stderr
