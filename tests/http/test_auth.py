from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from app.main import read_api_keys
from tests.http.wire import Wire, check_error, grey, http
from tests.servers import RunningService, running_service


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    file = tmp_path_factory.mktemp("keys") / "keys.txt"
    file.write_text("# those who may ask\n\n  first-key  \nclé-deux\n", "utf-8")
    with running_service(api_keys_file=file) as running:
        yield running


@pytest.mark.parametrize(
    "headers",
    [
        {b"authorization": b"Bearer first-key"},
        {b"authorization": b"bearer   first-key"},
        {b"x-api-key": b"first-key"},
        {b"authorization": b"Basic Zm9vOmJhcg==", b"x-api-key": b"first-key"},
        {b"x-api-key": "clé-deux".encode()},
    ],
)
def test_a_known_key_is_let_in(guarded: RunningService, headers: dict[bytes, bytes]) -> None:
    assert guarded.client.post("/classify", headers=headers, content=grey(0)).status_code == 200
    assert guarded.client.get("/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"authorization": b"Bearer wrong"},
        {b"authorization": b"Bearer"},
        {b"authorization": b"first-key"},
        {b"authorization": b"Basic first-key"},
        {b"authorization": b"Bearer wrong", b"x-api-key": b"first-key"},
        {b"x-api-key": b"first-ke"},
        {b"x-api-key": b""},
        {b"x-api-key": b"# those who may ask"},
        {b"x-api-key": b"\xff\xfe"},
    ],
)
@pytest.mark.parametrize("path", ["/classify", "/embed", "/models"])
def test_no_key_or_a_wrong_one_is_turned_away(
    guarded: RunningService, path: str, headers: dict[bytes, bytes]
) -> None:
    method = "GET" if path == "/models" else "POST"

    reply = guarded.client.request(method, path, headers=headers)

    check_error(reply, 401, "unauthenticated")
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/startupz", "/metrics", "/docs"])
def test_probes_metrics_and_documentation_need_no_key(guarded: RunningService, path: str) -> None:
    assert guarded.client.get(path).status_code == 200


def test_a_key_is_asked_for_before_anything_else_is_looked_at(guarded: RunningService) -> None:
    reply = guarded.client.post(
        "/classify?top_k=abc", headers={"x-request-timeout-ms": "soon"}, content=b"x"
    )

    check_error(reply, 401, "unauthenticated")


def test_empty_lines_and_comments_are_no_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("#a\n\n b \nc\n")

    keys = read_api_keys(file)

    assert keys is not None
    assert sorted(keys) == ["b", "c"]


def test_a_caller_that_asks_first_without_a_key_never_sends(guarded: RunningService) -> None:
    with guarded.connect() as sock:
        wire = Wire(sock)
        wire.send(http("POST", "/classify", b"x", "Expect: 100-continue")[:-1])

        check_error(wire.read_reply(), 401, "unauthenticated")
        assert wire.read_end() == b""
