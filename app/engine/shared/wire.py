"""What an HTTP process and the engine process say to each other, byte by byte.

All numbers little-endian. First they meet; the host speaks first, once it is loaded:

    host   -> worker   Hello    "MSEH" | version u32 | clock f64 | bytes u32 | 0 u32 | JSON
    worker -> host     Attach   "MSEW" | version u32 | clock f64 | slots u32 | slot bytes u32
                                and, beside it, the descriptor of the slots (SCM_RIGHTS)
    host   -> worker   Verdict  bytes u32 | why not, UTF-8; no bytes: welcome

Then only messages of 32 bytes, in both directions:

     0      1      2        4        8        16         24         32
     | kind | code | slot   | 0      | id     | first    | second   |
     | u8   | u8   | u16    | u32    | u64    | f64      | f64      |

    worker -> host     SUBMIT   slot, id, first = deadline, second = enqueued at
                       CANCEL   id: its caller left; a hint, the slot still comes back
                       REFUSE   refuse all of this worker's that waits
    host   -> worker   DONE     slot, id, first = queue seconds, second = inference seconds;
                                the row lies in the slot
                       FAILED   slot, id, code = index in ERRORS, first = retry after, seconds;
                                the error's text lies in the slot
                       GONE     slot, id: was cancelled while it waited

Every SUBMIT gets exactly one DONE, FAILED or GONE. Deadlines and clocks are `time.monotonic()`
seconds, which is one clock for all processes of a Linux host, unless a time namespace shifts it:
the host checks that the clock in Attach lies between its own before Hello and after Attach.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError

from app.backends.base import BackendInfo
from app.engine.base import GoldenCheck, Profile
from app.errors import (
    BackendUnavailable,
    DeadlineExceeded,
    Draining,
    InferenceFailed,
    NotReady,
    Overloaded,
    Refused,
    ServiceError,
)

WIRE_VERSION = 1
HEAD = struct.Struct("<4sIdII")
VERDICT = struct.Struct("<I")
MESSAGE = struct.Struct("<BBHIQdd")
HELLO, ATTACH = b"MSEH", b"MSEW"
SUBMIT, CANCEL, REFUSE, DONE, FAILED, GONE = range(1, 7)

# Their order is part of the wire; a new one goes to the end.
ERRORS: tuple[type[ServiceError], ...] = (
    InferenceFailed,
    DeadlineExceeded,
    Overloaded,
    NotReady,
    Draining,
    BackendUnavailable,
)
# A greeting is less than a kilobyte; what claims to be longer is something else.
MAX_TEXT_BYTES = 64 * 1024


class WireError(Exception):
    """The other side said something that cannot be; the message says what."""


@dataclass(frozen=True)
class Greeting:
    """What a host says of itself.

    Attributes:
        package: the key of what is served; a worker serves the same.
        info: what runs the network.
        profile: what warm-up measured.
        golden: how this machine's answers differ from torch in float32; None for a fake.
    """

    package: str
    info: BackendInfo
    profile: Profile
    golden: GoldenCheck | None


_GREETING = TypeAdapter(Greeting)


@dataclass(frozen=True)
class Attach:
    """What a worker says of its slots.

    Attributes:
        clock: its `time.monotonic()`.
        slots: how many.
        slot_bytes: of each.
    """

    clock: float
    slots: int
    slot_bytes: int


def pack_hello(greeting: Greeting, clock: float) -> bytes:
    """Return the bytes of Hello."""
    text = _GREETING.dump_json(greeting)
    return HEAD.pack(HELLO, WIRE_VERSION, clock, len(text), 0) + text


def unpack_hello_head(head: bytes) -> int:
    """Return how many bytes of JSON follow the head of Hello.

    Raises:
        WireError: it is no Hello, or one of another version.
    """
    _, length, _ = _unpack_head(head, HELLO, "engine")
    if length > MAX_TEXT_BYTES:
        raise WireError(f"the engine process announces a greeting of {length} bytes")
    return length


def unpack_greeting(text: bytes) -> Greeting:
    """Return what follows the head of Hello.

    Raises:
        WireError: it is not a greeting.
    """
    try:
        return _GREETING.validate_json(text)
    except ValidationError as error:
        raise WireError(f"the engine process's greeting cannot be read: {error}") from error


def pack_attach(attach: Attach) -> bytes:
    """Return the bytes of Attach."""
    return HEAD.pack(ATTACH, WIRE_VERSION, attach.clock, attach.slots, attach.slot_bytes)


def unpack_attach(head: bytes) -> Attach:
    """Return what a worker says of its slots.

    Raises:
        WireError: it is no Attach, or one of another version.
    """
    return Attach(*_unpack_head(head, ATTACH, "HTTP"))


def pack_verdict(why_not: str = "") -> bytes:
    """Return the bytes of Verdict."""
    text = why_not.encode()[:MAX_TEXT_BYTES]
    return VERDICT.pack(len(text)) + text


def pack_message(
    kind: int, id: int = 0, slot: int = 0, first: float = 0.0, second: float = 0.0, code: int = 0
) -> bytes:
    """Return the 32 bytes of a message."""
    return MESSAGE.pack(kind, code, slot, 0, id, first, second)


def pack_failed(id: int, slot: int, error: ServiceError) -> bytes:
    """Return the bytes of FAILED; an error that callers of an engine do not know is a failure."""
    code = ERRORS.index(type(error)) if type(error) in ERRORS else 0
    retry_after = error.retry_after_seconds if isinstance(error, Refused) else 0.0
    return MESSAGE.pack(FAILED, code, slot, 0, id, retry_after, 0.0)


def error_of(code: int, message: str, retry_after_seconds: float) -> ServiceError:
    """Return the error that a FAILED stands for.

    Raises:
        WireError: there is no such error.
    """
    if code >= len(ERRORS):
        raise WireError(f"there is no error number {code}")
    kind = ERRORS[code]
    if issubclass(kind, Refused):
        return kind(message, retry_after_seconds)
    return kind(message)


def _unpack_head(head: bytes, magic: bytes, who: str) -> tuple[float, int, int]:
    said, version, clock, first, second = HEAD.unpack(head)
    if said != magic:
        raise WireError(f"what connects does not speak like an {who} process of metaserve")
    if version != WIRE_VERSION:
        raise WireError(
            f"the {who} process speaks version {version} of the wire, this one {WIRE_VERSION}; "
            "start both from the same installation"
        )
    return clock, first, second
