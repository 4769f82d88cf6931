"""The receiving end of the fan-out: the `Subscriber` protocol, its frame encoder and its sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from realtime.pubsub.filters import Filter
from realtime.types import ClientInfo, Publication


class FrameEncoder(Protocol):
    """Encodes pushes in one wire format. Its frames are complete and ready to write."""

    def publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        """Encode a publication push. Raises Disconnect for `binary` data that the format cannot carry."""

    def full_publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        """Encode a publication push with the full data for subscribers with `delta`. Raises as `publication` does."""

    def delta_publication(self, channel: str, publication: Publication, delta: bytes, epoch: str) -> bytes | None:
        """Encode a publication push with a delta in place of its data; None if the format cannot carry the delta."""

    def join(self, channel: str, info: ClientInfo) -> bytes:
        """Encode a join push."""

    def leave(self, channel: str, info: ClientInfo) -> bytes:
        """Encode a leave push."""


class Sink:
    """Destination of encoded frames for one client.

    send: sends a frame and returns the number of bytes sent; raises OSError if none was. While the client has no queued
    frames, it is the `send` of its socket. queue_remainder: called with a frame and the number of its bytes sent, to
    queue the rest; never raises. fd: the socket's descriptor while `send` is the socket's, else -1.

    Fan-out accesses no other object of a subscriber. This one is small on purpose: loading the attributes of a whole
    connection from memory would take longer than the call.
    """

    __slots__ = ("fd", "queue_remainder", "send")

    def __init__(self, send: Callable[[bytes], int], queue_remainder: Callable[[bytes, int], None]) -> None:
        self.send = send
        self.queue_remainder = queue_remainder
        self.fd = -1

    def deliver(self, frame: bytes) -> None:
        """Send a whole frame. Never raises."""
        try:
            sent = self.send(frame)
        except OSError:
            sent = 0
        if sent != len(frame):
            self.queue_remainder(frame, sent)


class Subscriber(Protocol):
    """One subscription of one session. Compared by identity; subscribes to one channel, once.

    positioned: the subscriber tracks its position, so the hub removes it at a gap (`on_gap`). announced: receives joins
    and leaves. delta: receives publications as deltas from the previous one. filter: selects publications by their
    tags; None for all. None of these changes after `Hub.activate`, except for `positioned`, and for `announced` with
    `Hub.regroup`.
    """

    @property
    def form(self) -> FrameEncoder:
        """The encoder of its wire format, compared by identity."""

    @property
    def client(self) -> str:
        """The id of its client, as in the `ClientInfo` of joins and leaves."""

    @property
    def priority(self) -> str:
        """The channel's priority: "high", "normal" or "low"."""

    positioned: bool
    announced: bool
    delta: bool
    filter: Filter | None
    sink: Sink

    def on_gap(self) -> None:
        """Handle missing publications or a new epoch. The hub has removed this subscriber before the call."""

    def on_unencodable(self) -> None:
        """Handle a publication that its format cannot carry. The hub has removed this subscriber before the call."""
