"""The core of an engine: it numbers, keeps and routes publications, and knows who is present.

It serves any number of *peers*: the one worker of a `MemoryEngine`, or the links of the broker process. A peer is only
an identity here. What is to reach peers goes out through `PeerDelivery`, which is told all the peers of one delivery at
once, so that the thing is encoded once.

Without I/O, and synchronous. Time is an argument, in seconds of a clock that never goes back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Generic, Protocol, TypeVar

from msgspec import Struct

from realtime.errors import LIMIT_EXCEEDED, ClientError
from realtime.pubsub.history import PAGE_BYTES, ChannelStreams, IdempotencyCache
from realtime.types import ClientInfo, EngineStats, HistoryOptions, HistoryPage, Position, Publication

P = TypeVar("P")
P_contra = TypeVar("P_contra", contravariant=True)


class PeerDelivery(Protocol[P_contra]):
    """The way out to the peers. The collections are the exchange's own: read them, and be done before returning."""

    def published(self, peers: Collection[P_contra], channel: str, publication: Publication, epoch: str) -> None: ...

    def joined(self, peers: Collection[P_contra], channel: str, info: ClientInfo) -> None: ...

    def left(self, peers: Collection[P_contra], channel: str, info: ClientInfo) -> None: ...

    def instructed(self, peers: Collection[P_contra], order: bytes) -> None: ...


class PresenceEntry(Struct, frozen=True, array_like=True, gc=False):
    """One client's subscription to a channel that lists (`present`) or announces it."""

    info: ClientInfo
    present: bool
    announce: bool


class _PeerState:
    """What one peer holds: all that goes when it goes."""

    __slots__ = ("address", "channels", "occupants", "subscriptions", "users")

    def __init__(self, address: str) -> None:
        self.address = address
        self.channels: set[str] = set()
        self.occupants: dict[str, dict[str, PresenceEntry]] = {}
        self.users: dict[str, str] = {}  # client -> user, of the connected
        self.subscriptions = 0


class BrokerCore(Generic[P]):
    """Channels, presence and connected clients over all peers.

    max_channels: the most channels with a subscriber, with a history, and with an occupant on one peer, and the most
    idempotency keys; what would be one more raises ClientError 106.
    """

    def __init__(self, outward: PeerDelivery[P], max_channels: int) -> None:
        self._outward = outward
        self._max = max_channels
        self._streams = ChannelStreams(max_channels)
        self._receipts = IdempotencyCache(max_channels)
        self._routes: dict[str, list[P]] = {}
        self._holdings: dict[P, _PeerState] = {}
        self._addresses: dict[str, P] = {}
        self._users: dict[str, int] = {}  # user -> connections

    @property
    def channels(self) -> int:
        """How many channels have a subscriber."""
        return len(self._routes)

    @property
    def streams(self) -> int:
        """How many channels have a history, or a position at least."""
        return len(self._streams)

    # Peers

    def attach(self, peer: P, address: str = "") -> None:
        """Take a peer in; it holds nothing yet. address: for orders to it alone; if shared, the latest peer's."""
        self._holdings[peer] = _PeerState(address)
        self._addresses[address] = peer

    def detach(self, peer: P) -> None:
        """A peer is gone: its clients leave, announced to the others, and are disconnected. Idempotent."""
        holding = self._holdings.pop(peer, None)
        if holding is None:
            return
        if self._addresses.get(holding.address) == peer:
            del self._addresses[holding.address]
        for channel in holding.channels:
            self._unroute(channel, peer)
        for user in holding.users.values():
            self._forget_user(user)
        for channel, occupants in holding.occupants.items():
            for occupant in occupants.values():
                self._announce_leave(channel, occupant)

    # Publications

    def publish(
        self,
        now: float,
        channel: str,
        data: bytes,
        retention: HistoryOptions,
        info: ClientInfo | None = None,
        tags: dict[str, str] | None = None,
        idempotency_key: str = "",
        version: int = 0,
        version_epoch: str = "",
        delta: bool = False,
        binary: bool = False,
    ) -> Position:
        """Number, keep and route one publication; see `Engine.publish`."""
        if idempotency_key:
            known = self._receipts.recall(now, channel, idempotency_key)
            if known is not None:
                return known
        publication: Publication | None
        if not retention.kept:
            publication, position = Publication(data, 0, info, tags, delta, binary), Position()
        elif version and not (stream := self._streams.open(now, channel, retention)).advance(version, version_epoch):
            publication, position = None, stream.position
        else:
            publication, epoch = self._streams.append(now, channel, data, retention, info, tags, delta, binary)
            position = Position(publication.offset, epoch)
        if idempotency_key:
            self._receipts.note(now, channel, idempotency_key, position)
        peers = self._routes.get(channel)
        if peers and publication is not None:
            self._outward.published(peers, channel, publication, position.epoch)
        return position

    def history(
        self,
        now: float,
        channel: str,
        retention: HistoryOptions,
        since: Position | None,
        limit: int,
        reverse: bool,
        max_bytes: int = PAGE_BYTES,
    ) -> HistoryPage:
        """A page of a channel's history; see `Engine.history`."""
        if not retention.kept:
            return HistoryPage([], Position())
        return self._streams.open(now, channel, retention).page(since, limit, reverse, max_bytes)

    def remove_history(self, channel: str) -> None:
        """Drop a channel's publications; offset and epoch go on."""
        self._streams.remove(channel)

    def sweep(self, now: float, limit: int = 1000) -> bool:
        """Free what is over, which takes `limit` times 2 microseconds at most. True: there is more; call again soon.

        To be called every quarter of a second or so.
        """
        more = self._streams.sweep(now, limit)
        return self._receipts.sweep(now, limit) or more

    def perishable(self) -> bool:
        """Whether there is anything that could be over some time."""
        return bool(self._streams or self._receipts)

    # Routing

    def subscribe(self, peer: P, channel: str, *, again: bool = False) -> None:
        """Route the channel to this peer from now on. Idempotent.

        again: the peer was promised it before, by an exchange that is gone, so no limit applies.
        """
        if not again and channel not in self._routes and len(self._routes) >= self._max:
            raise ClientError(*LIMIT_EXCEEDED)
        held = self._holdings[peer].channels
        if channel not in held:
            held.add(channel)
            self._routes.setdefault(channel, []).append(peer)

    def unsubscribe(self, peer: P, channel: str) -> None:
        """Undo `subscribe`. Idempotent."""
        held = self._holdings[peer].channels
        if channel in held:
            held.discard(channel)
            self._unroute(channel, peer)

    def _unroute(self, channel: str, peer: P) -> None:
        peers = self._routes[channel]
        peers.remove(peer)
        if not peers:
            del self._routes[channel]

    def instruct(self, order: bytes, address: str = "") -> int:
        """Pass an order to every peer, or to the one of this address; to how many."""
        peers: Collection[P] = self._holdings.keys()
        if address:
            peers = [self._addresses[address]] if address in self._addresses else []
        if peers:
            self._outward.instructed(peers, order)
        return len(peers)

    # Presence

    def enter(
        self,
        peer: P,
        channel: str,
        info: ClientInfo,
        *,
        present: bool,
        announce: bool,
        again: bool = False,
        quiet: bool = False,
    ) -> None:
        """A client's subscription began; see `Engine.enter`. Repeated, it only changes what is known of the client.

        again: as for `subscribe`. quiet: it is not announced now, only its end will be.
        """
        if not (present or announce):
            return
        held = self._holdings[peer].occupants
        occupants = held.get(channel)
        if occupants is None:
            if len(held) >= self._max and not again:
                raise ClientError(*LIMIT_EXCEEDED)
            occupants = held[channel] = {}
        known = info.client in occupants
        occupants[info.client] = PresenceEntry(info, present, announce)
        peers = self._routes.get(channel)
        if announce and peers and not (known or quiet):
            self._outward.joined(peers, channel, info)

    def leave(self, peer: P, channel: str, client: str) -> None:
        """A client's subscription ended; announced if its beginning was. Idempotent."""
        held = self._holdings[peer].occupants
        occupants = held.get(channel)
        occupant = occupants.pop(client, None) if occupants is not None else None
        if occupant is None:
            return
        if not occupants:
            del held[channel]
        self._announce_leave(channel, occupant)

    def _announce_leave(self, channel: str, occupant: PresenceEntry) -> None:
        peers = self._routes.get(channel)
        if occupant.announce and peers:
            self._outward.left(peers, channel, occupant.info)

    def presence(self, channel: str) -> dict[str, ClientInfo]:
        """Who is present, by client id."""
        return {info.client: info for info in self._present(channel)}

    def presence_stats(self, channel: str) -> tuple[int, int]:
        """The numbers of clients present and of distinct users among them."""
        users = [info.user for info in self._present(channel)]
        return len(users), len(set(users))

    def _present(self, channel: str) -> Iterator[ClientInfo]:
        for holding in self._holdings.values():
            for occupant in holding.occupants.get(channel, {}).values():
                if occupant.present:
                    yield occupant.info

    # The census

    def connected(self, peer: P, info: ClientInfo) -> None:
        """A client connected to this peer."""
        self.disconnected(peer, info.client)
        self._holdings[peer].users[info.client] = info.user
        self._users[info.user] = self._users.get(info.user, 0) + 1

    def admit(self, peer: P, info: ClientInfo, limit: int) -> bool:
        """A client asks to connect to this peer; see `Engine.admit`."""
        if limit and info.user and self._users.get(info.user, 0) >= limit:
            return False
        self.connected(peer, info)
        return True

    def disconnected(self, peer: P, client: str) -> None:
        """A client of this peer is gone. Idempotent."""
        user = self._holdings[peer].users.pop(client, None)
        if user is not None:
            self._forget_user(user)

    def _forget_user(self, user: str) -> None:
        left = self._users[user] - 1
        if left:
            self._users[user] = left
        else:
            del self._users[user]

    def tally(self, peer: P, subscriptions: int) -> None:
        """How many subscriptions this peer holds now."""
        self._holdings[peer].subscriptions = subscriptions

    def census(self) -> EngineStats:
        """The counts over all peers."""
        holdings = self._holdings.values()
        clients = sum(len(holding.users) for holding in holdings)
        subscriptions = sum(holding.subscriptions for holding in holdings)
        return EngineStats(clients, len(self._users), len(self._routes), subscriptions)
