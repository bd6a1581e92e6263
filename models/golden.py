"""The fixed images that every proof and every start runs through the network."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def golden_images(size: int, count: int = 5) -> NDArray[np.uint8]:
    """Return the fixed inputs of the proof.

    Smooth colour ramps under increasing noise. The noise comes from SHAKE-256, so the same bytes
    come out on every machine and with every version of every library.

    Returns:
        uint8 (count, size, size, 3).
    """
    y, x = np.mgrid[0:size, 0:size].astype(np.int64)
    images = np.empty((count, size, size, 3), np.uint8)
    for index in range(count):
        noise_bytes = hashlib.shake_256(f"metaserve {index}".encode()).digest(size * size * 3)
        noise = np.frombuffer(noise_bytes, np.uint8).reshape(size, size, 3).astype(np.int64)
        ramps = np.stack(
            [
                (x * 255) // max(size - 1, 1),
                (y * 255) // max(size - 1, 1),
                ((x + y + index * size // 3) * 255 // size) % 256,
            ],
            axis=-1,
        )
        images[index] = (ramps * (count - index) + noise * (index + 1)) // (count + 1)
    return images
