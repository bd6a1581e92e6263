"""Ranking: softmax as float64 has it, the same order every time."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from app.errors import InferenceFailed
from app.images.rank import normalise, rank
from app.types import Vector, WordNetPrediction


def softmax(logits: Vector) -> NDArray[np.float64]:
    exponentials = np.exp(logits.astype(np.float64) - logits.max())
    found: NDArray[np.float64] = exponentials / exponentials.sum()
    return found


def vectors(bound: float, most: int = 60) -> st.SearchStrategy[Vector]:
    elements = st.floats(-bound, bound, width=32)
    return arrays.arrays(np.float32, st.integers(1, most), elements=elements)


@settings(max_examples=300, deadline=None)
@given(logits=vectors(2.0**17), top_k=st.integers(1, 70))
def test_rank_equals_a_softmax_in_double_precision(logits: Vector, top_k: int) -> None:
    expected = softmax(logits)
    order = sorted(range(len(logits)), key=lambda index: (-float(logits[index]), index))
    found = rank(logits, None, top_k)
    assert [prediction.index for prediction in found] == order[:top_k]
    for prediction in found:
        assert isinstance(prediction.probability, np.float32)
        assert prediction.label is None
        assert prediction.probability == pytest.approx(
            expected[prediction.index], rel=1e-5, abs=1e-37
        )


@settings(max_examples=100, deadline=None)
@given(
    logits=arrays.arrays(np.float32, st.integers(1, 60), elements=st.sampled_from([0, -0.0, 1, 2])),
    top_k=st.integers(1, 70),
)
def test_of_equals_the_lower_index_comes_first(logits: Vector, top_k: int) -> None:
    found = [
        (-prediction.probability, prediction.index) for prediction in rank(logits, None, top_k)
    ]
    assert found == sorted(found)
    assert len(found) == min(top_k, len(logits))


def test_large_rankings_are_in_order_and_sum_to_one() -> None:
    logits = np.random.default_rng(0).normal(0, 3, 21841).astype(np.float32)
    found = rank(logits, None, 10**6)
    probabilities = [float(prediction.probability) for prediction in found]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1, abs=1e-5)
    assert [p.index for p in rank(logits, None, 5)] == [p.index for p in found[:5]]


def test_all_equal_logits_give_the_first_indices() -> None:
    found = rank(np.zeros(21841, np.float32), None, 3)
    assert [prediction.index for prediction in found] == [0, 1, 2]


def test_labels_go_with_their_index() -> None:
    found = rank(np.array([0, 2, 1], np.float32), ("zero", "one", "two"), 2)
    assert [(p.index, p.label) for p in found] == [(1, "one"), (2, "two")]
    assert type(found[0].index) is int


def test_extreme_logits_do_not_overflow() -> None:
    largest = np.finfo(np.float32).max
    found = rank(np.array([largest, 0, largest], np.float32), None, 3)
    assert [p.index for p in found] == [0, 2, 1]
    assert [float(p.probability) for p in found] == [0.5, 0.5, 0.0]
    found = rank(np.array([-np.inf, 1], np.float32), None, 2)
    assert [float(p.probability) for p in found] == [1.0, 0.0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none_are_an_error_of_the_network(bad: float) -> None:
    vector = np.array([0, bad, 1], np.float32)
    with pytest.raises(InferenceFailed, match="not finite"):
        rank(vector, None, 1)
    with pytest.raises(InferenceFailed, match="not finite"):
        normalise(vector)


def test_ranking_imagenet_22k_takes_well_under_a_millisecond() -> None:
    logits = np.random.default_rng(0).normal(size=21841).astype(np.float32)
    durations = []
    for _ in range(50):
        started = time.perf_counter()
        rank(logits, None, 5)
        durations.append(time.perf_counter() - started)
    assert min(durations) < 1e-3


@settings(max_examples=200, deadline=None)
@given(vectors(float(np.finfo(np.float32).max)))
def test_normalise_gives_length_one_or_zero(embedding: Vector) -> None:
    before = embedding.copy()
    found = normalise(embedding)
    assert found.dtype == np.float32
    length = np.linalg.norm(found.astype(np.float64))
    if embedding.any():
        assert length == pytest.approx(1, abs=1e-6)
        expected = embedding.astype(np.float64) / np.linalg.norm(embedding.astype(np.float64))
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-40)
    else:
        assert not found.any()
    np.testing.assert_array_equal(embedding, before)
    assert not np.shares_memory(found, embedding)


def test_wordnet_ids_stand_beside_the_labels_of_their_classes() -> None:
    logits = np.array([0, 2, 1], np.float32)
    found = rank(logits, ("cat", "dog", "bird"), 2, ("n00000000", "n00000001", "n00000002"))
    assert [
        (one.index, one.label, one.wordnet_id)
        for one in found
        if isinstance(one, WordNetPrediction)
    ] == [(1, "dog", "n00000001"), (2, "bird", "n00000002")]
    assert not any(isinstance(one, WordNetPrediction) for one in rank(logits, None, 2))
