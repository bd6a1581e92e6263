"""Servers for these tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from models.package import Package, open_package
from tests.servers import EMBEDDED
from tests.triton.server import Repository, TritonServer, triton_server
from tests.triton.shared import MODEL, shared_server


@pytest.fixture(scope="session")
def package() -> Package:
    return open_package(EMBEDDED)


@pytest.fixture
def server() -> TritonServer:
    """The shared server; it is to be left as it was."""
    return shared_server()


@pytest.fixture
def mortal(tmp_path: Path) -> Iterator[TritonServer]:
    """A server of the test's own, to be killed, stopped or unloaded."""
    repository = Repository(tmp_path / "models")
    repository.add(MODEL)
    with triton_server(tmp_path, repository) as running:
        yield running
        print(running.log[-3000:])  # pytest shows it where the test failed
