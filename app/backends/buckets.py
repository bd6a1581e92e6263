"""A batch takes the smallest prepared size that holds it, padded with pixels of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from app.types import Batch


def bucket_for(size: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds `size` images.

    Raises:
        ValueError: there is none.
    """
    fitting = [bucket for bucket in buckets if bucket >= size]
    if not fitting:
        raise ValueError(f"a batch of {size} images exceeds the largest prepared, {max(buckets)}")
    return min(fitting)


def pad_batch(batch: Batch, size: int) -> Batch:
    """Return the batch with its last image repeated up to `size`; itself when it is as large."""
    missing = size - len(batch)
    return np.concatenate([batch, batch[-1:].repeat(missing, 0)]) if missing else batch
