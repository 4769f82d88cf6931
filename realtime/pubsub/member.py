"""Whom the hub delivers to, and in which form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from realtime.pubsub.filters import Filter
from realtime.records import ClientInfo, Publication


class Form(Protocol):
    """One wire form of a push. The frames are complete and ready to write."""

    def publication(self, channel: str, publication: Publication, epoch: str) -> bytes:
        """Raises Disconnect for `binary` data that the form can't carry."""

    def whole(self, channel: str, publication: Publication, epoch: str) -> bytes:
        """The same for members with `delta`."""

    def patched(self, channel: str, publication: Publication, delta: bytes, epoch: str) -> bytes | None:
        """The same with a delta in place of the data; None when the form can't carry it."""

    def join(self, channel: str, info: ClientInfo) -> bytes: ...

    def leave(self, channel: str, info: ClientInfo) -> bytes: ...


class Sink(Protocol):
    """Where the frames of one client go."""

    @property
    def write(self) -> Callable[[bytes], int]:
        """Takes a frame; how many bytes of it were taken. Raises OSError for none. May be a socket's own `send`."""

    def keep(self, frame: bytes, taken: int) -> None:
        """Takes the rest of a frame, of which `write` has taken the first bytes. Never raises."""

    def deliver(self, frame: bytes) -> None:
        """Takes a whole frame. Never raises."""


class Member(Protocol):
    """One subscription of one session. Told apart by identity; added to one channel, once.

    positioned: told when continuity breaks. announced: gets joins and leaves. delta: gets publications as differences
    from the one before. filter: which publications it gets, by their tags; None for all. None of these changes from
    `Hub.open` on.
    """

    @property
    def form(self) -> Form:
        """Its wire form, told apart by identity."""

    @property
    def priority(self) -> str:
        """Of the channel: "high", "normal" or "low"."""

    positioned: bool
    announced: bool
    delta: bool
    filter: Filter | None
    sink: Sink

    def lost(self) -> None:
        """The publications have a hole, or another epoch. The hub has removed this member before it says so."""

    def unfit(self) -> None:
        """There was a publication that its form can't carry. The hub has removed this member before it says so."""
