"""The messages: what goes in comes out, what cannot be is refused in words."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
from hypothesis import given

from app.engine.base import GoldenCheck, Profile
from app.engine.shared import wire
from app.errors import (
    BadRequest,
    DeadlineExceeded,
    InferenceFailed,
    Overloaded,
    Refused,
    ServiceError,
)
from tests.engine.doubles import WatchedBackend

times = st.floats(allow_nan=False)
INFO = WatchedBackend().info
GREETING = wire.Greeting("a key", INFO, Profile({1: 0.25, 8: 1.5}, 8, 2), GoldenCheck(1e-6, 0.0))


@given(
    kind=st.integers(1, 6),
    id=st.integers(0, 2**64 - 1),
    slot=st.integers(0, 2**16 - 1),
    first=times,
    second=times,
    code=st.integers(0, 255),
)
def test_a_message_comes_out_as_it_went_in(
    kind: int, id: int, slot: int, first: float, second: float, code: int
) -> None:
    message = wire.pack_message(kind, id, slot, first, second, code)
    assert len(message) == 32
    assert wire.MESSAGE.unpack(message) == (kind, code, slot, 0, id, first, second)


@given(st.sampled_from(wire.ERRORS), st.text(), st.floats(0, 1e9), st.integers(0, 2**64 - 1))
def test_an_error_crosses_as_the_same_class(
    kind: type[ServiceError], text: str, retry_after: float, id: int
) -> None:
    error = kind(text, retry_after) if issubclass(kind, Refused) else kind(text)
    found = wire.MESSAGE.unpack(wire.pack_failed(id, 3, error))
    _, code, slot, _, found_id, first, _ = found
    crossed = wire.error_of(code, text, first)
    assert (type(crossed), crossed.message, slot, found_id) == (kind, text, 3, id)
    if isinstance(error, Refused):
        assert isinstance(crossed, Refused)
        assert crossed.retry_after_seconds == error.retry_after_seconds


def test_the_numbers_of_errors_are_those_of_version_1() -> None:
    assert wire.WIRE_VERSION == 1
    assert wire.ERRORS[:3] == (InferenceFailed, DeadlineExceeded, Overloaded)
    assert wire.MESSAGE.unpack(wire.pack_failed(1, 0, BadRequest("no image")))[1] == 0
    with pytest.raises(wire.WireError, match="no error number 250"):
        wire.error_of(250, "", 0.0)


def test_a_greeting_comes_out_as_it_went_in() -> None:
    for greeting in (GREETING, dataclasses.replace(GREETING, golden=None)):
        data = wire.pack_hello(greeting, 12.5)
        head, text = data[: wire.HEAD.size], data[wire.HEAD.size :]
        assert wire.unpack_hello_head(head) == len(text)
        assert wire.unpack_greeting(text) == greeting


def test_an_attach_comes_out_as_it_went_in() -> None:
    attach = wire.Attach(1.5, 200, 150_528)
    assert wire.unpack_attach(wire.pack_attach(attach)) == attach


def test_another_version_is_refused_in_words() -> None:
    head = wire.HEAD.pack(wire.ATTACH, 7, 0.0, 1, 1)
    with pytest.raises(wire.WireError, match="HTTP process speaks version 7 of the wire"):
        wire.unpack_attach(head)
    head = wire.HEAD.pack(wire.HELLO, 7, 0.0, 1, 0)
    with pytest.raises(wire.WireError, match="start both from the same installation"):
        wire.unpack_hello_head(head)


@pytest.mark.parametrize(
    "head", [b"GET / HTTP/1.1\r\nHost: ".ljust(wire.HEAD.size), bytes(wire.HEAD.size)]
)
def test_something_else_that_connects_is_refused_in_words(head: bytes) -> None:
    with pytest.raises(wire.WireError, match="does not speak like an HTTP process"):
        wire.unpack_attach(head)


def test_a_greeting_that_is_too_long_or_no_greeting_is_refused() -> None:
    with pytest.raises(wire.WireError, match="greeting of 4000000 bytes"):
        wire.unpack_hello_head(wire.HEAD.pack(wire.HELLO, 1, 0.0, 4_000_000, 0))
    with pytest.raises(wire.WireError, match="cannot be read"):
        wire.unpack_greeting(b'{"info": {"name": "fake"}}')
