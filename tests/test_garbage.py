"""What the start made is out of the garbage collector's sight once the model is loaded."""

from __future__ import annotations

import gc
import socket
from collections.abc import Iterator

import pytest

from app import main
from app.garbage import keep_all_for_good
from app.http.app import create_app
from app.server import Server
from app.settings import load_settings


@pytest.fixture
def thawed() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_what_is_left_is_never_looked_at_again() -> None:
    keep_all_for_good()
    assert gc.get_freeze_count() > 1000
    assert len(gc.get_objects()) < gc.get_freeze_count()


@pytest.mark.usefixtures("thawed")
def test_it_happens_when_the_model_is_loaded_and_before_the_service_is_ready() -> None:
    state = main.build_state(load_settings({}))
    server = Server(create_app(state), state)
    frozen_before_ready: list[int] = []

    def announce() -> None:
        frozen_before_ready.append(gc.get_freeze_count())
        server.stop()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        main.load_and_run(server, listener, lambda: main.load_model(state), announce)
    (count,) = frozen_before_ready
    assert count > 1000
