"""The hot routes and what FastAPI says and does of them cannot disagree."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from app.http.app import create_api
from app.http.body import LimitBody
from app.http.middleware import ObserveRequests
from app.http.protocol import protocol_class
from app.http.routes import HOT
from tests.http.wire import encode, grey, parts, picture, text
from tests.servers import WAIT_SECONDS, RunningService, running_service, wait_until

BROKEN = b"no image"
JPEG = encode(picture(), "JPEG")


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service(
        api_keys=frozenset({"key"}), max_images=4, body_limit_bytes=100_000
    ) as running:
        yield running


@contextmanager
def slow_way(service: RunningService) -> Iterator[httpx.Client]:
    """Serve the same state without the hot routes: FastAPI routes, validates and answers."""
    state = service.state
    app = ObserveRequests(LimitBody(create_api(state), state), state)
    config = uvicorn.Config(
        app, http=protocol_class(30.0), ws="none", lifespan="off", log_config=None
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), name="slow way", daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, "FastAPI's own way is served")
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=WAIT_SECONDS, trust_env=False) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(WAIT_SECONDS)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def slow(service: RunningService) -> Iterator[httpx.Client]:
    with slow_way(service) as client:
        yield client


def comparable(reply: httpx.Response) -> tuple[int, dict[str, str], Any]:
    """Return what two answers to one request have in common."""
    headers = {name: reply.headers[name] for name in reply.headers if name not in VARYING}
    if reply.headers["content-type"] != "application/json":
        return reply.status_code, headers, reply.content
    content = reply.json()
    for result in content.get("results", [content]):
        result.pop("timing_ms", None)
    content.pop("request_id", None)
    return reply.status_code, headers, content


VARYING = {"date", "server", "x-request-id", "content-length"}
KEY = {"authorization": "Bearer key"}
OCTETS = KEY | {"accept": "application/octet-stream"}


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        ("/classify", {"content": grey(0)}),
        ("/classify?top_k=3", {"content": JPEG}),
        ("/classify?top_k=100", {"files": parts(grey(0), JPEG, BROKEN)}),
        ("/classify", {"json": {"image": text(grey(9))}}),
        ("/classify", {"json": {"images": [text(grey(9)), "%"]}}),
        ("/embed", {"content": grey(255)}),
        ("/embed?normalize=true&encoding=base64", {"content": JPEG}),
        ("/embed?normalize=1", {"content": grey(3), "headers": OCTETS}),
        ("/embed", {"files": parts(grey(1), grey(2)), "headers": OCTETS}),
        ("/classify", {"content": grey(0), "headers": {}}),
        ("/classify?top_k=0", {"content": grey(0), "headers": {}}),
        ("/classify", {"content": b""}),
        ("/classify", {"content": BROKEN}),
        ("/classify", {"content": b"x" * 100_001}),
        ("/classify", {"files": parts(*[grey(0)] * 5)}),
        ("/classify", {"content": b"{", "headers": KEY | {"content-type": "application/json"}}),
        ("/classify?x=1", {"content": grey(0), "headers": KEY | {"x-request-timeout-ms": "x"}}),
        ("/embed", {"content": grey(0), "headers": KEY | {"x-request-timeout-ms": "0.000001"}}),
    ],
)
def test_both_ways_give_the_same_answer(
    service: RunningService, slow: httpx.Client, path: str, request_: dict[str, Any]
) -> None:
    request_ = {"headers": KEY} | request_

    hot = comparable(service.client.post(path, **request_))

    assert hot == comparable(slow.post(path, **request_))


NAMES = ["top_k", "normalize", "encoding", "TOP_K", "top_k[]", "x", "", "%74op_k", "a+b"]
VALUES = ["1", "5", "0", "-1", "1e3", "٣", "9" * 5000, "float", "base64", "true", "no", "", "%00"]
VALUES += ["+1", " 2", "2.0", "2.5", "%ff", "on", "FLOAT", "1;top_k=2", "a=b"]


@given(
    path=st.sampled_from(sorted(HOT)),
    pairs=st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=3),
    tail=st.sampled_from(["", "&", "?", "&&x", "#x"]),
)
@example(path="/classify", pairs=[("top_k", "0"), ("top_k", "3")], tail="")
@example(path="/classify", pairs=[("x", "0"), ("top_k", "a")], tail="")
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_both_ways_read_a_query_alike_and_refuse_it_in_the_same_words(
    service: RunningService,
    slow: httpx.Client,
    path: str,
    pairs: list[tuple[str, str]],
    tail: str,
) -> None:
    query = "&".join(f"{name}={value}" for name, value in pairs) + tail
    url = f"{path}?{query}"

    hot = service.client.post(url, content=grey(0, side=4), headers=KEY)

    assert comparable(hot) == comparable(slow.post(url, content=grey(0, side=4), headers=KEY))


def test_every_hot_route_is_documented_with_its_own_parameters(service: RunningService) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]

    for path, route in HOT.items():
        fields = route.query.model_json_schema()["properties"]
        documented = {one["name"]: one for one in paths[path]["post"]["parameters"]}
        assert set(documented) == set(fields)
        for name, field in fields.items():
            schema = documented[name]["schema"]
            for key in ("type", "minimum", "enum", "default"):
                assert schema.get(key) == field.get(key), f"{path} {name} {key}"
            assert documented[name]["in"] == "query"
            assert documented[name]["required"] is False
        assert paths[path]["post"]["description"].split() == (route.answer.__doc__ or "").split()


def test_another_method_than_post_goes_to_the_router(service: RunningService) -> None:
    for path in HOT:
        reply = service.client.get(path)
        assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
