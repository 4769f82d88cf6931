"""What takes frames in tests."""

from __future__ import annotations

from typing import Any

from realtime.pubsub.subscriber import Sink


class WholeFrames:
    """Something with a sink that hands whole frames to its `deliver`."""

    deliver: Any

    @property
    def sink(self) -> Sink:
        return Sink(self._write, self._keep)

    def _write(self, frame: bytes) -> int:
        self.deliver(frame)
        return len(frame)

    def _keep(self, frame: bytes, taken: int) -> None:
        raise AssertionError("everything was taken")
