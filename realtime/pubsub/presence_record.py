"""Joins and leaves that arrive while a worker makes a presence reply in slices.

The pushes of a join or a leave go straight to the clients and overtake such a reply. So the hub records them, and the
reply lists the clients that are present when it is sent, not those of the engine's earlier answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from realtime.types import ClientInfo


class PresenceRecord:
    """The joins and leaves of one channel since the first answer to `GetPresence`.

    changes: the latest of each client: its info after a join, None after a leave. is_complete: no join or leave is
    missing.
    """

    __slots__ = ("changes", "is_complete")

    def __init__(self, is_complete: bool) -> None:
        self.changes: dict[str, ClientInfo | None] = {}
        self.is_complete = is_complete

    def take(self) -> dict[str, ClientInfo | None]:
        """Remove and return the changes so far."""
        changes, self.changes = self.changes, {}
        return changes


class PresenceRecords:
    """The records in progress, by channel. False without any."""

    __slots__ = ("_records",)

    def __init__(self) -> None:
        self._records: dict[str, list[PresenceRecord]] = {}

    def __bool__(self) -> bool:
        return bool(self._records)

    @contextmanager
    def open(self, channel: str, is_complete: bool) -> Iterator[PresenceRecord]:
        """Record a channel's joins and leaves. is_complete: this worker receives them from now on."""
        record = PresenceRecord(is_complete)
        self._records.setdefault(channel, []).append(record)
        try:
            yield record
        finally:
            records = self._records[channel]
            records.remove(record)
            if not records:
                del self._records[channel]

    def add(self, channel: str, info: ClientInfo, joined: bool) -> None:
        """Add a join, or a leave, to the records of its channel."""
        for record in self._records.get(channel, ()):
            record.changes[info.client] = info if joined else None

    def interrupt(self, channel: str) -> None:
        """Mark the records of a channel as incomplete."""
        for record in self._records.get(channel, ()):
            record.is_complete = False

    def interrupt_all(self) -> None:
        """Mark all records as incomplete."""
        for channel in self._records:
            self.interrupt(channel)
