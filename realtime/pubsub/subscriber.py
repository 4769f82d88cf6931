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

    def whole(self, channel: str, publication: Publication, epoch: str) -> bytes:
        """The same for members with `delta`."""

    def patched(self, channel: str, publication: Publication, delta: bytes, epoch: str) -> bytes | None:
        """The same with a delta in place of the data; None when the form can't carry it."""

    def join(self, channel: str, info: ClientInfo) -> bytes: ...

    def leave(self, channel: str, info: ClientInfo) -> bytes: ...


class Sink:
    """The way of ready frames to one client.

    write: takes a frame, and tells how many bytes of it were taken; raises OSError for none. While nothing waits it is
    the socket's own `send`. keep: is given a frame and that number, and takes the rest; never raises. fd: of the
    socket, while nothing waits and `write` is its `send`; else -1.

    Fan-out touches nothing else of a subscriber, and this is small: to fetch from memory what a connection consists of
    would take longer than to call it.
    """

    __slots__ = ("fd", "keep", "write")

    def __init__(self, write: Callable[[bytes], int], keep: Callable[[bytes, int], None]) -> None:
        self.write = write
        self.keep = keep
        self.fd = -1

    def deliver(self, frame: bytes) -> None:
        """Send a whole frame. Never raises."""
        try:
            taken = self.write(frame)
        except OSError:
            taken = 0
        if taken != len(frame):
            self.keep(frame, taken)


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
