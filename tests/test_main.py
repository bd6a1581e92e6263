"""The composition root: what it started it stops again when a start fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import app.assemble
from app.backends.base import Backend
from app.main import build_state, load_model
from app.settings import Settings
from models.package import PackageError
from tests.servers import WatchedBackend, fake_backend


def test_a_backend_that_fails_the_golden_check_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = fake_backend()
    inner.info = replace(inner.info, runs_package=True)
    backend = WatchedBackend(inner)

    def select_backend(*_: object) -> Backend:
        return backend

    monkeypatch.setattr(app.assemble, "select_backend", select_backend)
    defaults: dict[str, Any] = {}
    state = build_state(Settings(**defaults))
    with pytest.raises(PackageError, match="does not reproduce the golden outputs"):
        load_model(state)
    assert backend.closed
