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
        self._wrong: dict[str, dict[str, float]] = {}  # by watcher and client: since when the list is wrong about it

    def join(self, client: str) -> None:
        self.members[client] = Membership(self._account.now())

    def leave(self, client: str) -> None:
        if (member := self.members.get(client)) and member.left is None:
            member.left = self._account.now()

    def doubt(self, client: str) -> None:
        if member := self.members.get(client):
            member.unsure = True

    def compare(self, watcher: str, listed: set[str], since: float) -> bool:
        """Compare a watcher's list, which it has kept since `since`, with the members. Returns whether it is right.

        A list may be wrong for a while: members of a worker leave and join again where its link to the broker is cut.
        """
        now = self._account.now()
        self.comparisons += 1
        before, wrong = self._wrong.get(watcher, {}), {}
        for client, member in self.members.items():
            is_member = member.left is None
            if (client in listed) is is_member or (is_member and member.unsure):
                continue
            changed = member.joined if member.left is None else member.left
            wrong[client] = max(before.get(client, now), changed, since)
            kind = "not listed" if is_member else "still listed"
            text = f"{client} is {kind}, {now - changed:.0f} s after its {'join' if is_member else 'leave'}"
            in_time = now - wrong[client] <= EVENTUALLY
            self._account.require(in_time, "N12", BROKEN, watcher, self.channel, text)
        self._wrong[watcher] = wrong
        return not wrong

    def forget(self) -> None:
        """Drop memberships that ended so long ago that no list can have them without a finding already."""
        now = self._account.now()
        self.members = {
            client: member
            for client, member in self.members.items()
            if member.left is None or now - member.left < 4 * EVENTUALLY
        }
