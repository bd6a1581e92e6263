"""Bytes of an image file -> an upright image, RGB or grey, whatever the bytes are; Pillow only.

Two promises: an image that can be read comes out as timm would see it (plain `convert("RGB")`),
except where that would lose what a person sees (orientation, transparency, 16 bits); anything else
raises a member of `InvalidInput`, and does so before memory is spent on it.
"""

from __future__ import annotations

import logging
import re
import warnings
from io import BytesIO
from typing import NamedTuple

import numpy as np
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from app.errors import (
    BadAspect,
    ImageTooLarge,
    InvalidInput,
    UndecodableImage,
    UnsupportedFormat,
)
from app.types import Box, RGBImage

_PLUGINS = (  # imported above, so that Pillow never goes looking for all its forty others
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF") + (
    ("AVIF",) if features.check("avif") else ()
)
"""What is read, by Pillow's names."""

MAX_ASPECT = 50
"""Longer side over shorter. The resize keeps the shape: 10000x1 would become 2240000x224."""

MAX_PIXELS_CEILING = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""The most that `max_pixels` can ask for, 178,956,970: above it Pillow itself refuses.

Pillow's own limit stays as it is. Our check comes first for what `Image.open` reports, but GIF and
WEBP allocate frames while they are being opened, and a GIF of 40 bytes can name one of 4 GiB.
"""

MAX_SCANS = 100
"""Scans of a progressive JPEG. Encoders write about 10. A scan can be 12 bytes long and each walks
over the whole image: 13 ms at 36 megapixels, so a file of 1 MB could take minutes."""

# What is odd about a file is said to its sender, not to our log; Pillow warns about broken EXIF,
# extra animation chunks and anything above half of its pixel limit. Filters belong to the process
# (a `catch_warnings` per image is not safe with threads), hence once, for Pillow's modules only.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

# The pool that calls `decode_image` is the parallelism; AVIF would start a thread per host core.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

_SIGNATURES = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"%PDF", "PDF"),
    (b"8BPS", "PSD"),
    (b"%!PS", "EPS"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\1\0", "ICO"),
)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes it upright. Source: EXIF 2.32, tag 0x0112."""
_LEFT_BECOMES_FAR = (2, 3, 7, 8)  # the stored left is the right or the bottom of what is upright
_TOP_BECOMES_FAR = (3, 4, 6, 7)
_SIDES_SWAP = (5, 6, 7, 8)

_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd8]", re.DOTALL)
"""A JPEG marker that a segment with its length follows, or the end of the image (FF D9)."""

_ORIENTATION = 0x0112
_TILE_WIDTH, _TILE_LENGTH = 322, 323


class Decoded(NamedTuple):
    """An upright image, and the part of it that the file's picture fills.

    Attributes:
        image: its sides are whole numbers.
        box: left, top, right, bottom, in pixels of `image`. A side of 2669 decoded at 1/4 gives 668
            pixels, of which the picture fills 667.25.
    """

    image: RGBImage
    box: Box


def decode_image(
    data: bytes, *, max_pixels: int, exif_orientation: bool, draft_size: int | None
) -> Decoded:
    """Read an image file; of an animation, its first frame.

    Args:
        data: the whole file.
        max_pixels: refuse a larger image, from its header; at most `MAX_PIXELS_CEILING`.
        exif_orientation: turn the image upright. Without, it is as timm sees it: as stored, but
            for TIFF, whose orientation Pillow always applies.
        draft_size: the shorter side that is needed, or None for every pixel. A JPEG at least four
            times as large is then decoded at 1/2, 1/4 or 1/8, never below twice `draft_size`.

    Returns:
        Mode RGB, or L where the file is grey. Transparency is on white, 16 bits are scaled to 8.
        The box is not the whole image only where a reduced size was rounded up.

    Raises:
        UnsupportedFormat: no image, or none of `FORMATS`, or with 32 bits a channel.
        UndecodableImage: damaged or cut short.
        ImageTooLarge: more than `max_pixels`.
        BadAspect: one side more than `MAX_ASPECT` times the other.
        MemoryError: there is no memory for it now.
    """
    kind = _identify(data)
    limit = min(max_pixels, MAX_PIXELS_CEILING)
    try:
        with Image.open(BytesIO(data), formats=(kind,)) as image:
            _check_header(image, limit)
            _check_scans(image, data)
            rawmode, drafted = _rawmode(image), None
            if draft_size is not None and isinstance(image, JpegImagePlugin.JpegImageFile):
                drafted = image.draft("RGB", (2 * draft_size, 2 * draft_size))
            image.load()
            plain = _to_8_bits(image, rawmode)
            filled = drafted[1][2:] if drafted else plain.size
            orientation = _orientation(image) if exif_orientation else 1
            return _upright(plain, filled, orientation)
    except (InvalidInput, MemoryError):  # within `max_pixels` it is our memory that is short
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(_too_large(limit)) from error
    except Exception as error:  # on hostile bytes Pillow's plugins raise almost anything
        raise UndecodableImage(
            f"the {kind} image is damaged, cut short, or of a rare kind; "
            "send the whole file, or save it again as a plain PNG or JPEG"
        ) from error


def _identify(data: bytes) -> str:
    """Return which of `FORMATS` the bytes claim to be; one plugin alone gets to see them."""
    kind = _signature(bytes(data[:1024]))
    if kind in FORMATS:
        return kind
    found = "is empty" if not data else f"is {kind}" if kind else "is in no format that is known"
    raise UnsupportedFormat(f"the image {found}; send it as {', '.join(FORMATS)}")


def _signature(head: bytes) -> str:
    for magic, kind in _SIGNATURES:
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":
        # Brands are a list: a HEIC and an AVIF file may both begin with the brand `mif1`.
        return "AVIF" if b"avi" in head[8:64] else "HEIC or a video"
    return "SVG" if b"<svg" in head else ""


def _check_header(image: ImageFile.ImageFile, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise UndecodableImage("the image has no pixels; send one that has")
    if max(width * height, _tile_pixels(image)) > max_pixels:
        raise ImageTooLarge(f"the image is {width}x{height} pixels; {_too_large(max_pixels)}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadAspect(
            f"the image is {width}x{height} pixels; "
            f"crop it so that no side is more than {MAX_ASPECT} times the other"
        )
    if image.mode in ("I", "F"):
        raise UnsupportedFormat(
            "the image has 32-bit or signed channels, whose range is not known; "
            "save it with 8 or 16 bits a channel"
        )


def _too_large(max_pixels: int) -> str:
    return f"send one of at most {max_pixels} pixels"


def _tile_pixels(image: ImageFile.ImageFile) -> int:
    """Return the pixels of one tile of a TIFF: libtiff allocates it, however small the image."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return 0
    return int(image.tag_v2.get(_TILE_WIDTH, 0)) * int(image.tag_v2.get(_TILE_LENGTH, 0))


def _check_scans(image: ImageFile.ImageFile, data: bytes) -> None:
    """Refuse a progressive JPEG made to take minutes.

    Source: "Two Issues with the JPEG Standard", libjpeg-turbo project, 2018.
    """
    if "progressive" in image.info and _count_scans(data) > MAX_SCANS:
        raise UndecodableImage(
            f"the JPEG image is made of more than {MAX_SCANS} scans; save it again as a plain JPEG"
        )


def _count_scans(data: bytes) -> int:
    """Count start-of-scan markers up to the end of the image; what is appended is not decoded."""
    scans = 0
    marker = _MARKER.search(data, 2)
    while marker and marker[0] != b"\xff\xd9":
        scans += marker[0] == b"\xff\xda"
        length = int.from_bytes(data[marker.end() : marker.end() + 2])
        marker = _MARKER.search(data, marker.end() + length)
    return scans


def _rawmode(image: ImageFile.ImageFile) -> str:
    """Return how samples are packed in the file; Pillow forgets it when it has read them."""
    args = image.tile[0].args if image.tile else ""
    return str(args[0]) if isinstance(args, tuple) else str(args)


def _to_8_bits(image: Image.Image, rawmode: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey_from_16_bits(image, rawmode)
    if image.has_transparency_data:
        return _on_white(image, rawmode)
    return image if image.mode in ("RGB", "L") else image.convert("RGB")


def _grey_from_16_bits(image: Image.Image, rawmode: str) -> Image.Image:
    """Scale 0..65535 to 0..255, where `convert` would clip at 255."""
    values = np.asarray(image)
    transparent = values == image.info.get("transparency", -1)
    if rawmode == "I;12":
        values = (values << 4) | (values >> 8)
    # round(v / 257), kept within 16 bits: what is above 65407 rounds to 255 as 65407 does.
    grey = ((np.minimum(values, 65407) + 128) // 257).astype(np.uint8)
    grey[transparent] = 255
    return Image.fromarray(grey)


def _on_white(image: Image.Image, rawmode: str) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # premultiplied; each converts to its own plain kind only
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    colour = image.info.get("transparency")
    # The transparent colour of a PNG is in the file's bit depth, Pillow's pixels are in 8 bits.
    if rawmode in ("L;2", "L;4") and isinstance(colour, int):
        image.info["transparency"] = colour * {"L;2": 85, "L;4": 17}[rawmode]
    if rawmode == "RGB;16B" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _orientation(source: Image.Image) -> int:
    try:
        return int(source.getexif().get(_ORIENTATION, 1))
    except Exception:  # the pixels are fine; a broken EXIF block is as good as none
        return 1


def _upright(plain: Image.Image, filled: tuple[float, float], orientation: int) -> Decoded:
    """Turn an image whose top left part, `filled` in width and height, is the picture."""
    across, down = (0.0, filled[0]), (0.0, filled[1])
    if orientation not in _UPRIGHT:
        return Decoded(RGBImage(plain), (across[0], down[0], across[1], down[1]))
    if orientation in _LEFT_BECOMES_FAR:
        across = plain.width - filled[0], float(plain.width)
    if orientation in _TOP_BECOMES_FAR:
        down = plain.height - filled[1], float(plain.height)
    if orientation in _SIDES_SWAP:
        across, down = down, across
    turned = plain.transpose(_UPRIGHT[orientation])
    return Decoded(RGBImage(turned), (across[0], down[0], across[1], down[1]))
