"""Admission: whether an image that came now can be answered in time; pure, times are arguments."""

from __future__ import annotations

from app.errors import DeadlineExceeded, Overloaded, retry_after_seconds


def check_deadline(time_left_seconds: float) -> None:
    """Refuse an image that is late already.

    Raises:
        DeadlineExceeded: no time is left.
    """
    if time_left_seconds <= 0:
        raise DeadlineExceeded("the deadline passed before the image reached the queue")


def check_wait(
    wait_seconds: float,
    *,
    budget_seconds: float,
    time_left_seconds: float,
    own_seconds: float,
    waiting: int,
    is_full: bool = False,
) -> None:
    """Refuse an image that would wait too long.

    Args:
        wait_seconds: until its batch should start.
        budget_seconds: longest wait at which an image is admitted.
        time_left_seconds: until its deadline.
        own_seconds: of its batch. 0 where nothing is pending: what the engine predicts keeps nobody
            from an idle one, or after one slow batch nothing could teach it that the backend is
            fast again.
        waiting: images that wait already; for the message.
        is_full: there is no room, whatever the wait.

    Raises:
        Overloaded: the wait is over the budget or beyond the deadline, or there is no room.
    """
    most = min(budget_seconds, time_left_seconds - own_seconds)
    if wait_seconds > most or is_full:
        raise Overloaded(
            f"{waiting} images wait already, about {wait_seconds:.1f} s of work; "
            "send the request again later",
            retry_after_seconds=retry_after_seconds(wait_seconds - most),
        )
