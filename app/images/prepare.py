"""An RGB image -> the network's input pixels, bit-identical to timm's evaluation transform."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image

from app.types import Pixels, RGBImage
from models.package import InputSpec

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


def needed_size(spec: InputSpec) -> int:
    """Return the shorter side that an image is resized to before the crop.

    Source: timm/data/transforms_factory.py, `transforms_imagenet_eval`, `scale_size`.
    """
    return math.floor(spec.size / spec.crop_pct)


def prepare_image(image: RGBImage, spec: InputSpec) -> Pixels:
    """Resize the shorter side, then crop the centre.

    Args:
        image: any size; the caller bounds the aspect ratio, which the resize keeps.
        spec: side, crop and filter.

    Returns:
        uint8 (S, S, 3), RGB, 0..255, C-contiguous, writable, owning its memory.

    Source: timm's transform is torchvision's `Resize` and `CenterCrop` on a Pillow image.
    """
    size = _resized(image.size, needed_size(spec))
    resized = image if size == image.size else image.resize(size, _FILTERS[spec.interpolation])
    left, top = (_offset(extent, spec.size) for extent in size)
    # Pillow crops faster than NumPy packs, so only the crop is unpacked. `array`, not `asarray`:
    # the latter would be read-only over a bytes object, which torch warns about.
    return np.array(resized.crop((left, top, left + spec.size, top + spec.size)))


def _resized(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Return (width, height) with the shorter side `short`, the longer truncated.

    Source: torchvision/transforms/functional.py, `_compute_resized_output_size`.
    """
    width, height = size
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _offset(extent: int, size: int) -> int:
    """Return where the centre crop begins; halves go to the even neighbour, as `round` has it.

    Source: torchvision/transforms/functional.py, `center_crop`.
    """
    return round((extent - size) / 2)
