"""The batch sizes that are prepared in advance, wherever a device plans for each shape."""

from __future__ import annotations


def bucket_sizes(max_batch_size: int) -> tuple[int, ...]:
    """Return 1, 2, 4 ... below a limit, and the limit."""
    powers = (1 << power for power in range((max_batch_size - 1).bit_length()))
    return (*powers, max_batch_size)
