"""Whom the hub delivers to, and in which form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from realtime.pubsub.filters import Filter
from realtime.types import ClientInfo, Publication


class FrameEncoder(Protocol):
    """One wire form of a push. The frames are complete and ready to write."""

    def publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        """Raises Disconnect for `binary` data that the form can't carry."""

    def full_publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        """The same for members with `delta`."""

    def delta_publication(self, channel: str, publication: Publication, delta: bytes, epoch: str) -> bytes | None:
        """The same with a delta in place of the data; None when the form can't carry it."""

    def join(self, channel: str, info: ClientInfo) -> bytes: ...

    def leave(self, channel: str, info: ClientInfo) -> bytes: ...


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
    """One subscription of one session. Told apart by identity; added to one channel, once.

    positioned: told when continuity breaks. announced: gets joins and leaves. delta: gets publications as differences
    from the one before. filter: which publications it gets, by their tags; None for all. None of these changes from
    `Hub.open` on.
    """

    @property
    def form(self) -> FrameEncoder:
        """Its wire form, told apart by identity."""

    @property
    def priority(self) -> str:
        """Of the channel: "high", "normal" or "low"."""

    positioned: bool
    announced: bool
    delta: bool
    filter: Filter | None
    sink: Sink

    def on_gap(self) -> None:
        """The publications have a hole, or another epoch. The hub has removed this member before it says so."""

    def on_unencodable(self) -> None:
        """There was a publication that its form can't carry. The hub has removed this member before it says so."""
