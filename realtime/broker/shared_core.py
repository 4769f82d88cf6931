"""What nodes share besides channels: presence, orders, limits of users' connections, and the knowledge of each other.

The state of a node's own clients is that of `BrokerCore`. The operations here ask or change that of all nodes in Redis,
and answer when Redis has. Clients that a dead worker leaves behind (`TakeLostClients`), and moves between workers
(`Cut`), concern one node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from realtime.broker.delivery import LinkDelivery
from realtime.broker.nodes import ALL, NodeOrder, Nodes
from realtime.broker.redis_core import RedisCore
from realtime.broker.redis_messages import VERSION, ChannelJoin, ChannelLeave, encode
from realtime.broker.redis_roles import RedisRoles
from realtime.broker.shared_presence import Names, SharedPresence
from realtime.broker.stored_values import StoredValues
from realtime.broker.user_connections import UserConnections
from realtime.config.settings import Settings
from realtime.errors import ClientError
from realtime.metrics import Counter, Metrics
from realtime.process.link import Link
from realtime.process.reactor import next_turn_caller
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.engine import (
    AddPresence,
    AdmitClient,
    DropValues,
    FetchValue,
    FoundValue,
    GetNodes,
    GetPresence,
    GetPresenceStats,
    HoldRole,
    RemovePresence,
    ResignRole,
    SendOrder,
    StoreValue,
    Term,
    ValueState,
    split_address,
)
from realtime.pubsub.presence import Listings, PresenceEntry
from realtime.redis.servers import RedisServer
from realtime.supervision.loop_time import LoopTimeLedger
from realtime.types import ClientInfo, NodeInfo

LEAVE_TIMEOUT = 2.0
"""Seconds for Redis to learn of the end of the last clients. Otherwise other nodes remove them."""

LEAVE_POLL = 0.01

_NO_ONE = ClientInfo("", "")


class SharedCore(RedisCore):
    """See the module."""

    def __init__(
        self,
        settings: Settings,
        delivery: LinkDelivery,
        publications: Counter,
        describe_node: Callable[[], NodeInfo],
        reactor: Any,
        metrics: Metrics,
        ledger: LoopTimeLedger,
    ) -> None:
        super().__init__(settings.engine, delivery, publications, describe_node, reactor, metrics, ledger)
        call_soon, ttl, end = next_turn_caller(reactor), settings.engine.redis.presence_ttl, len(encode(_NO_ONE))
        self._joined = encode(ChannelJoin(VERSION, self.sender, 0, _NO_ONE))[:-end]
        self._left = encode(ChannelLeave(VERSION, self.sender, 0, _NO_ONE))[:-end]
        self._shared_listings: Listings[Link] = Listings()
        self.nodes = Nodes(
            self.sender,
            self.describe_node,
            self.servers.of,
            lambda name: self.key("node", name),
            self.key("nodes", ALL),
            self._on_order,
            self._on_ended,
            ttl / 2,
            reactor.seconds,
            metrics,
        )
        self.shared = SharedPresence(
            self.sender,
            ttl,
            self._names_of,
            self.servers.of,
            self._presence.entries,
            self.nodes.is_dead,
            self._refused,
            call_soon,
            metrics,
        )
        self._redis_roles = RedisRoles(self.key, self.servers.of)
        self._values = StoredValues(self.key, self.servers.of)
        # Of no interest to Redis without a limit.
        self._has_limit = settings.client.user_connection_limit > 0
        self._connections = UserConnections(
            self.sender,
            lambda user: self.key("connections", user),
            self.servers.of,
            self._users,
            self.nodes.is_dead,
            call_soon,
        )
        self.listen(ALL, self.nodes.on_message)
        self.listen(self._node, self.nodes.on_message)
        self.ready.append(self._on_server_ready)
        self.lost.append(self._on_server_lost)

    def _names_of(self, channel: str) -> Names:
        keys = self.key("presence", channel), self.key("clients", channel), self.key("users", channel)
        return Names(keys, self.key("channel", channel), self._joined, self._left)

    def _on_server_ready(self, server: RedisServer) -> None:
        self.shared.renew_all()
        if server is self.servers.of(ALL):
            self.nodes.on_ready()

    def _on_server_lost(self, server: RedisServer) -> None:
        if server is self.servers.of(ALL):
            self.nodes.on_lost()

    def _on_ended(self, run: str) -> None:
        self.shared.renew_all()

    async def leave(self) -> None:
        """Write to Redis what it has not got yet, and end this run for the others; both within LEAVE_TIMEOUT."""
        ended: Deferred[None] = Deferred()
        deadline = self._reactor.seconds() + LEAVE_TIMEOUT
        while not self.shared.is_stored and self._reactor.seconds() < deadline:
            await deferLater(self._reactor, LEAVE_POLL)
        self.nodes.leave(lambda reply, error: ended.callback(None))
        await ended

    def sweep(self, now: float, limit: int = 1000) -> bool:
        """See `BrokerCore.sweep`; also announce this node, and renew what it has in Redis."""
        self.nodes.tick()
        more = self.shared.renew(now)
        if self._has_limit:
            self._connections.renew(now)
        return super().sweep(now, limit) or more

    def has_expirable(self) -> bool:
        """Whether `sweep` has to be called: always."""
        return True

    # Orders and nodes

    def attach(self, peer: Link, address: str = "", slot: str = "") -> None:
        """See `BrokerCore`. The other nodes learn of the worker at once, as its answers count in their surveys."""
        super().attach(peer, address, slot)
        self.nodes.tick()

    def send_order(self, peer: Link, now: float, request: SendOrder) -> int:
        """See `SendOrder`. Without Redis, an order to all reaches the workers of this node, and fails all the same."""
        node, _ = split_address(request.worker)
        if request.worker and (node in ("", self._node) or request.session in self._sessions):
            return super().send_order(peer, now, request)
        reply = self.links.postpone()
        if request.worker:
            self.nodes.send_to(node, request.worker, request.session, request.order, reply)
            return 0

        def sent(others: int, error: Exception | None) -> None:
            # Here, as the order of this node's own orders and publications is that in which Redis executes them.
            own = BrokerCore.send_order(self, peer, now, request)
            reply(own + others, error)

        self.nodes.send_to_all(request.order, sent)
        return 0

    def _on_order(self, message: NodeOrder) -> None:
        """Deliver an order of another node."""
        recipients = list(self._peers)
        if not message.worker:
            self._leases.note_order()
        if message.worker:
            recipient = self._sessions.get(message.session) or self._peer_at(message.worker)
            recipients = [] if recipient is None else [recipient]
        if recipients:
            self._delivery.deliver_order(recipients, message.order)

    def get_nodes(self, peer: Link, now: float, request: GetNodes) -> list[NodeInfo]:
        """See `GetNodes`."""
        return self.nodes.infos()

    # Roles

    def hold_role(self, peer: Link, now: float, request: HoldRole) -> Term:
        """See `HoldRole`."""
        self._redis_roles.hold(request, self.links.postpone())
        return Term(0, 0.0)

    def resign_role(self, peer: Link, now: float, request: ResignRole) -> None:
        """See `ResignRole`."""
        reply = self.links.postpone()

        def resigned(was_holder: bool, error: Exception | None) -> None:
            if was_holder:
                self._delivery.deliver_order(list(self._peers), request.order)
                self.nodes.send_to_all(request.order, lambda others, failure: reply(None, failure))
            else:
                reply(None, error)

        self._redis_roles.resign(request, resigned)

    # Values of caches

    def fetch_value(self, peer: Link, now: float, request: FetchValue) -> FoundValue:
        """See `FetchValue`."""
        self._values.fetch(request, self.links.postpone())
        return FoundValue(ValueState.HELD)

    def store_value(self, peer: Link, now: float, request: StoreValue) -> bool:
        """See `StoreValue`."""
        self._values.store(request, self.links.postpone())
        return False

    def drop_values(self, peer: Link, now: float, request: DropValues) -> None:
        """See `DropValues`."""
        self._values.drop(request, self.links.postpone())

    # Presence

    def on_present(self, channel: str, entry: PresenceEntry, *, is_new: bool, announce: bool) -> None:
        """See `PresenceListener`."""
        self.shared.put(channel, entry, is_new=is_new, announce=announce)

    def on_absent(self, channel: str, entry: PresenceEntry) -> None:
        """See `PresenceListener`."""
        self.shared.remove(channel, entry)

    def add_presence(self, peer: Link, now: float, request: AddPresence) -> None:
        """See `AddPresence`."""
        BrokerCore.add_presence(self, peer, now, request)
        self.shared.when_stored(request.channel, self.links.postpone())

    def remove_presence(self, peer: Link, now: float, request: RemovePresence) -> None:
        """See `RemovePresence`. It never fails: what Redis does not learn now it learns when it is back."""
        super().remove_presence(peer, now, request)
        reply = self.links.postpone()
        self.shared.when_stored(request.channel, lambda answer, error: reply(None))

    def get_presence(self, peer: Link, now: float, request: GetPresence) -> dict[str, ClientInfo]:
        """See `GetPresence`."""
        if self._shared_listings.has(peer, request.listing):
            return self._shared_listings.page(now, peer, request.listing)
        reply = self.links.postpone()

        def listed(clients: Any, error: Exception | None) -> None:
            if error is not None:
                reply(None, error)
            elif not request.listing:
                reply({info.client: info for info in clients})
            elif peer in self._peers:
                try:
                    reply(self._shared_listings.page(now, peer, request.listing, clients))
                except ClientError as refusal:
                    reply(None, refusal)

        self.shared.present(request.channel, listed)
        return {}

    def get_presence_stats(self, peer: Link, now: float, request: GetPresenceStats) -> tuple[int, int]:
        """See `GetPresenceStats`."""
        self.shared.count(request.channel, self.links.postpone())
        return 0, 0

    def leave_steps(self, peer: Link, now: float) -> Iterator[None]:
        """See `BrokerCore`."""
        self._shared_listings.drop(peer)
        return super().leave_steps(peer, now)

    # Connections of users

    def admit_client(self, peer: Link, now: float, request: AdmitClient) -> bool:
        """See `AdmitClient`. While Redis is away, the connections of this node alone count."""
        info = request.info
        if not (request.limit and info.user):
            return super().admit_client(peer, now, request)
        self._has_limit = True
        reply = self.links.postpone()
        BrokerCore._add_client(self, peer, info)  # Redis learns of it by the admission

        def admitted(is_admitted: bool) -> None:
            if not is_admitted and peer in self._peers:
                self._remove_client(peer, info.client)
            reply(is_admitted)

        self._connections.admit(info.user, request.limit, admitted)
        return False

    def _add_client(self, peer: Link, info: ClientInfo) -> None:
        super()._add_client(peer, info)
        if self._has_limit and info.user:
            self._connections.changed(info.user)

    def _remove_connection(self, user: str) -> None:
        super()._remove_connection(user)
        if self._has_limit and user:
            self._connections.changed(user)
