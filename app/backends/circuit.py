"""Circuit: whether calls may go out, and when to look again; pure, the clock is an argument.

               lost                    begin_probe, once it is due
    closed ----------> open ------------------------------------------> probing
       ^                ^                                                |   |
       |                +------- probe_failed: a longer pause -----------+   |
       +------------------------------- probe_succeeded ---------------------+

Calls go out while it is closed and at no other time. One probe runs at a time; the first is due at
once, each that fails doubles the pause before the next.
"""

from __future__ import annotations

from typing import Literal

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0


class Circuit:
    """Closed at first."""

    def __init__(
        self,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
        longest_pause_seconds: float = LONGEST_PAUSE_SECONDS,
    ) -> None:
        self._first_pause_seconds = first_pause_seconds
        self._longest_pause_seconds = longest_pause_seconds
        self._pause_seconds = first_pause_seconds
        self._probe_at = 0.0
        self.state: Literal["closed", "open", "probing"] = "closed"

    @property
    def is_closed(self) -> bool:
        """Whether calls may go out."""
        return self.state == "closed"

    def lost(self, now: float) -> bool:
        """Take note of a lost connection; True when this opened the circuit."""
        if not self.is_closed:
            return False
        self.state, self._probe_at = "open", now
        return True

    def seconds_until_probe(self, now: float) -> float:
        """Return how long until a probe is due, 0 when it is; only an open circuit has one."""
        return max(self._probe_at - now, 0.0)

    def begin_probe(self, now: float) -> bool:
        """Claim the one probe that is due; False when none is, or another runs."""
        if self.state != "open" or now < self._probe_at:
            return False
        self.state = "probing"
        return True

    def probe_failed(self, now: float) -> None:
        """Open again, and pause before the next probe."""
        self.state, self._probe_at = "open", now + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, self._longest_pause_seconds)

    def probe_succeeded(self) -> None:
        """Let calls out again; the next loss starts with the shortest pause."""
        self.state, self._pause_seconds = "closed", self._first_pause_seconds
