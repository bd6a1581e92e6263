"""Which heads of requests are refused; llhttp, the parser, is strict about the rest.

It refuses by itself a length beside `Transfer-Encoding`, a second length, a bare line feed, a
folded line, a NUL: whatever two readers could take for two different requests.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 256
MAX_URL_BYTES = 16 * 1024


class BadHead(Exception):
    """The head of a request breaks a bound or a rule; whoever sent it is told so and cut off."""


def check_head(
    method: bytes, version: str, url: bytes, headers: Sequence[tuple[bytes, bytes]]
) -> None:
    """Refuse what is no HTTP/1.1 or HTTP/1.0 request.

    Args:
        method: as sent.
        version: `1.1` or another.
        url: as sent.
        headers: names in lower case.

    Raises:
        BadHead: too large, of another version, without its one host, or framed ambiguously.
    """
    names = [name for name, _ in headers]
    size = len(url) + sum(map(len, names)) + sum([len(value) for _, value in headers])
    if size > MAX_HEAD_BYTES or method == b"CONNECT":
        raise BadHead
    hosts = names.count(b"host")
    if version == "1.1":
        if hosts != 1:
            raise BadHead
    elif version != "1.0" or hosts > 1 or b"transfer-encoding" in names:
        raise BadHead
