"""SlotPool: a slot is never in two hands, and what one side writes the other reads."""

from __future__ import annotations

import dataclasses
import gc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.engine.base import Profile
from app.engine.shared.slots import MAX_SEGMENT_BYTES, MIN_REPLY_BYTES, SlotPool, Slots, slot_bytes
from app.engine.shared.slots import slot_count as count_of
from tests.engine.doubles import SIDE, WatchedBackend
from tests.engine.processes import open_descriptors, slot_maps

INFO = WatchedBackend().info
COUNT = 5


class Hands(RuleBasedStateMachine):
    """Slots wander between a pool, its worker and its host."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = SlotPool(INFO, COUNT)
        self.host = Slots(self.pool.descriptor, INFO, COUNT)
        self.pool.close_descriptor()
        self.held: dict[int, int] = {}
        self.value = 0

    @rule()
    def acquire(self) -> None:
        slot = self.pool.acquire()
        assert (slot is None) == (len(self.held) == COUNT)
        if slot is not None:
            assert slot not in self.held, "two hands on one slot"
            self.value = (self.value + 1) % 256
            self.pool.pixels(slot)[...] = self.value
            self.held[slot] = self.value

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.release(slot)
        del self.held[slot]
        with pytest.raises(ValueError, match="released twice"):
            self.pool.release(slot)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held)))
        logits = np.full(INFO.classes, self.held[slot], np.float32)
        self.host.write_row(slot, logits, -logits[: INFO.embedding_dim])
        found, embedding = self.pool.read_row(slot)
        assert found.tobytes() == logits.tobytes()
        assert embedding.tobytes() == (-logits[: INFO.embedding_dim]).tobytes()

    @invariant()
    def everyone_reads_what_was_put_there(self) -> None:
        assert self.pool.is_full == (len(self.held) == COUNT)
        for slot, value in self.held.items():
            pixels = self.host.pixels(slot)
            assert pixels.shape == (SIDE, SIDE, 3)
            assert pixels.flags.c_contiguous
            assert (pixels == value).all()


TestHands = Hands.TestCase


@given(st.text())
def test_an_error_text_crosses_as_far_as_it_fits(text: str) -> None:
    pool = SlotPool(INFO, 2)
    pool.close_descriptor()
    pool.write_text(1, text)
    found = pool.read_text(1)
    assert text.startswith(found)
    assert found == text or len(text.encode()) > MIN_REPLY_BYTES - 8


def test_the_last_row_of_a_slot_does_not_touch_the_next_slot() -> None:
    pool = SlotPool(INFO, 2)
    pool.close_descriptor()
    pool.pixels(1)[...] = 7
    pool.write_row(0, np.ones(INFO.classes, np.float32), np.ones(INFO.embedding_dim, np.float32))
    pool.write_text(0, "x" * 10_000)
    assert (pool.pixels(1) == 7).all()


def test_the_queue_budget_and_the_memory_bound_how_many_slots_there_are() -> None:
    large = dataclasses.replace(INFO, input_size=384, classes=1000, embedding_dim=512)
    slow, fast = Profile({1: 0.1, 4: 0.4}, 4), Profile({4: 0.0001}, 4)
    assert count_of(large, slow, 5.0) == 50 + 2 * 4
    assert count_of(large, Profile({1: 0.1, 4: 0.4}, 4, 2), 5.0) == 100 + 2 * 2 * 4
    narrow = Profile({1: 0.1}, 4, 2, lane_batch_seconds={1: 0.1, 2: 0.2}, lane_batch_size=2)
    assert count_of(large, narrow, 5.0) == 100 + 2 * 4, "two lanes count twice, not four times"
    most = count_of(large, fast, 5.0)
    assert MAX_SEGMENT_BYTES - slot_bytes(large) < most * slot_bytes(large) <= MAX_SEGMENT_BYTES
    assert count_of(large, Profile({}, 4), 5.0) == most, "nothing is known of its speed"
    huge = dataclasses.replace(INFO, input_size=8192)
    assert count_of(huge, slow, 5.0) == 1


def test_memory_and_descriptor_go_with_the_last_view() -> None:
    gc.collect()
    descriptors, maps = open_descriptors(), slot_maps()
    pool = SlotPool(INFO, COUNT)
    pool.close_descriptor()
    view = pool.pixels(2)
    view[...] = 9
    del pool
    assert slot_maps() == maps + 1
    assert (view == 9).all()
    del view
    assert (open_descriptors(), slot_maps()) == (descriptors, maps)
