"""Decoding: what a person would see, what timm would see, and nothing but our own errors."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, features

from app.errors import BadAspect, ImageTooLarge, InvalidInput, UndecodableImage, UnsupportedFormat
from app.images.decode import FORMATS, MAX_PIXELS_CEILING, MAX_SCANS
from tests.images.files import (
    as_timm,
    chunk,
    decode,
    encode,
    gif_of_frame,
    jpeg_of_scans,
    noise,
    photographs,
    png,
    ramp,
    tiff,
    webp_of_canvas,
    with_size_in_jpeg_header,
)

# pytest makes every warning an error and puts that before the filter of app/images/decode.py;
# `test_odd_files_say_nothing_to_the_log` asks a process without pytest.
pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")

LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True}}
ORIENTATION = 0x0112


def pixels(image: Image.Image) -> list[list[list[int]]]:
    found: list[list[list[int]]] = np.asarray(image).tolist()
    return found


def greys(image: Image.Image) -> list[int]:
    array = np.asarray(image)
    assert (array[..., 0] == array[..., 1]).all()
    assert (array[..., 0] == array[..., 2]).all()
    found: list[int] = array[..., 0].ravel().tolist()
    return found


# -- formats and modes -----------------------------------------------------------------------------


@pytest.mark.parametrize("format", LOSSLESS)
@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (17, 5), (64, 48)])
def test_lossless_formats_come_out_as_they_went_in(format: str, size: tuple[int, int]) -> None:
    expected = noise(*size)
    image = decode(encode(Image.fromarray(expected), format, **LOSSLESS[format]))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_comes_out_as_timm_sees_it(format: str) -> None:
    data = encode(ramp(61, 40), format)
    np.testing.assert_array_equal(np.asarray(decode(data)), as_timm(data))


@pytest.mark.parametrize("path", photographs(), ids=lambda path: path.name)
def test_photographs_come_out_as_timm_sees_them(path: Path) -> None:
    data = path.read_bytes()
    with Image.open(BytesIO(data)) as image:
        opaque = not image.has_transparency_data
    if opaque:
        np.testing.assert_array_equal(np.asarray(decode(data)), as_timm(data))
    else:
        assert decode(data).mode == "RGB"


OPAQUE: dict[str, bytes] = {
    "L jpeg": encode(ramp(40, 30).convert("L"), "JPEG"),
    "L png": encode(ramp(40, 30).convert("L"), "PNG"),
    "1 png": encode(ramp(40, 30).convert("1"), "PNG"),
    "1 tiff": encode(ramp(40, 30).convert("1"), "TIFF", compression="group4"),
    "P png": encode(ramp(40, 30).quantize(17), "PNG"),
    "P gif": encode(ramp(40, 30).quantize(200), "GIF"),
    "P bmp": encode(ramp(40, 30).quantize(16), "BMP"),
    "CMYK jpeg": encode(ramp(40, 30).convert("CMYK"), "JPEG"),
    "CMYK tiff": encode(ramp(40, 30).convert("CMYK"), "TIFF"),
    "YCbCr tiff": encode(ramp(40, 30).convert("YCbCr"), "TIFF"),
    "YCbCr in libtiff": encode(ramp(40, 30).convert("YCbCr"), "TIFF", compression="jpeg"),
    "LAB tiff": encode(ramp(40, 30).convert("LAB"), "TIFF"),
    "RGBX tiff": encode(ramp(40, 30).convert("RGBX"), "TIFF"),
    "progressive jpeg": encode(ramp(40, 30), "JPEG", progressive=True),
    "2-bit grey png": png((4, 1), 2, 0, b"\0\x1b"),
    "4-bit palette png": png((2, 1), 4, 3, b"\0\x01", chunk(b"PLTE", b"\x09\x08\x07\xff\x00\x01")),
    "16-bit rgb png": png((1, 1), 16, 2, b"\0" + struct.pack(">HHH", 40000, 200, 65535)),
    "16-bit rgb tiff": tiff(
        (1, 1), (16, 16, 16), struct.pack("<HHH", 40000, 200, 65535), photometric=2
    ),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_modes_without_surprises_come_out_as_timm_sees_them(name: str) -> None:
    image = decode(OPAQUE[name])
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), as_timm(OPAQUE[name]))


def test_first_frame_of_an_animation() -> None:
    red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    for format in ("GIF", "WEBP", "PNG", "TIFF", *(["AVIF"] if "AVIF" in FORMATS else [])):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encode(red, format, save_all=True, append_images=[blue], **options)
        colour = pixels(decode(data))[4][4]
        assert np.abs(np.subtract(colour, (255, 0, 0))).max() <= 4, format  # AVIF is lossy


def test_jpeg_with_further_pictures_inside_gives_the_first() -> None:
    data = encode(ramp(600, 400), "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    np.testing.assert_array_equal(np.asarray(decode(data)), as_timm(data))
    assert decode(data, draft_size=100).size == (300, 200)


# -- transparency ----------------------------------------------------------------------------------

SEE_THROUGH = np.array([[[10, 20, 30, 0], [10, 20, 30, 255], [10, 20, 30, 128]]], np.uint8)
ON_WHITE = [[[255, 255, 255], [10, 20, 30], [132, 137, 142]]]


def test_alpha_is_composited_on_white() -> None:
    image = Image.fromarray(SEE_THROUGH)
    assert pixels(decode(encode(image, "PNG"))) == ON_WHITE
    assert pixels(decode(encode(image, "TIFF"))) == ON_WHITE
    assert pixels(decode(encode(image, "WEBP", lossless=True, exact=True))) == ON_WHITE


def test_alpha_equals_the_formula_for_every_value() -> None:
    colour, alpha = (grid.ravel() for grid in np.mgrid[0:256, 0:256])
    rgba = np.stack([colour, 255 - colour, colour, alpha], axis=-1).astype(np.uint8)
    image = decode(encode(Image.fromarray(rgba.reshape(256, 256, 4)), "PNG"))
    expected = (rgba[:, :3] * (alpha / 255)[:, None]) + (255 - alpha)[:, None]
    assert np.abs(np.asarray(image).reshape(-1, 3) - expected).max() <= 0.5


def test_grey_alpha_is_composited_on_white() -> None:
    image = Image.merge("LA", [Image.new("L", (2, 1), 100), Image.new("L", (2, 1), 0)])
    image.putpixel((1, 0), (100, 255))
    assert greys(decode(encode(image, "PNG"))) == [255, 100]
    assert greys(decode(encode(image, "TIFF"))) == [255, 100]


def test_premultiplied_alpha_is_composited_on_white() -> None:
    grey = tiff((3, 1), (8, 8), bytes([0, 0, 50, 128, 100, 255]), t338=1)
    with Image.open(BytesIO(grey)) as image:
        assert image.mode == "La"
    assert np.abs(np.subtract(greys(decode(grey)), [255, 177, 100])).max() <= 1
    colour = tiff((1, 1), (8, 8, 8, 8), bytes([5, 10, 15, 128]), photometric=2, t338=1)
    assert np.abs(np.subtract(pixels(decode(colour))[0][0], [132, 137, 142])).max() <= 1


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [
        (0, [[255, 255, 255], [0, 255, 0], [0, 0, 255]]),
        (2, [[255, 0, 0], [0, 255, 0], [255, 255, 255]]),
        (b"\xff\x00\x80", [[255, 0, 0], [255, 255, 255], [127, 127, 255]]),
        (b"\x00", [[255, 255, 255], [0, 255, 0], [0, 0, 255]]),
    ],
)
def test_palette_transparency_is_white(transparency: object, expected: list[list[int]]) -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    assert pixels(decode(encode(image, "PNG", transparency=transparency))) == [expected]
    if isinstance(transparency, int):
        assert pixels(decode(encode(image, "GIF", transparency=transparency))) == [expected]


def test_palette_with_alpha_is_composited_on_white() -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putdata([(0, 255), (1, 0)])
    data = encode(image, "TIFF")
    with Image.open(BytesIO(data)) as stored:
        assert stored.mode == "PA"
    assert pixels(decode(data)) == [[[255, 0, 0], [255, 255, 255]]]


def test_the_transparent_colour_of_a_png_is_white_in_every_depth() -> None:
    def trns(*values: int) -> bytes:
        return chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))

    assert greys(decode(png((2, 1), 1, 0, b"\0\x40", trns(0)))) == [255, 255]
    assert greys(decode(png((2, 1), 1, 0, b"\0\x40", trns(1)))) == [0, 255]
    assert greys(decode(png((4, 1), 2, 0, b"\0\x1b", trns(2)))) == [0, 85, 255, 255]
    assert greys(decode(png((2, 1), 4, 0, b"\0\x1b", trns(11)))) == [17, 255]
    assert greys(decode(png((2, 1), 8, 0, b"\0\x0b\x0c", trns(12)))) == [11, 255]
    deep = b"\0" + struct.pack(">HHH", 200, 40000, 0)
    assert greys(decode(png((3, 1), 16, 0, deep, trns(40000)))) == [1, 255, 0]
    colours = b"\0" + bytes([9, 8, 7, 9, 8, 6])
    assert pixels(decode(png((2, 1), 8, 2, colours, trns(9, 8, 7)))) == [[[255] * 3, [9, 8, 6]]]
    deep = b"\0" + struct.pack(">6H", 40000, 200, 3, 65535, 65535, 0)
    found = pixels(decode(png((2, 1), 16, 2, deep, trns(40000, 200, 3))))
    assert found == [[[255] * 3, [255, 255, 0]]]


# -- 16 and 32 bits --------------------------------------------------------------------------------

DEEP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
SCALED = np.round(np.arange(65536) / 257).astype(int).tolist()


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.fromarray(DEEP), "PNG"),
        encode(Image.fromarray(DEEP), "TIFF"),
        encode(Image.fromarray(DEEP), "TIFF", compression="tiff_lzw"),
        tiff((256, 256), (16,), DEEP.astype(">u2").tobytes(), order=">"),
        tiff((256, 256), (16,), DEEP.astype(">u2").tobytes(), order=">", deflate=True),
        tiff((256, 256), (16,), DEEP.astype("<u2").tobytes(), deflate=True),
    ],
    ids=["png", "tiff", "tiff-lzw", "tiff-mm", "tiff-mm-deflate", "tiff-ii-deflate"],
)
def test_16_bit_grey_is_scaled_and_rounded(data: bytes) -> None:
    with Image.open(BytesIO(data)) as image:
        assert image.mode.startswith("I;16")
    assert greys(decode(data)) == SCALED


def test_16_bit_grey_with_alpha_is_composited_on_white() -> None:
    rows = b"\0" + struct.pack(">HHHH", 40000, 65535, 40000, 0)
    assert greys(decode(png((2, 1), 16, 4, rows))) == [156, 255]


def test_12_bit_grey_is_scaled() -> None:
    data = tiff((2, 2), (12,), bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x10]))
    assert greys(decode(data)) == [0, 255, 128, 1]


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.new("I", (2, 2), 70000), "TIFF"),
        encode(Image.new("F", (2, 2), 0.5), "TIFF"),
        tiff((1, 1), (16,), b"\x01\x00", t339=2),
    ],
    ids=["integer", "float", "signed"],
)
def test_channels_without_a_known_range_are_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedFormat, match="8 or 16 bits"):
        decode(data)


# -- orientation -----------------------------------------------------------------------------------

UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[ORIENTATION] = orientation
    return block.tobytes()


@pytest.mark.parametrize("format", [name for name in FORMATS if name not in ("GIF", "BMP", "TIFF")])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_is_made_upright(format: str, orientation: int) -> None:
    plain = encode(ramp(48, 32), format)
    stored = np.asarray(decode(plain))
    data = encode(ramp(48, 32), format, exif=exif(orientation))
    np.testing.assert_array_equal(np.asarray(decode(data)), UPRIGHT[orientation](stored))
    as_stored = decode(data, exif_orientation=False)
    np.testing.assert_array_equal(np.asarray(as_stored), as_timm(data))
    np.testing.assert_array_equal(np.asarray(as_stored), stored)


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pillow_always_makes_tiff_upright(orientation: int, compression: str, asked: bool) -> None:
    stored = ramp(48, 32)
    tags = {ORIENTATION: orientation}
    data = encode(stored, "TIFF", tiffinfo=tags, compression=compression)
    expected = UPRIGHT[orientation](np.asarray(stored))
    np.testing.assert_array_equal(np.asarray(decode(data, exif_orientation=asked)), expected)
    np.testing.assert_array_equal(as_timm(data), expected)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_holds_for_scaled_decoding(orientation: int) -> None:
    data = encode(ramp(800, 600), "JPEG", exif=exif(orientation))
    scaled = decode(encode(ramp(800, 600), "JPEG"), draft_size=70)
    assert scaled.size == (200, 150)
    turned = decode(data, draft_size=70)
    np.testing.assert_array_equal(np.asarray(turned), UPRIGHT[orientation](np.asarray(scaled)))


def test_orientation_agrees_with_pillow() -> None:
    data = encode(ramp(48, 32), "JPEG", exif=exif(7))
    with Image.open(BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(expected))


BROKEN_EXIF = {
    "not tiff": b"Exif\0\0nonsense nonsense",
    "empty": b"Exif\0\0",
    "short": b"Exif\0\0II*\0\x08\0",
    "far directory": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "cut entries": b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0",
    "zero": exif(0),
    "nine": exif(9),
    "text": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0",
    "endless": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\xff\xff\xff\xff\0\0\0\0\0\0\0\x08",
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("block", BROKEN_EXIF)
def test_broken_exif_is_ignored(format: str, block: str) -> None:
    data = encode(ramp(48, 32), format, exif=BROKEN_EXIF[block])
    expected = decode(encode(ramp(48, 32), format))
    np.testing.assert_array_equal(np.asarray(decode(data)), np.asarray(expected))


# -- scaled decoding -------------------------------------------------------------------------------


def without_cut(short: int, draft_size: int) -> int:
    return next(scale for scale in (8, 4, 2, 1) if scale == 1 or short >= scale * 2 * draft_size)


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 900),
    height=st.integers(1, 900),
    draft_size=st.integers(1, 300),
    mode=st.sampled_from(["RGB", "L", "CMYK"]),
)
def test_scaled_is_never_below_twice_the_needed_size(
    width: int, height: int, draft_size: int, mode: str
) -> None:
    if max(width, height) > 50 * min(width, height):
        return
    data = encode(ramp(width, height).convert(mode), "JPEG")
    image = decode(data, draft_size=draft_size)
    scale = without_cut(min(width, height), draft_size)
    assert image.size == (-(-width // scale), -(-height // scale))
    assert image.mode == "RGB"
    if scale == 1:
        np.testing.assert_array_equal(np.asarray(image), as_timm(data))
    else:
        assert min(image.size) >= 2 * draft_size


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "JPEG"])
def test_only_jpeg_is_scaled(format: str) -> None:
    data = encode(ramp(300, 200), format)
    np.testing.assert_array_equal(np.asarray(decode(data, draft_size=10)), as_timm(data))


@pytest.mark.parametrize("short", [447, 448, 895, 896, 897])
def test_scaling_begins_at_four_times_the_needed_size(short: int) -> None:
    data = encode(ramp(short + 100, short), "JPEG")
    image = decode(data, draft_size=224)
    assert image.height == (short if short < 896 else -(-short // 2))


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "empty"),
        (b"hello", "no format that is known"),
        (b"%PDF-1.7\n", "PDF"),
        (b'<?xml version="1.0"?><svg xmlns="x"/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"8BPS\0\1", "PSD"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "EPS"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (encode(ramp(8, 8), "PPM"), "no format that is known"),
        (encode(ramp(8, 8), "ICO"), "ICO"),
        (encode(ramp(8, 8), "TGA"), "no format that is known"),
        (encode(ramp(8, 8), "JPEG2000"), "JPEG 2000"),
    ],
)
def test_other_formats_are_named_and_refused(data: bytes, named: str) -> None:
    with pytest.raises(UnsupportedFormat, match=named) as caught:
        decode(data)
    assert all(name in caught.value.message for name in FORMATS)


def test_what_is_inside_a_file_does_not_rename_it() -> None:
    assert decode(encode(ramp(8, 8), "JPEG", comment=b"<svg ftypheic")).size == (8, 8)


def test_avif_is_read_where_pillow_can() -> None:
    assert ("AVIF" in FORMATS) == features.check("avif")


SAMPLES: dict[str, bytes] = {
    "JPEG": encode(ramp(40, 30), "JPEG", exif=exif(6)),
    "progressive": encode(ramp(40, 30), "JPEG", progressive=True),
    "PNG": encode(ramp(40, 30).convert("RGBA"), "PNG", exif=exif(6)),
    "palette": encode(ramp(40, 30).quantize(32), "PNG", transparency=3),
    "GIF": encode(
        ramp(40, 30).quantize(64), "GIF", save_all=True, append_images=[Image.new("P", (40, 30))]
    ),
    "WEBP": encode(ramp(40, 30).convert("RGBA"), "WEBP", exif=exif(6)),
    "lossless": encode(ramp(40, 30), "WEBP", lossless=True),
    "TIFF": encode(ramp(40, 30), "TIFF"),
    "lzw": encode(ramp(40, 30), "TIFF", compression="tiff_lzw"),
    "deep": encode(Image.fromarray(DEEP[:30, :40]), "TIFF", compression="tiff_deflate"),
    "BMP": encode(ramp(40, 30), "BMP"),
    "rle": encode(ramp(40, 30).quantize(16), "BMP"),
    **({"AVIF": encode(ramp(40, 30), "AVIF")} if "AVIF" in FORMATS else {}),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_cut_anywhere_decodes_whole_or_is_refused(name: str) -> None:
    data = SAMPLES[name]
    whole = np.asarray(decode(data))
    step = max(1, len(data) // 200)
    for length in range(0, len(data), step):
        try:
            image = decode(data[:length])
        except (UndecodableImage, UnsupportedFormat) as error:
            assert_speaks_to_people(error)
            known = isinstance(error, UndecodableImage)
            assert known or length < 32
        else:  # only what follows the pixels is missing
            assert image.size == (whole.shape[1], whole.shape[0])
            assert length > len(data) // 2


def assert_speaks_to_people(error: InvalidInput) -> None:
    assert not re.search(r"\b0x[0-9a-f]{4}|PIL|object|\n|Error", error.message)
    assert error.message[0].islower()
    assert not error.message.endswith(".")


@pytest.mark.parametrize("size", [(100, 100), (1, 1), (50, 200)])
def test_the_pixel_limit_is_exact(size: tuple[int, int]) -> None:
    data = encode(Image.new("RGB", size), "PNG")
    assert decode(data, max_pixels=size[0] * size[1]).size == size
    with pytest.raises(ImageTooLarge, match=f"{size[0]}x{size[1]} pixels") as caught:
        decode(data, max_pixels=size[0] * size[1] - 1)
    assert_speaks_to_people(caught.value)


def test_the_pixel_limit_is_that_of_the_whole_image_when_scaled() -> None:
    data = encode(ramp(800, 600), "JPEG")
    with pytest.raises(ImageTooLarge):
        decode(data, max_pixels=479_999, draft_size=10)


@pytest.mark.parametrize("size", [(50, 1), (1, 50), (100, 2), (150, 3)])
def test_fifty_to_one_is_read(size: tuple[int, int]) -> None:
    assert decode(encode(Image.new("RGB", size), "PNG")).size == size


@pytest.mark.parametrize("size", [(51, 1), (1, 51), (101, 2), (10000, 1), (151, 3)])
def test_strips_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(BadAspect, match="crop it") as caught:
        decode(encode(Image.new("RGB", size), "PNG"))
    assert_speaks_to_people(caught.value)


def test_above_pillows_warning_limit_ours_is_the_limit() -> None:
    size = (12000, 8000)  # 96 megapixels: Pillow warns above 89
    assert decode(encode(Image.new("1", size), "PNG"), max_pixels=100_000_000).size == size
    with pytest.raises(ImageTooLarge, match="96000000"):
        decode(png((12000, 8001), 8, 2), max_pixels=96_000_000)
    with pytest.raises(ImageTooLarge, match=str(MAX_PIXELS_CEILING)):
        decode(png((20000, 20000), 8, 2), max_pixels=10**12)


# -- hostile files ---------------------------------------------------------------------------------

BOMBS: dict[str, tuple[bytes, type[InvalidInput]]] = {
    "png header": (png((100_000, 100_000), 8, 6), ImageTooLarge),
    "png of 2 GiB sides": (png((2**31 - 1, 2**31 - 1), 1, 0), ImageTooLarge),
    "png profile": (
        png(
            (1, 1),
            8,
            0,
            b"\0\0",
            chunk(b"iCCP", b"x\0\0" + zlib.compress(b"\0" * 200_000_000)),
        ),
        UndecodableImage,
    ),
    "png text": (
        png((1, 1), 8, 0, b"\0\0", chunk(b"zTXt", b"x\0\0" + zlib.compress(b" " * 200_000_000))),
        UndecodableImage,
    ),
    "gif frame": (gif_of_frame((1, 1), (65535, 65535)), ImageTooLarge),
    "gif screen": (gif_of_frame((65535, 65535), (1, 1)), ImageTooLarge),
    "gif within pillow's limit": (gif_of_frame((1, 1), (13000, 13000)), ImageTooLarge),
    "webp canvas": (webp_of_canvas(2**24, 255), ImageTooLarge),
    "webp within pillow's limit": (webp_of_canvas(13000, 13000), ImageTooLarge),
    "tiff header": (tiff((60000, 60000), (8,), b"\0"), ImageTooLarge),
    "tiff tile": (
        tiff((10, 10), (8,), b"\0", deflate=True, t322=60000, t323=60000, t324=8, t325=9),
        ImageTooLarge,
    ),
    "bmp header": (
        b"BM" + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60000, -60000, 1, 24, 0, 0, 0, 0, 0, 0),
        ImageTooLarge,
    ),
    "jpeg header": (with_size_in_jpeg_header(SAMPLES["JPEG"], 65500, 65500), ImageTooLarge),
    "jpeg scans": (jpeg_of_scans(Image.new("L", (6000, 6000)), 5000), UndecodableImage),
}  # fmt: skip

SCRIPT = """
import re, sys, time
from pathlib import Path
from app.errors import InvalidInput
from app.images.decode import decode_image

def peak_mebibytes():  # not getrusage, which begins with the peak of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

data = sys.stdin.buffer.read()
before, started = peak_mebibytes(), time.monotonic()
try:
    decode_image(data, max_pixels=40_000_000, exif_orientation=True, draft_size=None)
except InvalidInput as error:
    print(type(error).__name__)
spent = time.monotonic() - started
print(spent, peak_mebibytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_in_little_memory_and_time(name: str) -> None:
    data, expected = BOMBS[name]
    child = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=data, capture_output=True, timeout=60, check=True
    )
    kind, figures = child.stdout.decode().splitlines()
    seconds, mebibytes = map(float, figures.split())
    assert kind == expected.__name__
    assert seconds < 2
    # A GIF frame within Pillow's own limit is filled while it is opened.
    assert mebibytes < (190 if name == "gif within pillow's limit" else 16)
    assert child.stderr == b""


def test_scans_are_counted_up_to_the_end_of_the_image() -> None:
    picture = Image.new("L", (64, 64))
    plain = encode(picture, "JPEG", progressive=True)
    assert decode(plain + b"\xff\xda" * 1000).size == (64, 64)
    few = MAX_SCANS - plain.count(b"\xff\xda")
    assert decode(jpeg_of_scans(picture, few)).size == (64, 64)
    with pytest.raises(UndecodableImage, match="scans"):
        decode(jpeg_of_scans(picture, few + 1))


def test_odd_files_say_nothing_to_the_log() -> None:
    script = textwrap.dedent("""
        import logging
        from app.errors import InvalidInput
        from app.images.decode import decode_image
        from tests.images.files import png, tiff, chunk, encode, ramp
        from tests.images.test_decode import BROKEN_EXIF, OPAQUE, SAMPLES
        logging.basicConfig(level="DEBUG")
        odd = [encode(ramp(9, 9), "JPEG", exif=block) for block in BROKEN_EXIF.values()]
        odd.append(png((1, 1), 8, 0, b"\\0\\0", chunk(b"acTL", b"\\0" * 8)))
        odd.append(png((11000, 9000), 8, 0))
        odd.append(tiff((1, 1), (8,) * 99, b"\\0" * 99))
        odd.append(tiff((64, 64), (8,), b"damaged"))
        # libtiff itself writes one line to stderr about damaged compressed data; not Pillow's.
        odd += [data[: len(data) * 3 // 4] for name, data in SAMPLES.items() if name != "deep"]
        for data in odd:
            try:
                decode_image(data, max_pixels=10**8, exif_orientation=True, draft_size=None)
            except InvalidInput:
                pass
    """)
    child = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], capture_output=True, timeout=60
    )
    assert (child.returncode, child.stderr.decode()) == (0, "")


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_decode_or_are_refused(data: bytes) -> None:
    decode_or_refuse(data)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from([data[:16] for data in SAMPLES.values()]),
    st.binary(max_size=300),
)
def test_any_bytes_behind_a_signature_decode_or_are_refused(head: bytes, tail: bytes) -> None:
    decode_or_refuse(head + tail)


@pytest.mark.parametrize("name", SAMPLES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4), st.integers(0, 6)), max_size=8)
)
def test_mutated_files_decode_or_are_refused(
    name: str, edits: list[tuple[float, bytes, int]]
) -> None:
    data = SAMPLES[name]
    for where, new, removed in edits:
        # The cube prefers the beginning, where the headers are.
        position = int(where**3 * len(data))
        data = data[:position] + new + data[position + removed :]
    decode_or_refuse(data)


@pytest.mark.parametrize("name", SAMPLES)
def test_flipped_bytes_decode_or_are_refused(name: str) -> None:
    draw = np.random.default_rng(7)
    for _ in range(300):
        data = bytearray(SAMPLES[name])
        for _ in range(int(draw.integers(1, 6))):
            data[int(draw.integers(0, min(len(data), 400)))] = int(draw.integers(0, 256))
        decode_or_refuse(bytes(data))


def decode_or_refuse(data: bytes) -> None:
    try:
        image = decode(data, max_pixels=2_000_000, draft_size=16)
    except InvalidInput as error:
        assert_speaks_to_people(error)
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= 2_000_000
