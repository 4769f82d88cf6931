"""The core of the broker: numbers, stores and routes publications, tracks presence and counts clients.

It serves any number of *peers*, the links to the workers. A peer is only an identity here: deliveries go out through
`PeerDelivery`, with all recipients of one delivery at once, so that it is encoded once.

Each operation of `realtime.pubsub.engine` is one method of `BrokerCore`, marked with `carries_out`. They share a
signature: the peer that asks, the current time, the request. Without I/O, and synchronous. Time is in seconds of a
clock that never goes back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import msgspec
from msgspec import Struct

from realtime.errors import INTERNAL_ERROR, LIMIT_EXCEEDED, NOT_AVAILABLE, ClientError
from realtime.metrics import Counter
from realtime.pubsub.broker_state import StatePart, chunks
from realtime.pubsub.engine import (
    AddClient,
    AddPresence,
    AdmitClient,
    Answer,
    Cut,
    DropValues,
    EndLease,
    EngineNotice,
    EngineRequest,
    FetchValue,
    FoundValue,
    GetHistory,
    GetNodes,
    GetPresence,
    GetPresenceStats,
    GetStats,
    HoldRole,
    Publish,
    RemoveClient,
    RemoveHistory,
    RemovePresence,
    ReportSubscriptions,
    ResignRole,
    SendOrder,
    StoreValue,
    Subscribe,
    TakeLease,
    TakeLostClients,
    Term,
    Unsubscribe,
    split_address,
)
from realtime.pubsub.history import ChannelStreams, EpochsState, IdempotencyCache, KeysState, StreamsState
from realtime.pubsub.leases import Leases, LeasesState
from realtime.pubsub.presence import AbsentState, Presence, PresenceEntry, PresentState
from realtime.pubsub.roles import Roles, RoleState
from realtime.pubsub.time_slices import CHUNK
from realtime.types import ClientInfo, EngineStats, HistoryPage, NodeInfo, Position, Publication

P = TypeVar("P")
P_contra = TypeVar("P_contra", contravariant=True)
Core = TypeVar("Core")
Kind = TypeVar("Kind")

_UNNUMBERED = Position()  # of publications in channels without history

_OPERATIONS: dict[type[Struct], str] = {}  # the names of the methods, which a subclass may override


def carries_out(
    kind: type[EngineRequest[Answer]],
) -> Callable[[Callable[[Core, P, float, Kind], Answer]], Callable[[Core, P, float, Kind], Answer]]:
    """Mark the method that carries out requests of this kind and returns their answer."""

    def register(method: Callable[[Core, P, float, Kind], Answer]) -> Callable[[Core, P, float, Kind], Answer]:
        _OPERATIONS[kind] = method.__name__
        return method

    return register


def takes_note(
    kind: type[EngineNotice],
) -> Callable[[Callable[[Core, P, float, Kind], None]], Callable[[Core, P, float, Kind], None]]:
    """Mark the method that takes note of notices of this kind."""

    def register(method: Callable[[Core, P, float, Kind], None]) -> Callable[[Core, P, float, Kind], None]:
        _OPERATIONS[kind] = method.__name__
        return method

    return register


class PeerDelivery(Protocol[P_contra]):
    """Delivers to peers. The collections belong to the core: read them before returning, and do not keep them."""

    def deliver_publication(
        self, peers: Collection[P_contra], channel: str, publication: Publication, epoch: str
    ) -> None: ...

    def deliver_join(self, peers: Collection[P_contra], channel: str, info: ClientInfo) -> None: ...

    def deliver_leave(self, peers: Collection[P_contra], channel: str, info: ClientInfo) -> None: ...

    def deliver_order(self, peers: Collection[P_contra], order: bytes) -> None: ...

    def deliver_cut(self, peer: P_contra, request: Cut, clients: list[ClientInfo]) -> None: ...


class PeerHead(StatePart, tag=21, frozen=True, gc=False):
    """A peer, which gets the next number, from 0 on. The fields are those of `_PeerState`."""

    address: str
    slot: str
    subscriptions: int
    keeps_lost: bool


class PeerChannels(StatePart, tag=22, frozen=True, gc=False):
    """Some channels of a peer. inherited: see `_PeerState`."""

    peer: int
    channels: list[str]
    inherited: list[str]


class PeerClients(StatePart, tag=23, frozen=True, gc=False):
    """Some clients of a peer: client, user and secret, which is "" for most."""

    peer: int
    clients: list[tuple[str, str, str]]


class LostClients(StatePart, tag=24, frozen=True, gc=False):
    """Some clients that ended peers of a slot have left behind: client, user, and address of the peer."""

    slot: str
    clients: list[tuple[str, str, str]]


STATE_PARTS: tuple[type[StatePart], ...] = tuple(StatePart.__subclasses__())
"""All kinds of parts, see `BrokerCore.export`."""


class _PeerState:
    """State that belongs to one peer and is dropped with it."""

    __slots__ = (
        "address",
        "channels",
        "inherited",
        "is_followed",
        "keeps_lost",
        "sessions",
        "slot",
        "subscriptions",
        "users",
    )

    def __init__(self, address: str, slot: str) -> None:
        self.address = address
        self.slot = slot
        self.channels: set[str] = set()
        self.inherited: set[str] = set()  # those of an earlier peer that this one has not restored yet
        self.users: dict[str, str] = {}  # client -> user, of the connected clients
        self.sessions: dict[str, str] = {}  # client -> secret, of those that came from another peer
        self.subscriptions = 0
        self.is_followed = False  # another peer gets the deliveries
        self.keeps_lost = False  # whether the clients that it leaves behind are kept for its successor


class BrokerCore(Generic[P]):
    """Channels, presence and connected clients over all peers.

    max_channels: limits the channels with a subscriber, the channels with a history, the channels with presence on one
    peer, the lost clients of one slot, and the idempotency keys. A request beyond a limit raises ClientError 106.
    publications: counts the requests to publish. describe_node: returns this node, without its numbers. streams, keys:
    empty ones with a journal (`realtime.pubsub.journal`); by default, without one. operations: the bound method for
    each kind of request and notice.
    """

    def __init__(
        self,
        delivery: PeerDelivery[P],
        max_channels: int,
        publications: Counter | None = None,
        describe_node: Callable[[], NodeInfo] = NodeInfo,
        streams: ChannelStreams | None = None,
        keys: IdempotencyCache | None = None,
    ) -> None:
        self._delivery = delivery
        self._describe_node = describe_node
        self._node = describe_node().uid
        self._publications = publications or Counter()
        self._max_channels = max_channels
        self._streams = ChannelStreams(max_channels) if streams is None else streams
        self._idempotency = IdempotencyCache(max_channels) if keys is None else keys
        self._presence: Presence[P] = Presence(max_channels, self)
        self.roles = Roles()
        self._leases: Leases[P] = Leases(delivery.deliver_order)
        self._routes: dict[str, list[P]] = {}
        self._peers: dict[P, _PeerState] = {}
        self._addresses: dict[str, P] = {}
        self._sessions: dict[str, P] = {}  # by secret, of clients that came from another peer
        self._users: dict[str, int] = {}  # user -> connections
        self._unlinked: dict[P, _PeerState] = {}  # of peers that are still routed, and whose presence is still listed
        # Of peers that have ended: slot -> client -> user and the address of the peer.
        self._lost: dict[str, dict[str, tuple[str, str]]] = {}
        self.operations: dict[type[Struct], Callable[[P, float, Any], Any]] = {
            kind: getattr(self, name) for kind, name in _OPERATIONS.items()
        }

    def carry_out(self, peer: P, now: float, request: EngineRequest[Answer]) -> Answer:
        """Carry out a request of a peer and return the answer. Raises ClientError."""
        answer: Answer = self.operations[type(request)](peer, now, request)
        return answer

    def take_note(self, peer: P, now: float, notice: EngineNotice) -> None:
        """Take note of a peer's notice."""
        self.operations[type(notice)](peer, now, notice)

    @property
    def channels(self) -> int:
        """The number of channels with a subscriber."""
        return len(self._routes)

    @property
    def streams(self) -> int:
        """The number of channels with a history, or at least a position above 0."""
        return len(self._streams)

    # Peers

    def attach(self, peer: P, address: str = "", slot: str = "") -> None:
        """Add a peer without any state. address: for orders to it alone; the latest peer with an address has it.

        slot: its successor in this slot gets its lost clients.
        """
        self._peers[peer] = _PeerState(address, slot)
        self._presence.attach(peer)
        self._addresses[address] = peer

    def introduce(self, peer: P, *, takes_lost: bool, is_returning: bool) -> None:
        """Learn about the process of a peer. takes_lost: whether it asks for the clients of earlier peers of its
        slot. is_returning: it had a peer here before, so it has the clients of that peer itself."""
        state = self._peers[peer]
        state.keeps_lost = takes_lost
        if not takes_lost:
            self._lost.pop(state.slot, None)
        elif is_returning and state.slot in self._lost:
            lost = self._lost.pop(state.slot)
            others = {client: entry for client, entry in lost.items() if entry[1] != state.address}
            if others:
                self._lost[state.slot] = others

    def detach(self, peer: P, now: float) -> None:
        """Remove a peer: its clients leave, which the others receive, and are disconnected. Idempotent."""
        for _ in self.detach_steps(peer, now):
            pass

    def detach_steps(self, peer: P, now: float) -> Iterator[None]:
        """As `detach`, in short steps: a worker may have many thousands of clients. The first step ends connections."""
        yield from self.unlink_steps(peer, now)
        yield from self.leave_steps(peer, now)

    def unlink_steps(self, peer: P, now: float) -> Iterator[None]:
        """Remove a peer but for its routes and presence: `leave_steps` follows. Another peer may take its routes and
        clients over before.

        The only step ends connections. Idempotent.
        """
        state = self._peers.pop(peer, None)
        if state is None:
            return
        if self._addresses.get(state.address) == peer:
            del self._addresses[state.address]
        for user in state.users.values():
            self._remove_connection(user)
        for secret in state.sessions.values():
            self._forget_session(secret, peer)
        if state.keeps_lost and state.users:
            lost = self._lost.setdefault(state.slot, {})
            for client, user in islice(state.users.items(), self._max_channels - len(lost)):
                lost[client] = user, state.address
        self._unlinked[peer] = state
        self._presence.end_graced(now, peer)
        yield

    def leave_steps(self, peer: P, now: float) -> Iterator[None]:
        """Unroute an unlinked peer, and let its clients leave that no other peer has taken over, in short steps.

        Idempotent.
        """
        unlinked = self._unlinked.pop(peer, None)
        if unlinked is None:
            return
        self._leases.drop(peer)
        for number, channel in enumerate(unlinked.channels, 1):
            self._unroute(channel, peer)
            if number % CHUNK == 0:
                yield
        clients = unlinked.users
        gone = [client for client in clients if not any(client in state.users for state in self._peers.values())]
        yield from self._presence.detach_steps(now, peer, gone)

    def is_routed(self, peer: P) -> bool:
        """Whether an unlinked peer still gets publications."""
        return peer in self._unlinked and bool(self._unlinked[peer].channels)

    def inherit(self, peer: P, earlier: P) -> None:
        """Route to this peer what went to an unlinked one; its first report of subscriptions drops the channels that
        it has not restored by then."""
        state, unlinked = self._peers[peer], self._unlinked.get(earlier)
        if unlinked is None:
            return
        self._leases.move(earlier, peer)
        for channel in unlinked.channels - state.channels:
            peers = self._routes[channel]
            peers[peers.index(earlier)] = peer
        for channel in unlinked.channels & state.channels:
            self._unroute(channel, earlier)
        state.inherited |= unlinked.channels - state.channels
        state.channels |= unlinked.channels
        unlinked.channels, unlinked.is_followed = set(), True

    def restore(
        self,
        peer: P,
        channels: Iterable[str],
        presence: Iterable[AddPresence],
        clients: Iterable[ClientInfo],
        sessions: Mapping[str, str],
        *,
        announce: bool,
    ) -> None:
        """Take over state that an earlier stream or broker had granted to this peer, so no limit applies.

        A client of another peer moves, as with `Cut`: the other one has not got it, or has lost it. announce: deliver
        the joins. Their leaves are delivered in any case.
        """
        for channel in channels:
            self._route(channel, peer)
        self._peers[peer].inherited.difference_update(channels)
        for request in presence:
            self._presence.restore(peer, request, announce=announce)
        for info in clients:
            for other in self._peers:
                if other != peer:
                    self._remove_client(other, info.client)
            self._add_client(peer, info)
        for client, secret in sessions.items():
            self._add_session(peer, client, secret)

    # The state

    @property
    def is_settled(self) -> bool:
        """Whether the state can be exported: no unlinked peer may come back."""
        return not self._unlinked

    def export(self, peers: Sequence[P]) -> Iterator[StatePart]:
        """Yield the state in parts. Nothing may change meanwhile.

        peers: all of them, in any order, which the importing core gets them in.
        """
        for peer in peers:
            state = self._peers[peer]
            yield PeerHead(state.address, state.slot, state.subscriptions, state.keeps_lost)
        yield from self._streams.export()
        yield from self._idempotency.export()
        yield from self.roles.export()
        for number, peer in enumerate(peers):
            state = self._peers[peer]
            for channels in chunks(state.channels, len):
                yield PeerChannels(number, channels, [one for one in channels if one in state.inherited])
            clients = ((client, user, state.sessions.get(client, "")) for client, user in state.users.items())
            for some in chunks(clients, lambda one: len(one[1])):
                yield PeerClients(number, some)
        yield from self._presence.export(peers)
        yield from self._leases.export(peers)
        for slot, of_slot in self._lost.items():
            lost = ((client, user, address) for client, (user, address) in of_slot.items())
            for few in chunks(lost, lambda one: len(one[1])):
                yield LostClients(slot, few)

    def import_part(self, part: StatePart, peers: Sequence[P]) -> None:
        """Add a part of the state of another core, whatever the limits. Nothing is delivered.

        peers: those of the other core, or what stands for them here, in the same order.
        """
        match part:
            case PeerHead(address, slot, subscriptions, keeps_lost):
                peer = peers[len(self._peers)]
                self.attach(peer, address, slot)
                self._peers[peer].subscriptions, self._peers[peer].keeps_lost = subscriptions, keeps_lost
            case EpochsState():
                self._streams.import_epochs(part)
            case StreamsState():
                self._streams.import_streams(part)
            case KeysState():
                self._idempotency.import_keys(part)
            case RoleState():
                self.roles.import_part(part)
            case PeerChannels(number, channels, inherited):
                for channel in channels:
                    self._route(channel, peers[number])
                self._peers[peers[number]].inherited.update(inherited)
            case PeerClients(number, clients):
                for client, user, secret in clients:
                    self._add_client(peers[number], ClientInfo(user, client))
                    if secret:
                        self._add_session(peers[number], client, secret)
            case PresentState():
                self._presence.import_present(peers[part.peer], part)
            case AbsentState():
                self._presence.import_absent(part)
            case LeasesState():
                self._leases.import_part(part, peers)
            case LostClients(slot, clients):
                lost = self._lost.setdefault(slot, {})
                lost.update((client, (user, address)) for client, user, address in clients)

    # Publications

    @carries_out(Publish)
    def publish(self, peer: P, now: float, request: Publish) -> Position:
        self._publications.value += 1
        channel, key, version = request.channel, request.idempotency_key, request.version
        if key:
            known = self._idempotency.recall(now, channel, key)
            if known is not None:
                return known
        publication: Publication | None
        if not request.history_options.enabled:
            publication = Publication(request.data, 0, request.info, request.tags, request.delta, request.binary)
            position = _UNNUMBERED
        elif version and not (stream := self._streams.open_to_publish(now, channel, request.history_options)).advance(
            version, request.version_epoch
        ):
            publication, position = None, stream.position
        else:
            publication, epoch = self._streams.append(now, request)
            position = Position(publication.offset, epoch)
        if key:
            self._idempotency.store(now, channel, key, position)
        peers = self._routes.get(channel)
        if peers and publication is not None:
            self._delivery.deliver_publication(peers, channel, publication, position.epoch)
        return position

    @carries_out(GetHistory)
    def get_history(self, peer: P, now: float, request: GetHistory) -> HistoryPage:
        if not request.history_options.enabled:
            return HistoryPage([], Position())
        return self._streams.open(now, request.channel, request.history_options).page(request)

    @carries_out(RemoveHistory)
    def remove_history(self, peer: P, now: float, request: RemoveHistory) -> None:
        self._streams.remove(request.channel)

    def sweep(self, now: float, limit: int = 1000) -> bool:
        """Free expired history and idempotency keys, and let absent clients leave, at most `limit` of each: 2 us each.

        Returns True if there may be more: call again soon. Otherwise call it every quarter of a second or so.
        """
        self._leases.sweep(now)
        more = self._streams.sweep(now, limit)
        more = self._presence.sweep(now, limit) or more
        return self._idempotency.sweep(now, limit) or more

    def has_expirable(self) -> bool:
        """Whether there is history, an idempotency key, an absent client or a lease, which `sweep` has to look at."""
        return bool(self._streams or self._idempotency or self._presence.absent or self._leases)

    # Routing

    @carries_out(Subscribe)
    def subscribe(self, peer: P, now: float, request: Subscribe) -> None:
        channel = request.channel
        if channel not in self._routes and len(self._routes) >= self._max_channels:
            raise ClientError(*LIMIT_EXCEEDED)
        self._route(channel, peer)

    @takes_note(Unsubscribe)
    def unsubscribe(self, peer: P, now: float, notice: Unsubscribe) -> None:
        channels = self._peers[peer].channels
        if notice.channel in channels:
            channels.discard(notice.channel)
            self._peers[peer].inherited.discard(notice.channel)
            self._unroute(notice.channel, peer)

    def _route(self, channel: str, peer: P) -> None:
        channels = self._peers[peer].channels
        if channel not in channels:
            channels.add(channel)
            self._routes.setdefault(channel, []).append(peer)

    def _unroute(self, channel: str, peer: P) -> None:
        peers = self._routes[channel]
        peers.remove(peer)
        if not peers:
            del self._routes[channel]

    @carries_out(SendOrder)
    def send_order(self, peer: P, now: float, request: SendOrder) -> int:
        recipients: Collection[P] = self._peers.keys()
        if request.worker:
            recipient = self._sessions.get(request.session) or self._peer_at(request.worker)
            recipients = [recipient] if recipient is not None else []
            returning = []
        else:
            # Peers that may return get it, too. The sender waits for those with subscribers: the others have ended.
            returning = [peer for peer, state in self._unlinked.items() if not state.is_followed]
            self._leases.note_order()
        if recipients or returning:
            self._delivery.deliver_order([*recipients, *returning], request.order)
        return len(recipients) + sum(map(self.is_routed, returning))

    @carries_out(HoldRole)
    def hold_role(self, peer: P, now: float, request: HoldRole) -> Term:
        return self.roles.hold(now, request)

    @carries_out(ResignRole)
    def resign_role(self, peer: P, now: float, request: ResignRole) -> None:
        if self.roles.resign(request):
            self._delivery.deliver_order(list(self._peers), request.order)

    @carries_out(TakeLease)
    def take_lease(self, peer: P, now: float, request: TakeLease) -> str:
        return self._leases.take(peer, now, request)

    @carries_out(EndLease)
    def end_lease(self, peer: P, now: float, request: EndLease) -> None:
        self._leases.end(peer, request.flight, request.order)

    @carries_out(FetchValue)
    def fetch_value(self, peer: P, now: float, request: FetchValue) -> FoundValue:
        raise ClientError(*NOT_AVAILABLE)

    @carries_out(StoreValue)
    def store_value(self, peer: P, now: float, request: StoreValue) -> bool:
        raise ClientError(*NOT_AVAILABLE)

    @carries_out(DropValues)
    def drop_values(self, peer: P, now: float, request: DropValues) -> None:
        raise ClientError(*NOT_AVAILABLE)

    def _peer_at(self, address: str) -> P | None:
        """Return the peer with this address, None for a worker of another node."""
        node, local = split_address(address)
        return self._addresses.get(local) if node in ("", self._node) else None

    # Presence

    @carries_out(AddPresence)
    def add_presence(self, peer: P, now: float, request: AddPresence) -> None:
        self._presence.add(peer, request)

    @carries_out(RemovePresence)
    def remove_presence(self, peer: P, now: float, request: RemovePresence) -> None:
        self._presence.remove(now, peer, request, is_connected=request.client in self._peers[peer].users)

    def on_present(self, channel: str, entry: PresenceEntry, *, is_new: bool, announce: bool) -> None:
        """Deliver a join, see `PresenceListener`."""
        if is_new and announce and entry.announce and (peers := self._routes.get(channel)):
            self._delivery.deliver_join(peers, channel, entry.info)

    def on_absent(self, channel: str, entry: PresenceEntry) -> None:
        """Deliver a leave, see `PresenceListener`."""
        if entry.announce and (peers := self._routes.get(channel)):
            self._delivery.deliver_leave(peers, channel, entry.info)

    @carries_out(GetPresence)
    def get_presence(self, peer: P, now: float, request: GetPresence) -> dict[str, ClientInfo]:
        if not request.listing:
            return self._presence.list(request.channel)
        return self._presence.page(now, peer, request)

    @carries_out(GetPresenceStats)
    def get_presence_stats(self, peer: P, now: float, request: GetPresenceStats) -> tuple[int, int]:
        return self._presence.count(request.channel)

    # Clients and statistics

    @takes_note(AddClient)
    def add_client(self, peer: P, now: float, notice: AddClient) -> None:
        self._add_client(peer, notice.info)

    @carries_out(AdmitClient)
    def admit_client(self, peer: P, now: float, request: AdmitClient) -> bool:
        info = request.info
        if request.limit and info.user and self._users.get(info.user, 0) >= request.limit:
            return False
        self._add_client(peer, info)
        return True

    def _add_client(self, peer: P, info: ClientInfo) -> None:
        self._remove_client(peer, info.client)
        self._peers[peer].users[info.client] = info.user
        self._users[info.user] = self._users.get(info.user, 0) + 1

    @takes_note(RemoveClient)
    def remove_client(self, peer: P, now: float, notice: RemoveClient) -> None:
        self._remove_client(peer, notice.client)
        if self._presence.absent:
            self._presence.client_gone(now, notice.client)

    def _remove_client(self, peer: P, client: str) -> None:
        state = self._peers[peer]
        user = state.users.pop(client, None)
        if user is not None:
            self._remove_connection(user)
        if state.sessions and (secret := state.sessions.pop(client, None)) is not None:
            self._forget_session(secret, peer)

    def _add_session(self, peer: P, client: str, secret: str) -> None:
        self._peers[peer].sessions[client] = secret
        self._sessions[secret] = peer

    def _forget_session(self, secret: str, peer: P) -> None:
        if self._sessions.get(secret) == peer:
            del self._sessions[secret]

    @carries_out(Cut)
    def cut(self, peer: P, now: float, request: Cut) -> None:
        target = self._peer_at(request.worker)
        if target is None or target == peer:
            raise ClientError(*INTERNAL_ERROR)
        users = self._peers[peer].users
        clients = [ClientInfo(users[client], client) for client in request.clients if client in users]
        for info in clients:
            self._remove_client(peer, info.client)
            self._add_client(target, info)
            if info.client in request.sessions:
                self._add_session(target, info.client, request.sessions[info.client])
        for channel, present in request.presence.items():
            self._presence.move(peer, target, channel, present)
        self._delivery.deliver_cut(target, request, clients)

    def _remove_connection(self, user: str) -> None:
        remaining = self._users[user] - 1
        if remaining:
            self._users[user] = remaining
        else:
            del self._users[user]

    @carries_out(TakeLostClients)
    def take_lost_clients(self, peer: P, now: float, request: TakeLostClients) -> list[ClientInfo]:
        slot = self._peers[peer].slot
        lost = self._lost.get(slot, {})
        # A worker that may return still has its clients.
        returning = {state.address for state in self._unlinked.values() if not state.is_followed}
        clients = (ClientInfo(user, client) for client, (user, address) in lost.items() if address not in returning)
        taken = list(islice(clients, request.limit))
        for info in taken:
            del lost[info.client]
        if not lost:
            self._lost.pop(slot, None)
        return taken

    def has_lost_clients(self, slot: str) -> bool:
        """Whether ended peers of this slot have left clients for another one."""
        return slot in self._lost

    @takes_note(ReportSubscriptions)
    def report_subscriptions(self, peer: P, now: float, notice: ReportSubscriptions) -> None:
        state = self._peers[peer]
        state.subscriptions = notice.subscriptions
        while state.inherited:
            channel = state.inherited.pop()
            state.channels.discard(channel)
            self._unroute(channel, peer)

    @carries_out(GetStats)
    def get_stats(self, peer: P, now: float, request: GetStats) -> EngineStats:
        return self.stats()

    def stats(self) -> EngineStats:
        """Return the numbers over all peers."""
        states = self._peers.values()
        clients = sum(len(state.users) for state in states)
        subscriptions = sum(state.subscriptions for state in states)
        return EngineStats(clients, len(self._users), len(self._routes), subscriptions)

    @carries_out(GetNodes)
    def get_nodes(self, peer: P, now: float, request: GetNodes) -> list[NodeInfo]:
        return [self.describe_node()]

    def describe_node(self) -> NodeInfo:
        """Return this node with its numbers."""
        return msgspec.structs.replace(self._describe_node(), stats=self.stats(), workers=len(self._peers))
