"""An image file -> the network's pixels: decode, then prepare."""

from __future__ import annotations

from typing import Literal

from app.errors import Overloaded
from app.images.decode import decode_image
from app.images.prepare import needed_size, prepare_image
from app.types import Pixels
from models.package import InputSpec


def read_image(
    data: bytes,
    spec: InputSpec,
    *,
    max_pixels: int,
    exif_orientation: bool,
    decode: Literal["scaled", "exact"],
) -> Pixels:
    """Read an image file for a network.

    Args:
        data: the whole file.
        spec: what the network takes.
        max_pixels: as `decode_image` has it.
        exif_orientation: likewise.
        decode: `scaled` decodes a JPEG much larger than needed at reduced size.

    Returns:
        uint8 (S, S, 3), RGB, C-contiguous.

    Raises:
        InvalidInput: the image cannot be used; see `decode_image`.
        Overloaded: there is no memory for it now.
    """
    try:
        image = decode_image(
            data,
            max_pixels=max_pixels,
            exif_orientation=exif_orientation,
            draft_size=needed_size(spec) if decode == "scaled" else None,
        )
        return prepare_image(image, spec)
    except MemoryError as error:
        raise Overloaded(
            "the service is short of memory for this image; send it again later"
        ) from error
