"""An image file -> the network's pixels: decode, then prepare."""

from __future__ import annotations

from typing import Literal

from app.errors import Overloaded, StartupError
from app.images.decode import decode_image
from app.images.prepare import needed_size, prepare_image
from app.types import Pixels
from models.package import InputSpec

Decode = Literal["exact", "scaled", "fast"]


def check_decoder(decode: Decode) -> None:
    """Make sure that images can be read in this mode; called once, before serving.

    Raises:
        StartupError: `fast`, and its library is missing or does not fit this Pillow.
    """
    if decode != "fast":
        return
    try:
        from app.images.fast import agrees_with_pillow
    except ImportError as error:
        raise StartupError(
            "METASERVE_DECODE=fast needs the package cykooz-resizer; "
            "install metaserve[fast], or set METASERVE_DECODE=scaled"
        ) from error
    if not agrees_with_pillow():
        raise StartupError(
            "METASERVE_DECODE=fast: the installed cykooz-resizer cannot read the installed "
            "Pillow's images; install a newer one, or set METASERVE_DECODE=scaled"
        )


def read_image(
    data: bytes,
    spec: InputSpec,
    *,
    max_pixels: int,
    exif_orientation: bool,
    decode: Decode,
) -> Pixels:
    """Read an image file for a network.

    Args:
        data: the whole file.
        spec: what the network takes.
        max_pixels: as `decode_image` has it.
        exif_orientation: likewise.
        decode: `scaled` decodes a JPEG much larger than needed at reduced size; `fast` does so,
            too, and resizes with a SIMD resampler; see docs/decoding.md.

    Returns:
        uint8 (S, S, 3), RGB, C-contiguous, read-only.

    Raises:
        InvalidInput: the image cannot be used; see `decode_image`.
        Overloaded: there is no memory for it now.
    """
    try:
        image = decode_image(
            data,
            max_pixels=max_pixels,
            exif_orientation=exif_orientation,
            draft_size=None if decode == "exact" else needed_size(spec),
        )
        if decode == "fast":
            from app.images.fast import prepare_fast

            return prepare_fast(image, spec)
        return prepare_image(image, spec)
    except MemoryError as error:
        raise Overloaded(
            "the service is short of memory for this image; send it again later"
        ) from error
