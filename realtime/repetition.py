"""Which of many like events are worth a line in the log: the first, then one in a minute. Without I/O."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

REPEAT_AFTER = 60.0
"""Seconds between two lines about like events."""


class Repetition(Generic[Key]):
    """Lets one event of each key pass in REPEAT_AFTER seconds, and counts the others.

    Keys whose time is over are forgotten once there are `most` of them. If that makes no room, events of further keys
    do not pass, so that a flood of new keys is no flood of lines.
    """

    def __init__(self, most: int = 1000) -> None:
        self._most = most
        self._passed: dict[Key, tuple[float, int]] = {}  # when the last event passed, and the number left out since

    def __len__(self) -> int:
        return len(self._passed)

    def admit(self, key: Key, now: float) -> int | None:
        """Count an event at `now`, in seconds. Returns None to leave it out, else the number left out before it."""
        passed_at, left_out = self._passed.get(key, (None, 0))
        if passed_at is not None and now - passed_at < REPEAT_AFTER:
            self._passed[key] = passed_at, left_out + 1
            return None
        if passed_at is None and len(self._passed) >= self._most:
            self._passed = {one: seen for one, seen in self._passed.items() if now - seen[0] < REPEAT_AFTER}
            if len(self._passed) >= self._most:
                return None
        self._passed[key] = now, 0
        return left_out

    @property
    def has_left_out(self) -> bool:
        """Whether events were left out that no later event has reported."""
        return any(left_out for _, left_out in self._passed.values())

    def take_left_out(self, now: float) -> list[tuple[Key, int]]:
        """Return the keys with events left out for REPEAT_AFTER seconds, and their numbers, which begin anew."""
        due = [
            (key, left_out)
            for key, (passed_at, left_out) in self._passed.items()
            if left_out and now - passed_at >= REPEAT_AFTER
        ]
        for key, _ in due:
            self._passed[key] = now, 0
        return due
