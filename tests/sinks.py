"""What takes frames in tests."""

from __future__ import annotations

from typing import Any


class WholeFrames:
    """A sink (`realtime.pubsub.member.Sink`) whose `deliver` is all that matters; as a member it is its own sink."""

    deliver: Any

    @property
    def sink(self) -> WholeFrames:
        return self

    def write(self, frame: bytes) -> int:
        self.deliver(frame)
        return len(frame)

    def keep(self, frame: bytes, taken: int) -> None:
        raise AssertionError("everything was taken")
