"""Presence over all peers of the broker: who is in which channel, and who stays listed for a short absence.

An *absent* client has left the channel, but is still listed, without a leave, because it is likely to return:

* The server has ended its subscription and the client subscribes again (`RemovePresence.is_returning`). The same
  client returns within RETURN_GRACE.
* Its connection has ended, and the channel has a grace (`AddPresence.grace`). The next client of the same user takes
  its place, and is listed with the id of the client that it replaces: the others know that one.

Neither has a leave or a join then. A client that does not return leaves at the end of its grace.

Without I/O, and without timers: time is an argument, and `sweep` ends the absences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import msgspec
from msgspec import Struct

from realtime.errors import LIMIT_EXCEEDED, TOO_MANY_REQUESTS, ClientError
from realtime.pubsub.broker_state import StatePart, chunks
from realtime.pubsub.engine import PRESENCE_PAGE, AddPresence, GetPresence, RemovePresence
from realtime.pubsub.history import ExpiryQueue
from realtime.pubsub.time_slices import CHUNK
from realtime.types import ClientInfo

RETURN_GRACE = 5.0
"""Seconds for a client to return that was asked to subscribe again."""

MAX_LISTINGS = 1000
"""Lists of clients whose further pages wait for their requests. Each holds a reference to each client."""

LISTING_TIME = 10.0
"""Seconds for the request of the next page. A worker asks for it at once, unless it has given up."""

COUNT_FROM = 1000
"""Clients of one peer in a channel from which on the channel is counted, so that no first count takes long."""

P = TypeVar("P")


class PresenceEntry(Struct, frozen=True, array_like=True, gc=False):
    """One client's subscription to a channel with presence or with joins and leaves (see `AddPresence`).

    Kept in place of the request, which has the channel's name as well: there may be a million. info: as the others
    know the client.
    """

    info: ClientInfo
    present: bool
    announce: bool
    grace: float


class Absence(Struct, array_like=True, eq=False):
    """An absent client. client: its own id. is_gone: its connection has ended, so that another may take its place.
    until: when it leaves."""

    channel: str
    client: str
    entry: PresenceEntry
    is_gone: bool
    until: float


class PresentState(StatePart, tag=11, frozen=True, gc=False):
    """Some clients of one peer, by its number: channel, client and entry of each."""

    peer: int
    clients: list[tuple[str, str, PresenceEntry]]


class AbsentState(StatePart, tag=12, frozen=True, gc=False):
    """Some absent clients."""

    absences: list[Absence]


class _Count:
    """The clients that are present in one channel, by user."""

    __slots__ = ("clients", "users")

    def __init__(self) -> None:
        self.clients = 0
        self.users: dict[str, int] = {}

    def add(self, user: str, change: int) -> None:
        """Count a client more, or less."""
        self.clients += change
        users = self.users[user] = self.users.get(user, 0) + change
        if not users:
            del self.users[user]


class Listings(Generic[P]):
    """Lists of clients whose further pages have not been requested yet, see `GetPresence.listing`."""

    def __init__(self) -> None:
        # The rest of each list, and the time until which the request of its next page is awaited.
        self._rests: dict[tuple[P, int], tuple[float, Iterator[ClientInfo]]] = {}

    def __len__(self) -> int:
        return len(self._rests)

    def has(self, peer: P, listing: int) -> bool:
        """Whether a list has a further page."""
        return (peer, listing) in self._rests

    def page(self, now: float, peer: P, listing: int, clients: Iterable[ClientInfo] = ()) -> dict[str, ClientInfo]:
        """Return the next page of a list, by client id. clients: of a new list. Raises ClientError 111."""
        _, rest = self._rests.pop((peer, listing), (0.0, iter(clients)))
        page: dict[str, ClientInfo] = {}
        for info in rest:
            page[info.client] = info
            if len(page) == PRESENCE_PAGE:
                self._keep(now, (peer, listing), rest)
                break
        return page

    def drop(self, peer: P) -> None:
        """Forget the lists of a peer."""
        self._rests = {key: rest for key, rest in self._rests.items() if key[0] != peer}

    def _keep(self, now: float, key: tuple[P, int], rest: Iterator[ClientInfo]) -> None:
        if len(self._rests) >= MAX_LISTINGS:
            self._rests = {key: rest for key, rest in self._rests.items() if rest[0] > now}
            if len(self._rests) >= MAX_LISTINGS:
                raise ClientError(*TOO_MANY_REQUESTS)
        self._rests[key] = now + LISTING_TIME, rest


class PresenceListener(Protocol):
    """Learns of the clients that are in a channel, also of those that are not listed."""

    def on_present(self, channel: str, entry: PresenceEntry, *, is_new: bool, announce: bool) -> None:
        """Handle a client that has come (is_new), or has another entry. announce: the others have to learn of it."""

    def on_absent(self, channel: str, entry: PresenceEntry) -> None:
        """Handle a client that has left."""


class Presence(Generic[P]):
    """See the module. limit: of the channels with presence of one peer, and of the absent clients."""

    def __init__(self, limit: int, listener: PresenceListener) -> None:
        self._limit = limit
        self._listener = listener
        self._peers: dict[P, dict[str, dict[str, PresenceEntry]]] = {}  # by channel and client
        self._absent: dict[str, dict[str, Absence]] = {}  # by channel and client
        self._gone: dict[tuple[str, str], dict[str, Absence]] = {}  # the absent ones, by channel and user
        self._returning: dict[str, set[str]] = {}  # the channels of the others, by client
        self._expiring: ExpiryQueue[Absence] = ExpiryQueue(0.25)
        # Channels are counted from the first question on: most are never asked about.
        self._counts: dict[str, _Count] = {}
        self.absent = 0
        self._listings: Listings[P] = Listings()

    def attach(self, peer: P) -> None:
        """Add a peer without any presence."""
        self._peers[peer] = {}

    def detach(self, now: float, peer: P, clients: Iterable[str]) -> None:
        """Remove a peer, whose clients have gone. clients: all of them, with or without presence."""
        for _ in self.detach_steps(now, peer, clients):
            pass

    def end_graced(self, now: float, peer: P) -> None:
        """Note the end of the connections of a peer whose place another connection may take: they are absent now."""
        for channel, entries in self._peers[peer].items():
            for client in [client for client, entry in entries.items() if entry.grace]:
                self._end(now, channel, client, entries.pop(client))

    def detach_steps(self, now: float, peer: P, clients: Iterable[str]) -> Iterator[None]:
        """As `detach`, in steps of CHUNK clients. A client is listed and counted until its leave.

        Those whose place another connection may take are absent after the first step.
        """
        self._listings.drop(peer)
        if self._returning:
            for client in clients:
                self.client_gone(now, client)
        self.end_graced(now, peer)
        by_channel = self._peers[peer]
        number = 0
        while by_channel:
            channel, entries = next(iter(by_channel.items()))
            while entries:
                client, entry = entries.popitem()
                self._end(now, channel, client, entry)
                number += 1
                if number % CHUNK == 0:
                    yield
            by_channel.pop(channel, None)
        del self._peers[peer]

    def add(self, peer: P, request: AddPresence) -> None:
        """Add a client. Raises ClientError 106 at the limit."""
        by_channel = self._peers[peer]
        if len(by_channel) >= self._limit and request.channel not in by_channel:
            if request.present or request.announce:
                raise ClientError(*LIMIT_EXCEEDED)
            return
        self._add(peer, request, announce=True)

    def restore(self, peer: P, request: AddPresence, *, announce: bool) -> None:
        """Add a client whatever the limit, and remove it from any other peer. announce: deliver the join, if any."""
        for other in self._peers:
            if other != peer:
                self.move(other, peer, request.channel, (request.info.client,))
        self._add(peer, request, announce=announce)

    def move(self, source: P, target: P, channel: str, clients: Iterable[str]) -> None:
        """Move clients of a channel from one peer to another: nothing is delivered, and the counts stay."""
        entries = self._peers[source].get(channel)
        if entries is None:
            return
        moved = {client: entries.pop(client) for client in clients if client in entries}
        if not entries:
            del self._peers[source][channel]
        if moved:
            self._peers[target].setdefault(channel, {}).update(moved)

    def _add(self, peer: P, request: AddPresence, *, announce: bool) -> None:
        if not (request.present or request.announce):
            return
        channel, info = request.channel, request.info
        entries = self._peers[peer].setdefault(channel, {})
        previous = entries.get(info.client) or self._take_absent(channel, info, request.grace)
        if previous is not None:
            self._count(channel, previous, -1)
            if previous.info.client != info.client:
                info = msgspec.structs.replace(info, client=previous.info.client)
        entry = PresenceEntry(info, request.present, request.announce, request.grace)
        entries[request.info.client] = entry
        self._count(channel, entry, 1)
        if len(entries) == COUNT_FROM:
            self.count(channel)
        self._listener.on_present(channel, entry, is_new=previous is None, announce=announce)

    def remove(self, now: float, peer: P, request: RemovePresence, *, is_connected: bool) -> None:
        """Remove a client. Idempotent."""
        by_channel, channel = self._peers[peer], request.channel
        entries = by_channel.get(channel)
        entry = entries.pop(request.client, None) if entries is not None else None
        if entry is None:
            return
        if not entries:
            del by_channel[channel]
        if not is_connected:
            self._end(now, channel, request.client, entry)
        elif request.is_returning and self.absent < self._limit:
            self._keep(Absence(channel, request.client, entry, False, now + max(RETURN_GRACE, entry.grace)))
        else:
            self._announce_leave(channel, entry)

    def client_gone(self, now: float, client: str) -> None:
        """Note the end of a client's connection."""
        for channel in list(self._returning.get(client, ())):
            absence = self._absent[channel][client]
            self._forget(absence)
            self._end(now, channel, client, absence.entry)

    def sweep(self, now: float, limit: int) -> bool:
        """Let at most `limit` clients leave that did not return. Returns True if there may be more."""
        due = self._expiring.take(now, limit)
        for absence in due:
            if self._absent.get(absence.channel, {}).get(absence.client) is absence:
                self._forget(absence)
                self._announce_leave(absence.channel, absence.entry)
        return len(due) == limit

    # The state

    def export(self, peers: Sequence[P]) -> Iterator[StatePart]:
        """Yield the state in parts. Nothing may change meanwhile. peers: all of them, by number.

        Lists of clients under way are no part of it: they begin again with the request of the next page.
        """
        for number, peer in enumerate(peers):
            by_channel = self._peers[peer].items()
            clients = ((channel, client, entry) for channel, of in by_channel for client, entry in of.items())
            for some in chunks(clients, lambda one: len(one[0]) + _size_of(one[2])):
                yield PresentState(number, some)
        absences = (absence for by_client in self._absent.values() for absence in by_client.values())
        yield from map(AbsentState, chunks(absences, lambda absence: len(absence.channel) + _size_of(absence.entry)))

    def import_present(self, peer: P, part: PresentState) -> None:
        """Add clients of another object, whatever the limit. Nothing is announced."""
        by_channel = self._peers[peer]
        for channel, client, entry in part.clients:
            entries = by_channel.setdefault(channel, {})
            entries[client] = entry
            self._count(channel, entry, 1)
            if len(entries) == COUNT_FROM:
                self.count(channel)
            self._listener.on_present(channel, entry, is_new=True, announce=False)

    def import_absent(self, part: AbsentState) -> None:
        """Add absent clients of another object, whatever the limit."""
        for absence in part.absences:
            self._keep(absence)
            self._count(absence.channel, absence.entry, 1)
            self._listener.on_present(absence.channel, absence.entry, is_new=True, announce=False)

    # Questions

    def page(self, now: float, peer: P, request: GetPresence) -> dict[str, ClientInfo]:
        """Return the next page of a list of clients, see `GetPresence`. Raises ClientError 111."""
        if self._listings.has(peer, request.listing):
            return self._listings.page(now, peer, request.listing)
        clients = (entry.info for entry in self.entries(request.channel) if entry.present)
        return self._listings.page(now, peer, request.listing, clients)

    def entries(self, channel: str) -> list[PresenceEntry]:
        """Return the entries of a channel, copied in C: a hundred thousand take a millisecond."""
        entries: list[PresenceEntry] = []
        for by_channel in self._peers.values():
            entries += by_channel.get(channel, {}).values()
        return entries + [absence.entry for absence in self._absent.get(channel, {}).values()]

    def list(self, channel: str) -> dict[str, ClientInfo]:
        """Return the clients that are present, by the ids with which they are listed."""
        return {entry.info.client: entry.info for entry in self._entries(channel) if entry.present}

    def count(self, channel: str) -> tuple[int, int]:
        """Return the numbers of clients and users that are present.

        Takes constant time, apart from the first call for a channel with fewer than COUNT_FROM clients on each peer.
        """
        count = self._counts.get(channel)
        if count is None:
            count = _Count()
            for entry in self._entries(channel):
                if entry.present:
                    count.add(entry.info.user, 1)
            if count.clients:
                self._counts[channel] = count
        return count.clients, len(count.users)

    def _entries(self, channel: str) -> Iterator[PresenceEntry]:
        for by_channel in self._peers.values():
            yield from by_channel.get(channel, {}).values()
        for absence in self._absent.get(channel, {}).values():
            yield absence.entry

    def _count(self, channel: str, entry: PresenceEntry, change: int) -> None:
        count = self._counts.get(channel)
        if count is not None and entry.present:
            count.add(entry.info.user, change)
            if not count.clients:
                del self._counts[channel]

    # Absences

    def _end(self, now: float, channel: str, client: str, entry: PresenceEntry) -> None:
        """Handle the end of a client's connection."""
        if entry.grace and entry.info.user and self.absent < self._limit:
            self._keep(Absence(channel, client, entry, True, now + entry.grace))
        else:
            self._announce_leave(channel, entry)

    def _keep(self, absence: Absence) -> None:
        channel, client = absence.channel, absence.client
        self._absent.setdefault(channel, {})[client] = absence
        if absence.is_gone:
            self._gone.setdefault((channel, absence.entry.info.user), {})[client] = absence
        else:
            self._returning.setdefault(client, set()).add(channel)
        self._expiring.add(absence.until, absence)
        self.absent += 1

    def _take_absent(self, channel: str, info: ClientInfo, grace: float) -> PresenceEntry | None:
        """End the absence that this client ends, and return its entry."""
        if not self.absent:
            return None
        absence = self._absent.get(channel, {}).get(info.client)
        if absence is None and grace and info.user:
            absence = next(iter(self._gone.get((channel, info.user), {}).values()), None)
        if absence is None:
            return None
        self._forget(absence)
        return absence.entry

    def _forget(self, absence: Absence) -> None:
        channel, client = absence.channel, absence.client
        _discard(self._absent, channel, client)
        if absence.is_gone:
            _discard(self._gone, (channel, absence.entry.info.user), client)
        else:
            channels = self._returning[client]
            channels.discard(channel)
            if not channels:
                del self._returning[client]
        self.absent -= 1

    def _announce_leave(self, channel: str, entry: PresenceEntry) -> None:
        self._count(channel, entry, -1)
        self._listener.on_absent(channel, entry)


Key = TypeVar("Key")


def _discard(absences: dict[Key, dict[str, Absence]], key: Key, client: str) -> None:
    of_key = absences[key]
    del of_key[client]
    if not of_key:
        del absences[key]


def _size_of(entry: PresenceEntry) -> int:
    return len(entry.info.conn_info) + len(entry.info.chan_info)
