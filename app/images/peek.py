"""Bytes of an image file -> how many pixels, and whether reading them is next to nothing.

Headers only, a few microseconds, no Pillow. What is said here is a guess about cost and no
verdict: `decode_image` alone decides what is read and what is refused.
"""

from __future__ import annotations

DECODE_IN_PLACE_PIXELS = 64 * 64
"""Up to here, reading costs about what handing it to a thread and back costs: 40 to 120 us.

That is so for networks whose input is no larger either. To enlarge 32x32 to 224x224 takes 350 us,
so whoever reads in place compares `InputSpec.size` squared with this number as well.
"""

_MAX_BYTES = 16 * 1024  # 64x64 pixels of 8-bit RGBA, not compressed
_MAX_EXTRA_BYTES = 512
"""Bytes of one chunk or segment that is no pixels: texts, EXIF, profiles may hide much work."""
_MAX_PARTS = 16
"""Chunks or segments walked over; Pillow spends microseconds on each."""

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IDAT", b"PLTE", b"tRNS")
# Of these only the length is seen: each may hold a compressed part that grows a thousand times.
_PNG_COMPRESSED = (b"iCCP", b"zTXt", b"iTXt", b"acTL")

_SOF = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF})
_SEQUENTIAL = frozenset({0xC0, 0xC1})
_TABLES = frozenset({0xC4, 0xDB, 0xDD})
_SOS = 0xDA
_MAX_SEGMENTS = 256


def pixel_count(data: bytes) -> int | None:
    """Return width times height as the header of a PNG, JPEG, GIF, BMP or WEBP states them.

    Returns:
        None for other formats, and where the header ends too early or is far from the start.
    """
    if data[:3] == b"\xff\xd8\xff":
        frame = _jpeg_frame(data)
        return frame[1] if frame else None
    if len(data) < 30:
        return None
    if data[:8] == _PNG:
        return _big(data, 16, 4) * _big(data, 20, 4)
    if data[:4] == b"GIF8":
        return _little(data, 6, 2) * _little(data, 8, 2)
    if data[:2] == b"BM":
        return _bmp_pixels(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_pixels(data)
    return None


def is_cheap(data: bytes) -> bool:
    """Return whether an image file is so small and plain that a thread is not worth its while.

    Few pixels alone bound nothing: a profile may inflate to megabytes, a JPEG may hold a thousand
    scans, a GIF a frame larger than its screen. So the file is short, too, and is a PNG, a JPEG of
    one scan, a plain BMP or a plain WEBP, without large or compressed metadata.
    """
    if len(data) > _MAX_BYTES:
        return False
    pixels = pixel_count(data)
    if pixels is None or pixels > DECODE_IN_PLACE_PIXELS:
        return False
    if data[:8] == _PNG:
        return _is_plain_png(data)
    if data[:2] == b"\xff\xd8":
        return _is_plain_jpeg(data)
    if data[:2] == b"BM":
        return _little(data, 30, 4) == 0  # not run-length coded: Pillow does that in Python
    return data[12:16] in (b"VP8 ", b"VP8L")


def _is_plain_png(data: bytes) -> bool:
    at = 8
    for _ in range(_MAX_PARTS):
        length, kind = _big(data, at, 4), data[at + 4 : at + 8]
        if kind == b"IEND":
            return True
        if kind in _PNG_COMPRESSED or (length > _MAX_EXTRA_BYTES and kind not in _PNG_PIXELS):
            return False
        at += 12 + length
    return False


def _is_plain_jpeg(data: bytes) -> bool:
    frame = _jpeg_frame(data)
    if frame is None or frame[0] not in _SEQUENTIAL:
        return False
    components, at = data[frame[2] + 9 : frame[2] + 10], 2
    for _ in range(_MAX_PARTS):
        marker, length = _big(data, at, 2) - 0xFF00, _big(data, at + 2, 2)
        if marker == _SOS:  # all components in one scan: what follows is read once
            return data[at + 4 : at + 5] == components
        if marker < 0xC0:
            return False
        if length > _MAX_EXTRA_BYTES and marker not in _TABLES:
            return False
        at += 2 + length
    return False


def _jpeg_frame(data: bytes) -> tuple[int, int, int] | None:
    """Return the frame header's marker, pixels and place, looked for in the first segments.

    Source: ITU-T T.81, B.2.2.
    """
    at = 2
    for _ in range(_MAX_SEGMENTS):
        if at + 10 > len(data) or data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker in _SOF:
            return marker, _big(data, at + 5, 2) * _big(data, at + 7, 2), at
        if marker == 0xFF:  # fill bytes may stand before a marker
            at += 1
        elif marker == _SOS or marker < 0xC0 or 0xD0 <= marker <= 0xD9:
            return None
        else:
            at += 2 + _big(data, at + 2, 2)
    return None


def _bmp_pixels(data: bytes) -> int:
    if _little(data, 14, 4) == 12:  # the header of OS/2
        return _little(data, 18, 2) * _little(data, 20, 2)
    width = int.from_bytes(data[18:22], "little", signed=True)
    return abs(width * int.from_bytes(data[22:26], "little", signed=True))  # upside down below 0


def _webp_pixels(data: bytes) -> int | None:
    """Return the pixels of the first chunk: a picture, or the canvas of an extended file.

    Source: RFC 9649, sections 2.7, 3.4; RFC 6386, section 9.1.
    """
    kind = data[12:16]
    if kind == b"VP8 ":
        return (_little(data, 26, 2) & 0x3FFF) * (_little(data, 28, 2) & 0x3FFF)
    if kind == b"VP8L":
        sides = _little(data, 21, 4)
        return ((sides & 0x3FFF) + 1) * ((sides >> 14 & 0x3FFF) + 1)
    if kind == b"VP8X":
        return (_little(data, 24, 3) + 1) * (_little(data, 27, 3) + 1)
    return None


def _big(data: bytes, at: int, count: int) -> int:
    return int.from_bytes(data[at : at + count], "big")


def _little(data: bytes, at: int, count: int) -> int:
    return int.from_bytes(data[at : at + count], "little")
