"""When a refused caller is told to come back."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from app.errors import retry_after_seconds


@given(excess=st.floats(-1e3, 1e6))
def test_it_is_a_whole_second_from_the_excess_to_twice_as_much_and_at_least_one(
    excess: float,
) -> None:
    least = max(math.ceil(excess), 1)
    assert least <= retry_after_seconds(excess) <= 2 * least


@pytest.mark.parametrize(
    ("excess", "all_of"), [(0.01, {1, 2}), (1.2, {2, 3, 4}), (3, {3, 4, 5, 6})]
)
def test_callers_refused_together_are_spread_over_all_of_these(
    excess: float, all_of: set[int]
) -> None:
    assert {retry_after_seconds(excess) for _ in range(1000)} == all_of
