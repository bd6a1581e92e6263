"""Peeking: the pixels that a header states, and never "cheap" for a file that hides work."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from app.images.peek import DECODE_IN_PLACE_PIXELS, is_cheap, pixel_count
from tests.images.files import chunk, encode, jpeg_of_scans, photographs, png, ramp, webp_of_canvas

PEEKED = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
SMALL = {
    "grey png": encode(ramp(32, 32).convert("L"), "PNG"),
    "rgb png": encode(ramp(32, 32), "PNG"),
    "rgba png": encode(ramp(32, 32).convert("RGBA"), "PNG"),
    "palette png": encode(ramp(32, 32).quantize(17), "PNG"),
    "png with a short text": png(
        (1, 1), 8, 0, b"\0\0", chunk(b"tEXt", b"Software\0Matplotlib version 3.11")
    ),
    "jpeg": encode(ramp(32, 32), "JPEG"),
    "grey jpeg": encode(ramp(32, 32).convert("L"), "JPEG"),
    "bmp": encode(ramp(32, 32), "BMP"),
    "webp": encode(ramp(32, 32), "WEBP"),
    "lossless webp": encode(ramp(32, 32), "WEBP", lossless=True),
}


def split_scans(data: bytes) -> bytes:
    """Return the JPEG with a scan header that names one of its three components only."""
    at = data.index(b"\xff\xda")
    return data[:at] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + data[at + 14 :]


COSTLY = {
    "nothing": b"",
    "text": b"hello",
    "gif": encode(ramp(32, 32), "GIF"),
    "tiff": encode(ramp(32, 32), "TIFF"),
    "one row too many": encode(ramp(64, DECODE_IN_PLACE_PIXELS // 64 + 1), "PNG"),
    "many bytes": encode(ramp(32, 32), "PNG") + bytes(20_000),
    "compressed profile": png((1, 1), 8, 0, b"\0\0", chunk(b"iCCP", b"p\0\0" + zlib.compress(b""))),
    "compressed text": png((1, 1), 8, 0, b"\0\0", chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x"))),
    "international text": png((1, 1), 8, 0, b"\0\0", chunk(b"iTXt", b"k\0\1\0\0\0")),
    "long text": png((1, 1), 8, 0, b"\0\0", chunk(b"tEXt", b"k\0" + bytes(5000))),
    "long EXIF in a png": png((1, 1), 8, 0, b"\0\0", chunk(b"eXIf", bytes(5000))),
    "a hundred chunks": png((1, 1), 8, 0, b"\0\0", 100 * chunk(b"tEXt", b"k\0v")),
    "animated png": encode(
        ramp(8, 8), "PNG", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    ),
    "png cut in its header": encode(ramp(32, 32), "PNG")[:20],
    "png cut in its pixels": encode(ramp(32, 32), "PNG")[:100],
    "progressive jpeg": encode(ramp(32, 32), "JPEG", progressive=True),
    "jpeg of many scans": jpeg_of_scans(ramp(32, 32), 50),
    "jpeg of one component a scan": split_scans(encode(ramp(32, 32), "JPEG")),
    "jpeg with long EXIF": encode(ramp(32, 32), "JPEG", exif=b"Exif\0\0" + bytes(5000)),
    "jpeg cut before its pixels": encode(ramp(32, 32), "JPEG")[:300],
    "run-length bmp": encode(ramp(32, 32).convert("L"), "BMP")[:30]
    + struct.pack("<I", 1)
    + bytes(900),
    "animated webp": encode(
        ramp(8, 8), "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8))]
    ),
    "png that inflates to 8 MB of text": png(
        (1, 1), 8, 0, b"\0\0", chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(8_000_000)))
    ),
    "webp of a large canvas": webp_of_canvas(4000, 4000),
}


@settings(max_examples=60, deadline=None)
@given(format=st.sampled_from(PEEKED), width=st.integers(1, 300), height=st.integers(1, 300))
def test_the_pixels_are_those_that_pillow_finds(format: str, width: int, height: int) -> None:
    assert pixel_count(encode(Image.new("RGB", (width, height)), format)) == width * height


def test_the_pixels_of_rarer_headers_are_found() -> None:
    assert pixel_count(webp_of_canvas(321, 45)) == 321 * 45
    assert pixel_count(encode(ramp(31, 7), "WEBP", lossless=True)) == 31 * 7
    assert pixel_count(encode(ramp(40, 30), "JPEG", progressive=True)) == 1200
    assert pixel_count(encode(ramp(40, 30), "JPEG", exif=b"Exif\0\0" + bytes(60_000))) == 1200
    upside_down = bytearray(encode(ramp(40, 30), "BMP"))
    upside_down[22:26] = struct.pack("<i", -30)
    assert pixel_count(bytes(upside_down)) == 1200
    os2 = b"BM" + bytes(8) + struct.pack("<IIHHHH", 26, 12, 5, 4, 1, 24) + bytes(64)
    assert pixel_count(os2) == 20
    with Image.open(BytesIO(os2)) as image:
        assert image.size == (5, 4)


@pytest.mark.parametrize("path", photographs(), ids=lambda path: path.name)
def test_the_pixels_of_photographs_are_found(path: Path) -> None:
    with Image.open(path) as image:
        assert pixel_count(path.read_bytes()) == image.width * image.height


@pytest.mark.parametrize("name", SMALL)
def test_small_plain_files_are_cheap(name: str) -> None:
    assert is_cheap(SMALL[name])


@pytest.mark.parametrize("name", COSTLY)
def test_what_may_hide_work_is_not_cheap(name: str) -> None:
    assert not is_cheap(COSTLY[name])


def test_every_kind_of_picture_of_the_largest_cheap_size_is_cheap() -> None:
    side = int(DECODE_IN_PLACE_PIXELS**0.5)
    noisy = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    assert is_cheap(encode(Image.fromarray(noisy), "PNG"))
    assert is_cheap(encode(Image.fromarray(noisy), "JPEG", quality=90))


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([*SMALL.values(), *COSTLY.values()]),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    st.integers(0, 3000),
)
def test_damaged_bytes_never_raise(data: bytes, damage: list[tuple[int, int]], length: int) -> None:
    hurt = bytearray(data)
    for at, value in damage:
        if at < len(hurt):
            hurt[at] = value
    is_cheap(bytes(hurt))
    assert is_cheap(bytes(hurt[:length])) in (True, False)
