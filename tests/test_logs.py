from __future__ import annotations

import io
import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from app.logs import BackgroundHandler, JsonFormatter, TextFormatter, configure_logs
from tests.http.wire import grey, parts
from tests.servers import RunningService, running_service, service_process


def record(message: str = "request", **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("metaserve.access", logging.INFO, __file__, 1, message, (), None)
    made.fields = fields
    return made


@pytest.fixture
def restored_logging() -> Iterator[None]:
    """Leave the process's logging as it was found."""
    root = logging.getLogger()
    names = ("uvicorn.error", "asyncio", "python_multipart")
    handlers, level = root.handlers[:], root.level
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


# One line a request.


@pytest.fixture(scope="module")
def service() -> Iterator[RunningService]:
    with running_service() as running:
        yield running


Fields = list[dict[str, Any]]


@pytest.fixture
def fields_of(
    service: RunningService, caplog: pytest.LogCaptureFixture
) -> Callable[[Callable[[httpx.Client], object]], Fields]:
    """Return what the access log says of what a function does with a client."""

    def collect(act: Callable[[httpx.Client], object]) -> Fields:
        def lines() -> Fields:
            return [vars(one)["fields"] for one in caplog.records if one.name == "metaserve.access"]

        with caplog.at_level(logging.INFO, "metaserve.access"):
            caplog.clear()
            act(service.client)
            # The line is written after the reply: a later request on the loop comes after it.
            service.client.get("/end")
            service.wait_until(lambda: any(f["path"] == "/end" for f in lines()), "all is logged")
            return [fields for fields in lines() if fields["path"] != "/end"]

    return collect


def test_a_request_is_one_line_with_its_fields(
    fields_of: Callable[[Callable[[httpx.Client], object]], Fields],
) -> None:
    image = grey(0)

    (fields,) = fields_of(
        lambda client: client.post(
            "/classify?top_k=1", content=image, headers={"x-request-id": "mine"}
        )
    )

    expected = {"request_id": "mine", "method": "POST", "path": "/classify", "status": 200}
    expected |= {"received_bytes": len(image), "client": "127.0.0.1", "images": 1}
    assert {key: fields[key] for key in expected} == expected
    stages = fields["decode_ms"] + fields["queue_ms"] + fields["inference_ms"]
    assert 0 < stages <= fields["duration_ms"]
    assert set(fields) == set(expected) | {
        "duration_ms",
        "decode_ms",
        "queue_ms",
        "inference_ms",
    }


def test_behind_a_trusted_proxy_the_line_names_the_caller_and_not_the_proxy(
    fields_of: Callable[[Callable[[httpx.Client], object]], Fields],
) -> None:
    def ask(client: httpx.Client) -> None:
        for headers in ({"x-forwarded-for": "203.0.113.7"}, {}):
            client.post("/classify", content=grey(0), headers=headers)

    proxied, direct = fields_of(ask)

    assert (proxied["client"], direct["client"]) == ("203.0.113.7", "127.0.0.1")


def test_several_images_are_still_one_line(
    fields_of: Callable[[Callable[[httpx.Client], object]], Fields],
) -> None:
    (fields,) = fields_of(
        lambda client: client.post("/embed", files=parts(grey(0), b"no image", grey(1)))
    )

    assert (fields["images"], fields["status"]) == (3, 200)


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("POST", "/classify", 415, "unsupported_format"),
        ("POST", "/classify?top_k=0", 400, "bad_request"),
        ("GET", "/nope", 404, "not_found"),
        ("GET", "/classify", 405, "method_not_allowed"),
    ],
)
def test_an_error_is_one_line_with_its_code(
    fields_of: Callable[[Callable[[httpx.Client], object]], Fields],
    method: str,
    path: str,
    status: int,
    code: str,
) -> None:
    (fields,) = fields_of(lambda client: client.request(method, path, content=b"no image"))

    assert (fields["status"], fields["error"]) == (status, code)


def test_probes_that_go_well_are_quiet(
    fields_of: Callable[[Callable[[httpx.Client], object]], Fields],
) -> None:
    def probe(client: httpx.Client) -> None:
        for path in ("/livez", "/readyz", "/startupz", "/metrics"):
            assert client.get(path).status_code == 200

    assert fields_of(probe) == []


def test_a_probe_that_fails_is_heard(
    service: RunningService, fields_of: Callable[[Callable[[httpx.Client], object]], Fields]
) -> None:
    service.state.draining = True
    try:
        (fields,) = fields_of(lambda client: client.get("/readyz"))
    finally:
        service.state.draining = False

    assert (fields["path"], fields["status"], fields["error"]) == ("/readyz", 503, "draining")


def test_probes_are_heard_when_debugging(
    service: RunningService, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "metaserve.access"):
        service.client.get("/livez", headers={"x-request-id": "probe"})
        service.wait_until(lambda: "probe" in str([vars(r) for r in caplog.records]), "it is heard")


def test_a_process_writes_one_json_object_a_request() -> None:
    with service_process() as process:
        for index in range(3):
            httpx.post(
                f"{process.url}/classify",
                content=grey(index),
                headers={"x-request-id": f"number-{index}"},
                trust_env=False,
            )
        broken = {"content-type": "multipart/form-data; boundary=x"}
        reply = httpx.post(f"{process.url}/classify", content=b"x", headers=broken, trust_env=False)
        assert reply.status_code == 400
        httpx.get(f"{process.url}/livez", trust_env=False)
        httpx.get(f"{process.url}/%0a%1b[31mred%00", trust_env=False)
        process.process.terminate()
        process.wait_for_log("stopped")
        process.wait_exit()
        records, lines = process.records, process.lines

    assert len(records) == len(lines), "a line is no JSON object"
    requests = [one for one in records if one["logger"] == "metaserve.access"]
    assert [(one["path"], one["status"]) for one in requests] == [
        *[("/classify", 200)] * 3,
        ("/classify", 400),
        ("/\n\x1b[31mred\0", 404),
    ]
    assert [one["request_id"] for one in requests[:3]] == ["number-0", "number-1", "number-2"]
    for one in records:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", one["time"])
        assert one["level"] in ("info", "warning")
    assert not [one for one in records if one["logger"].startswith("python_multipart")]


# The two forms.


@given(st.text(max_size=50), st.text(max_size=50))
@example("/\n21:00:00.000 info forged", "")
@example("/\x1b[2J\r\u2028\x85", "\u202e")
@example("/\ud800", "\udfff")
def test_text_cannot_be_broken_by_what_a_caller_sent(path: str, client: str) -> None:
    line = TextFormatter().format(record(path=path, client=client, status=404))

    assert line.isprintable()
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} info request path=.* client=.* status=404", line)


def test_a_space_in_a_path_cannot_forge_a_field() -> None:
    line = TextFormatter().format(record(path="/x status=200", status=404))

    assert line.endswith("info request path='/x status=200' status=404")


def test_text_leaves_out_what_is_not_known() -> None:
    assert TextFormatter().format(record(client=None, status=200)).endswith("request status=200")


@given(st.text(max_size=50), st.text(max_size=50))
@example("\ud800", "line\nbreak")
def test_json_holds_whatever_was_sent_in_one_line(message: str, path: str) -> None:
    line = JsonFormatter().format(record(message.replace("%", "%%"), path=path, big=1 << 70))

    assert len(line.splitlines()) == 1 or "\u2028" in line or "\x85" in line or "\u2029" in line
    assert "\n" not in line
    content = json.loads(line)
    assert (content["path"], content["level"]) == (path, "info")
    assert content["logger"] == "metaserve.access"


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()])
def test_an_exception_is_told_with_its_trace(formatter: logging.Formatter) -> None:
    failed = record("it failed")
    try:
        raise ValueError("the reason")
    except ValueError:
        failed.exc_info = sys.exc_info()

    told = formatter.format(failed)

    assert "ValueError: the reason" in told
    assert "test_logs.py" in told


@pytest.mark.usefixtures("restored_logging")
@pytest.mark.parametrize(
    ("log_format", "is_json"), [("auto", True), ("json", True), ("text", False)]
)
def test_auto_is_json_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], log_format: Any, is_json: bool
) -> None:
    configure_logs("info", log_format)

    logging.getLogger("metaserve").info("hello %s", "world")
    logging.getLogger("metaserve").debug("too quiet")
    logging.root.handlers[0].flush()

    written = capsys.readouterr()
    assert written.out == ""
    (line,) = written.err.splitlines()
    assert "hello world" in line
    assert line.startswith("{") is is_json


class GatedStream(io.StringIO):
    """A stream in memory whose reader may have stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.reader = threading.Event()

    def write(self, text: str) -> int:
        assert self.reader.wait(20), "the stream's reader never came back"
        return super().write(text)


def test_lines_beyond_the_capacity_are_dropped_counted_and_said_as_a_line_like_others() -> None:
    stream = GatedStream()
    handler = BackgroundHandler(stream, capacity=2)
    handler.setFormatter(JsonFormatter())
    for index in range(10):  # nobody reads, and nobody waits
        handler.emit(record(f"line {index}"))
    stream.reader.set()
    handler.flush()
    handler.emit(record("the last"))
    handler.close()

    messages = [json.loads(line)["message"] for line in stream.getvalue().splitlines()]
    *early, said, last = messages
    assert last == "the last"
    assert 2 <= len(early) <= 3
    assert said == f"{10 - len(early)} log lines were dropped: their reader did not keep up"
