"""Sinks for tests."""

from __future__ import annotations

from typing import Any

from realtime.pubsub.subscriber import Sink


class WholeFrames:
    """A base class with a sink that passes whole frames to `deliver`."""

    deliver: Any

    @property
    def sink(self) -> Sink:
        return Sink(self._write, self._queue_remainder)

    def _write(self, frame: bytes) -> int:
        self.deliver(frame)
        return len(frame)

    def _queue_remainder(self, frame: bytes, sent: int) -> None:
        raise AssertionError("all bytes were sent")
