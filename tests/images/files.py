"""Image files made by hand, for what Pillow reads and does not write; and shortcuts to Pillow."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import sklearn
from numpy.typing import NDArray
from PIL import Image

from app.images.decode import decode_image
from app.types import RGBImage


def decode(
    data: bytes,
    *,
    max_pixels: int = 40_000_000,
    exif_orientation: bool = True,
    draft_size: int | None = None,
) -> RGBImage:
    image, box = decode_image(
        data, max_pixels=max_pixels, exif_orientation=exif_orientation, draft_size=draft_size
    )
    assert image.mode in ("RGB", "L")
    assert draft_size is not None or box == (0, 0, *image.size)
    return RGBImage(image.convert("RGB"))


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def as_timm(data: bytes) -> NDArray[np.uint8]:
    with Image.open(BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    shape = (height, width) if channels == 1 else (height, width, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def ramp(width: int, height: int) -> Image.Image:
    """Return a smooth picture in which every corner differs."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 / max(width - 1, 1), y * 255 / max(height - 1, 1), 90 + 60 * np.sin(x / 9)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def photographs() -> list[Path]:
    scikit = Path(sklearn.__file__).parent / "datasets" / "images"
    sample = Path(matplotlib.get_data_path()) / "sample_data"
    icons = Path(matplotlib.get_data_path()) / "images"
    found = [
        *scikit.glob("*.jpg"),
        *sample.glob("*.jpg"),
        *sample.glob("*.png"),
        *icons.glob("matplotlib*.png"),
    ]
    assert len(found) >= 4
    return sorted(found)


def chunk(kind: bytes, body: bytes) -> bytes:
    crc = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(
    size: tuple[int, int], depth: int, colour: int, rows: bytes = b"", extra: bytes = b""
) -> bytes:
    """Return a PNG; `rows` are packed and carry their filter byte, `extra` is whole chunks."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + extra
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(
    size: tuple[int, int],
    bits: tuple[int, ...],
    body: bytes,
    *,
    order: str = "<",
    photometric: int = 1,
    deflate: bool = False,
    **tags: int,
) -> bytes:
    """Return a TIFF of one strip; `tags` are further SHORT tags, by `t` and their number."""
    if deflate:
        body = zlib.compress(body)
    entries: dict[int, tuple[int, ...]] = {
        256: (size[0],),
        257: (size[1],),
        258: bits,
        259: (8 if deflate else 1,),
        262: (photometric,),
        273: (8,),
        277: (len(bits),),
        278: (size[1],),
        279: (len(body),),
        **{int(name[1:]): (value,) for name, value in tags.items()},
    }
    body += b"\0" * (len(body) % 2)
    directory = 8 + len(body)
    overflow = directory + 2 + 12 * len(entries) + 4
    table, tail = b"", b""
    for tag, values in sorted(entries.items()):
        value = b"".join(struct.pack(f"{order}I", v) for v in values)
        if len(value) > 4:
            tail, value = tail + value, struct.pack(f"{order}I", overflow + len(tail))
        table += struct.pack(f"{order}HHI", tag, 4, len(values)) + value
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", directory)
    return head + body + struct.pack(f"{order}H", len(entries)) + table + b"\0\0\0\0" + tail


def gif_of_frame(screen: tuple[int, int], frame: tuple[int, int]) -> bytes:
    """Return a GIF whose first frame has any size, to be cleared afterwards, and no pixels."""
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", *screen, 0x80, 0, 0)
        + b"\0\0\0\xff\xff\xff"
        + b"\x21\xf9\x04\x08\0\0\0\0"
        + b","
        + struct.pack("<HHHHB", 0, 0, *frame, 0)
        + b"\x02\x00;"
    )


def webp_of_canvas(width: int, height: int) -> bytes:
    """Return an animation that claims a canvas of any size around frames of 8x8."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:])
    assert data[12:16] == b"VP8X"
    return (
        data[:24]
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
        + data[30:]
    )


def jpeg_of_scans(image: Image.Image, scans: int) -> bytes:
    """Return a progressive JPEG whose last scan is there `scans` times more."""
    data = encode(image.convert("L"), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + data[-2:]


def with_size_in_jpeg_header(data: bytes, width: int, height: int) -> bytes:
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]
