"""An image file -> the network's pixels: decode, then prepare."""

from __future__ import annotations

import math
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
        image, box = decode_image(
            data,
            max_pixels=max_pixels,
            exif_orientation=exif_orientation,
            draft_size=_draft_size(decode, spec),
        )
        if decode == "fast":
            from app.images.fast import prepare_fast

            return prepare_fast(image, spec, box)
        return prepare_image(image, spec, box)
    except MemoryError as error:
        raise Overloaded(
            "the service is short of memory for this image; send it again later"
        ) from error


def _draft_size(decode: Decode, spec: InputSpec) -> int | None:
    """Return half of the shorter side to decode a JPEG at, at least; None for all of it.

    Twice the needed size in `scaled`, one and a half times in `fast`: 12 megapixels for a network
    of 224 then take 1/8 instead of 1/4, which saves a seventh of the time. See docs/decoding.md.
    """
    match decode:
        case "exact":
            return None
        case "scaled":
            return needed_size(spec)
        case "fast":
            return math.ceil(0.75 * needed_size(spec))
