"""Who is in a room: its true members, beside the lists that watchers keep from presence, joins and leaves (N12)."""

from __future__ import annotations

from dataclasses import dataclass

from tests.soak.account import BROKEN, Account

# Seconds until every list is right: the presence TTL, and some more on a busy machine.
EVENTUALLY = 75.0


@dataclass(slots=True)
class Membership:
    """One connection's membership. left: None while it lasts. unsure: the server may already have given it up."""

    joined: float
    left: float | None = None
    unsure: bool = False


class Room:
    """A channel with presence, and its true members by client id."""

    def __init__(self, account: Account, channel: str) -> None:
        self.channel = channel
        self.members: dict[str, Membership] = {}
        self.comparisons = 0
        self._account = account

    def join(self, client: str) -> None:
        self.members[client] = Membership(self._account.now())

    def leave(self, client: str) -> None:
        if (member := self.members.get(client)) and member.left is None:
            member.left = self._account.now()

    def doubt(self, client: str) -> None:
        if member := self.members.get(client):
            member.unsure = True

    def compare(self, watcher: str, listed: set[str], since: float) -> None:
        """Compare a watcher's list, which it has kept since `since`, with the members."""
        now = self._account.now()
        self.comparisons += 1
        for client, member in self.members.items():
            if client in listed:
                gone = member.left is not None and now - max(member.left, since) > EVENTUALLY
                text = f"{client} left {now - (member.left or now):.0f} s ago and is still listed"
                self._account.require(not gone, "N12", BROKEN, watcher, self.channel, text)
            elif member.left is None and not member.unsure:
                absent = now - max(member.joined, since) > EVENTUALLY
                text = f"{client} joined {now - member.joined:.0f} s ago and is not listed"
                self._account.require(not absent, "N12", BROKEN, watcher, self.channel, text)

    def forget(self) -> None:
        """Drop memberships that ended so long ago that no list can have them without a finding already."""
        now = self._account.now()
        self.members = {
            client: member
            for client, member in self.members.items()
            if member.left is None or now - member.left < 4 * EVENTUALLY
        }
