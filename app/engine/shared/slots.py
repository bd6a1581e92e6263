"""SlotPool: fixed-size places in shared memory, for pixels in and rows out.

Every HTTP process has memory of its own and hands its descriptor to the host, so no lock crosses
processes. One slot, its parts aligned to 64 bytes:

    | pixels uint8 (S, S, 3) | logits float32 (C,) | embedding float32 (D,) |
                             | or: length u16 | an error's text, UTF-8      |

The states of a slot, and who may touch it:

              acquire           SUBMIT                 a batch is over
      free ------------> worker --------> host ----------------------------+
       ^                 writes pixels    reads pixels, writes a row        |
       |                                  or a text                         |
       +------- worker reads the row <--------------------------------------+
       release                             DONE, FAILED or GONE

A caller that leaves changes nothing in this: its slot comes back with the answer. When either side
dies the memory goes with the last view of it, so a batch that still runs reads what it was given.
"""

from __future__ import annotations

import math
import mmap
import os
import struct

import numpy as np

from app.backends.base import BackendInfo
from app.engine.base import Profile
from app.engine.shared.board import shared_memory
from app.types import Pixels, Vector

ALIGNMENT = 64
_LENGTH = struct.Struct("<H")
# Room for an error's text where a row is smaller.
MIN_REPLY_BYTES = 512
# 256 slots of a 384 x 384 network are 113 MB, touched as they are used; more images in one worker
# than this are refused, as they would be for their predicted wait.
MAX_SEGMENT_BYTES = 128 * 1024 * 1024
MAX_SLOTS = 4096


def slot_bytes(info: BackendInfo) -> int:
    """Return the size of one slot."""
    return _pixel_bytes(info) + _aligned(max(_row_bytes(info), MIN_REPLY_BYTES))


def slot_count(info: BackendInfo, profile: Profile, queue_budget_seconds: float) -> int:
    """Return how many images one worker may have on their way: what the queue budget lets in.

    Two rounds of batches more, for those that run and those whose answers are being read; within
    what the memory holds, of which no image ever touches what it does not need.
    """
    running = 2 * profile.images_at_once
    per_second = profile.images_per_second or math.inf
    most = min(MAX_SEGMENT_BYTES // slot_bytes(info), MAX_SLOTS)
    return max(math.ceil(min(queue_budget_seconds * per_second + running, most)), 1)


class Slots:
    """Views of slots in shared memory, the same on both sides.

    Args:
        descriptor: of memory of at least `count` slots; closing it is the caller's.
        info: of the backend; says how large everything is.
        count: of slots.
    """

    def __init__(self, descriptor: int, info: BackendInfo, count: int) -> None:
        self.count = count
        size = slot_bytes(info)
        # Never closed by hand: it is unmapped with the last view of it, wherever that is held.
        memory = mmap.mmap(descriptor, count * size)
        reply_at, side = _pixel_bytes(info), info.input_size
        self._pixels = np.ndarray(
            (count, side, side, 3), np.uint8, memory, 0, (size, 3 * side, 3, 1)
        )
        self._logits = np.ndarray((count, info.classes), np.float32, memory, reply_at, (size, 4))
        embedding_at = reply_at + 4 * info.classes
        self._embeddings = np.ndarray(
            (count, info.embedding_dim), np.float32, memory, embedding_at, (size, 4)
        )
        self._replies = np.ndarray((count, size - reply_at), np.uint8, memory, reply_at, (size, 1))

    def pixels(self, slot: int) -> Pixels:
        """Return a view of a slot's pixels."""
        view: Pixels = self._pixels[slot]
        return view

    def write_row(self, slot: int, logits: Vector, embedding: Vector) -> None:
        """Put a row in a slot."""
        self._logits[slot] = logits
        self._embeddings[slot] = embedding

    def read_row(self, slot: int) -> tuple[Vector, Vector]:
        """Return copies of a slot's logits and embedding."""
        return self._logits[slot].copy(), self._embeddings[slot].copy()

    def write_text(self, slot: int, text: str) -> None:
        """Put an error's text in a slot, as much of it as fits."""
        reply = self._replies[slot].data
        data = text.encode()[: len(reply) - _LENGTH.size]
        _LENGTH.pack_into(reply, 0, len(data))
        reply[_LENGTH.size : _LENGTH.size + len(data)] = data

    def read_text(self, slot: int) -> str:
        """Return the error's text of a slot."""
        reply = self._replies[slot].data
        (length,) = _LENGTH.unpack_from(reply, 0)
        return bytes(reply[_LENGTH.size : _LENGTH.size + length]).decode("utf-8", "ignore")


class SlotPool(Slots):
    """A worker's slots, and which of them are free; belongs to one thread.

    Args:
        info: of the backend.
        count: of slots.

    Attributes:
        descriptor: of the memory, to be sent to the host; `close_descriptor` afterwards.
    """

    def __init__(self, info: BackendInfo, count: int) -> None:
        self.descriptor = shared_memory("metaserve-slots", count * slot_bytes(info))
        super().__init__(self.descriptor, info, count)
        # The last one released is the next one taken: its memory is warm, and what was never
        # needed is never touched.
        self._free = list(range(count - 1, -1, -1))
        self._is_taken = bytearray(count)

    @property
    def is_full(self) -> bool:
        """Whether every slot is taken."""
        return not self._free

    def acquire(self) -> int | None:
        """Take a free slot; None when there is none."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._is_taken[slot] = True
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back.

        Raises:
            ValueError: it is free.
        """
        if not self._is_taken[slot]:
            raise ValueError(f"slot {slot} is released twice: this is a bug")
        self._is_taken[slot] = False
        self._free.append(slot)

    def close_descriptor(self) -> None:
        """Close the descriptor; the memory stays for whoever has mapped it."""
        os.close(self.descriptor)


def _pixel_bytes(info: BackendInfo) -> int:
    return _aligned(3 * info.input_size**2)


def _row_bytes(info: BackendInfo) -> int:
    return 4 * (info.classes + info.embedding_dim)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
