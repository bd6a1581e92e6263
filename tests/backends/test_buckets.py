"""Batch sizes prepared in advance: every size finds one, padded with real pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.backends.buckets import bucket_for, pad_batch
from models.buckets import bucket_sizes


@pytest.mark.parametrize(
    ("limit", "sizes"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))]
)
def test_buckets_are_powers_of_two_and_the_limit(limit: int, sizes: tuple[int, ...]) -> None:
    assert bucket_sizes(limit) == sizes


@given(limit=st.integers(1, 200), data=st.data())
def test_every_size_finds_the_smallest_bucket_that_holds_it(
    limit: int, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, limit))
    buckets = bucket_sizes(limit)
    found = bucket_for(size, buckets)
    assert size <= found < 2 * size or found == limit
    assert all(other < size or other >= found for other in buckets)


def test_a_batch_above_the_largest_bucket_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 9 images exceeds the largest prepared, 8"):
        bucket_for(9, bucket_sizes(8))


def test_padding_repeats_the_last_image_and_keeps_the_rest() -> None:
    batch = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    padded = pad_batch(batch, 4)
    assert padded.shape == (4, 4, 4, 3)
    np.testing.assert_array_equal(padded[:2], batch)
    np.testing.assert_array_equal(padded[2:], batch[[1, 1]])
    assert pad_batch(batch, 2) is batch
