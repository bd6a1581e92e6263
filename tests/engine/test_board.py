"""What an engine's process writes on the board, every other process reads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from app.engine.base import EngineStatus
from app.engine.shared.board import STUCK_SECONDS, Board
from tests.servers import wait_until

BUSY = EngineStatus(3, 8, 1, 0.25, 1.5, "RuntimeError: schön")
IDLE = EngineStatus(0, 0, 0, 0.0, 0.0, None)


def test_another_process_reads_what_was_published() -> None:
    board = Board.create(2)
    board.publish(1, BUSY)
    script = (
        "from app.engine.shared.board import Board\n"
        f"print(Board({board.descriptor}, 2).read(1).last_error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        pass_fds=[board.descriptor],
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        timeout=60,
    )
    assert done.stdout.decode("utf-8").strip() == BUSY.last_error, done.stderr.decode()
    board.close()


def test_a_pending_engine_that_stops_writing_is_stalled_longer_and_longer() -> None:
    board = Board.create(1)
    board.publish(0, BUSY)
    first, second = board.read(0), board.read(0)
    assert 1.5 < first.stalled_seconds < second.stalled_seconds
    assert first.queue_depth == 3
    assert first.predicted_wait_seconds == 0.25
    board.publish(0, IDLE)
    assert board.read(0) == IDLE
    board.close()


def test_rows_do_not_touch_each_other_and_are_not_ready_until_they_say_so() -> None:
    board = Board.create(3)
    board.publish(1, EngineStatus(0, 0, 0, 0.0, 0.0, "x" * 5000))
    assert [board.is_ready(row) for row in range(3)] == [False, True, False]
    assert [board.read(row).last_error for row in (0, 2)] == [None, None]
    board.publish(1, IDLE, ready=False)
    assert not board.is_ready(1)
    assert not board.answers(1)
    board.publish(1, BUSY, draining=True)
    assert [board.is_draining(row) for row in range(3)] == [False, True, False]
    assert board.answers(1), "until it ends"
    board.publish(1, BUSY)
    board.withdraw(1)
    assert board.read(1) == IDLE
    assert not board.is_ready(1)
    board.close()


def test_a_closed_board_leaves_no_descriptor() -> None:
    board = Board.create(1)
    board.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(board.descriptor)


def test_a_row_ages_from_when_it_was_last_written() -> None:
    board = Board.create(1)
    assert board.age_seconds(0) > 1.0, "a row that was never written is as old as the machine"
    board.publish(0, IDLE)
    first, second = board.age_seconds(0), board.age_seconds(0)
    assert 0 <= first <= second
    assert board.answers(0)
    wait_until(lambda: board.age_seconds(0) > STUCK_SECONDS, "it is old")
    assert not board.answers(0)
    board.close()
