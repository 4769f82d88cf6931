"""Sinks for tests."""

from __future__ import annotations

from collections.abc import Callable
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


class FillableSocket(WholeFrames):
    """A base class for connections of sessions, with a socket that tests fill (`is_drained = False`) and `drain`.

    fills: each message fills it. unsent_bytes: bytes that have not reached the client's host.
    """

    fills = False
    is_drained = True
    is_held = False
    is_congested = False
    is_paced = False
    unsent_bytes = 0
    _on_drained: Callable[[], None] | None = None

    def when_drained(self, callback: Callable[[], None]) -> None:
        self._on_drained = callback

    def unsent(self) -> int:
        return self.unsent_bytes

    def pace(self, is_paced: bool) -> None:
        self.is_paced = is_paced

    def drain(self) -> None:
        """Have the socket take all frames."""
        self.is_drained, self.is_congested = True, False
        on_drained, self._on_drained = self._on_drained, None
        if on_drained is not None:
            on_drained()
