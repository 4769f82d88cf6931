"""The broker's core with Redis: channels of all nodes, behind the routes of this node's workers.

The node's broker has one connection to each Redis server, so each message reaches the node once. A channel with a
subscriber on this node is subscribed at Redis, from the first local route to the last. Publications go out by one
command or script each; they come back as messages, which are delivered to the workers with a route.

Order (see `realtime.pubsub.engine`): replies and messages of a server come in the order in which Redis executed the
commands, so an answer counts what was delivered before it, and nothing else. One exception: from Redis 7.2 on, a
message that this node published itself follows the reply. So the answer to a publication that comes back here is sent
when its message arrives, which knows it by its number.

`SharedCore` (`realtime.broker.shared_core`) adds what nodes share besides channels. It handles messages on names of its
own (`listen`), and learns when a server is there or away (`ready`, `lost`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from realtime.broker.delivery import LinkDelivery, Reply
from realtime.broker.redis_channels import NodeChannel, NodeChannels
from realtime.broker.redis_messages import (
    VERSION,
    BadMessage,
    ChannelJoin,
    ChannelLeave,
    ChannelPublication,
    decode,
    decode_entry,
    decode_position,
    encode,
    entry_of,
)
from realtime.broker.redis_scripts import ChannelScripts
from realtime.config.settings import EngineSettings
from realtime.errors import EngineUnavailable
from realtime.metrics import Counter, Metrics
from realtime.process.link import Link
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.broker_messages import BadFrame
from realtime.pubsub.engine import GetHistory, Publish, RemoveHistory, Subscribe
from realtime.pubsub.history import make_epoch
from realtime.redis.connection import ReplyCallback
from realtime.redis.keys import key
from realtime.redis.scripts import Script
from realtime.redis.servers import RedisServer, RedisServers
from realtime.repetition import Repetition
from realtime.supervision.loop_time import LoopTimeLedger
from realtime.types import HistoryPage, NodeInfo, Position

_TARGETS = 10_000
"""Channels whose server and keys are remembered."""

_UNNUMBERED = Position()

_log = Logger()


class _Target(NamedTuple):
    """Where a channel is. name: of its pub/sub channel. keys: of `ChannelScripts.publish`. publish: the command."""

    server: RedisServer
    name: bytes
    keys: tuple[bytes, bytes, bytes]
    scripts: ChannelScripts
    publish: bytes


class RedisCore(BrokerCore[Link]):
    """See the module. sender: identifies this run of the broker in its messages."""

    def __init__(
        self,
        settings: EngineSettings,
        delivery: LinkDelivery,
        publications: Counter,
        describe_node: Callable[[], NodeInfo],
        reactor: Any,
        metrics: Metrics,
        ledger: LoopTimeLedger,
    ) -> None:
        super().__init__(delivery, settings.max_channels, publications, describe_node)
        self.sender = make_epoch()
        self.links = delivery
        self._reactor = reactor
        self._settings = settings.redis
        self._prefix = settings.redis.prefix
        self.ready: list[Callable[[RedisServer], None]] = []
        self.lost: list[Callable[[RedisServer], None]] = []
        self._scripts = {is_cluster: ChannelScripts(is_cluster=is_cluster) for is_cluster in (False, True)}
        self.channels_here = NodeChannels(self, self._prefix, reactor, metrics)
        self._named = self.channels_here.named
        self._known = self.channels_here.get
        self._targets: dict[str, _Target] = {}
        self._refusals: Repetition[str] = Repetition()
        self._number = 0
        # Of messages that come back to this node, and have not yet.
        self._own: dict[int, tuple[RedisServer, Reply]] = {}
        help = "Messages at Redis under our names that no node of this version sent."
        self._bad_messages = metrics.counter("realtime_redis_foreign_messages", help)
        self._errors = metrics.counter("realtime_redis_refusals", "Commands that Redis refused.")
        self.servers = RedisServers(settings.redis, reactor, self, metrics, ledger)

    async def start(self) -> None:
        """Connect to Redis. Returns when all servers are ready, or when the time limit for a connection is over."""
        waiter: Deferred[None] = Deferred()
        timer = self._reactor.callLater(self._settings.connect_timeout, waiter.callback, None)

        def note(server: RedisServer) -> None:
            if all(server.is_ready for server in self.servers.servers) and timer.active():
                timer.cancel()
                waiter.callback(None)

        self.ready.append(note)
        self.servers.start()
        await waiter
        self.ready.remove(note)

    def close(self) -> None:
        """End the connections to Redis."""
        self.channels_here.close_all()
        self.servers.close()

    def key(self, kind: str, name: str) -> bytes:
        """Return a key of a channel, user or node; those of one name lie on one server."""
        return key(self._prefix, kind, name)

    # Publications

    def publish(self, peer: Link, now: float, request: Publish) -> Position:
        """See `Publish`."""
        self._publications.value += 1
        channel, options, links = request.channel, request.history_options, self.links
        target = self._targets.get(channel) or self._target(channel)
        server, name = target.server, target.name
        self._number = number = self._number + 1
        message = encode(
            ChannelPublication(
                VERSION,
                self.sender,
                number,
                request.data,
                request.info,
                request.tags,
                request.delta,
                request.binary,
                0,
                "",
            )
        )
        asker = links.asker
        assert asker is not None
        reply, links.number = Reply(asker, links.number), 0
        known = self._known(channel)
        if known is not None and not known.is_wanted:
            self.channels_here.resume(known)
        comes_back = known is not None and known.is_wanted
        if comes_back:
            self._own[number] = server, reply

        def published(packed: Any, error: Exception | None) -> None:
            if error is not None:
                self._own.pop(number, None)
                reply(None, self._refused(error, channel))
            elif type(packed) is list or packed is None:  # it was published before
                self._own.pop(number, None)
                reply(_position(packed[0]) if packed else _UNNUMBERED)
            elif not comes_back or self._is_gone(channel, number):
                reply(_position(packed) if type(packed) is bytes else _UNNUMBERED)

        if request.idempotency_key or request.version:
            self._publish_once(server, request, target, message, published)
        elif options.enabled:
            ttl, meta_ttl = options.ttl, options.meta_ttl
            # The metadata outlive the history, which would be lost without them.
            life = ttl if ttl > meta_ttl else meta_ttl
            terms = (entry_of(message), options.size, int(ttl * 1000) or 1, int(life * 1000) or 1)
            server.run(published, target.scripts.publish, target.keys, terms)
        else:
            server.call(published, target.publish, name, message)
        return _UNNUMBERED

    def _publish_once(
        self, server: RedisServer, request: Publish, target: _Target, message: bytes, published: ReplyCallback
    ) -> None:
        """Publish with an idempotency key or a version."""
        options, keys = request.history_options, list(target.keys)
        if request.idempotency_key:
            keys.append(self.key("once", request.channel) + request.idempotency_key.encode())
        if options.enabled:
            terms: list[bytes | str | int] = [
                entry_of(message),
                options.size,
                _milliseconds(options.ttl),
                _milliseconds(max(options.ttl, options.meta_ttl)),
            ]
            if request.version:
                terms += [f"{request.version:020}", request.version_epoch]
            server.run(published, target.scripts.publish, keys, terms)
        elif request.idempotency_key:
            server.run(published, target.scripts.publish_once, keys[2:], [message])
        else:
            server.call(published, target.publish, target.name, message)

    def _target(self, channel: str) -> _Target:
        """Return where the channel is, and remember it until servers move."""
        if len(self._targets) >= _TARGETS:
            self._targets.clear()
        server, name = self.servers.of(channel), self.key("channel", channel)
        target = self._targets[channel] = _Target(
            server,
            name,
            (self.key("meta", channel), self.key("history", channel), name),
            self._scripts[server.is_cluster],
            b"SPUBLISH" if server.is_cluster else b"PUBLISH",
        )
        return target

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _is_gone(self, channel: str, number: int) -> bool:
        """Whether an own message that Redis has accepted does not come back after all: the subscription failed."""
        known = self.channels_here.get(channel)
        return (known is None or not known.is_wanted) and self._own.pop(number, None) is not None

    def _refused(self, error: Exception, channel: str) -> Exception:
        """Note an error of a channel's command; return it."""
        if not isinstance(error, EngineUnavailable):
            self._errors.value += 1
            if self._refusals.admit(channel, self._reactor.seconds()) is not None:
                _log.error("Redis refused a command for channel {channel!r}: {error}", channel=channel, error=error)
        return error

    def get_history(self, peer: Link, now: float, request: GetHistory) -> HistoryPage:
        """See `GetHistory`."""
        options = request.history_options
        if not options.enabled:
            return HistoryPage([], _UNNUMBERED)
        channel, reply = request.channel, self.links.postpone()
        server = self.servers.of(channel)
        if (before := self._known(channel)) is not None:
            self.channels_here.resume(before)

        def read(page: Any, error: Exception | None) -> None:
            if error is None:
                try:
                    found = _page(page, step=-1 if request.reverse else 1)
                except BadMessage as bad:
                    error = bad
            if error is not None:
                reply(None, self._refused(error, channel))
                return
            known = self.channels_here.get(channel)
            if known is not None and known.is_continuous:
                known.position = found.position  # all later publications will arrive
            reply(found)

        terms: list[bytes | str | int] = [
            _milliseconds(max(options.ttl, options.meta_ttl)),
            f"{self.sender}{self._next_number()}",
            request.limit,
            "" if request.since is None else request.since.offset,
            request.max_bytes,
        ]
        if request.reverse:
            terms.append(1)
        keys = [self.key("meta", channel), self.key("history", channel)]
        server.run(read, self._scripts[server.is_cluster].history, keys, terms)
        return HistoryPage([], _UNNUMBERED)

    def remove_history(self, peer: Link, now: float, request: RemoveHistory) -> None:
        """See `RemoveHistory`."""
        reply = self.links.postpone()

        def removed(count: Any, error: Exception | None) -> None:
            reply(None, error and self._refused(error, request.channel))

        self.servers.of(request.channel).call(removed, b"DEL", self.key("history", request.channel))

    # Channels of this node: a `ChannelOwner`

    def subscribe(self, peer: Link, now: float, request: Subscribe) -> None:
        """See `Subscribe`. The answer follows the confirmation of Redis, and the check after an interruption."""
        super().subscribe(peer, now, request)
        known = self.channels_here.get(request.channel)
        assert known is not None
        if not known.is_continuous:
            self.channels_here.resume(known)
            reply = self.links.postpone()
            if known.is_wanted:
                known.waiting.append(reply)
            else:
                reply(None, EngineUnavailable("the channel is not subscribed at Redis"))

    def _route(self, channel: str, peer: Link) -> None:
        is_new = channel not in self._routes
        super()._route(channel, peer)
        if is_new:
            self.channels_here.open(channel)

    def _unroute(self, channel: str, peer: Link) -> None:
        super()._unroute(channel, peer)
        if channel not in self._routes:
            self.channels_here.close(channel)

    def has_route(self, channel: str) -> bool:
        """See `ChannelOwner`."""
        return channel in self._routes

    def find_server(self, channel: str) -> RedisServer:
        """See `ChannelOwner`."""
        return self.servers.of(channel)

    def history_script(self, server: RedisServer) -> Script:
        """See `ChannelOwner`."""
        return self._scripts[server.is_cluster].history

    def deliver_missed(self, channel: NodeChannel, publication: ChannelPublication) -> None:
        """See `ChannelOwner`."""
        try:
            self._deliver(channel, publication)
        except BadFrame:
            self._bad_messages.value += 1

    def on_missed(self, channel: str, *, publications: bool) -> None:
        """See `ChannelOwner`."""
        self.links.deliver_missed(self._routes.get(channel, ()), channel, publications=publications)

    # Messages and servers: a `RedisListener`

    def listen(self, name: str, handle: Callable[[bytes], None]) -> None:
        """Handle messages on a pub/sub channel of this engine's own, whenever Redis is there."""
        self.channels_here.listen(name, handle)

    def on_message(self, server: RedisServer, channel: bytes, payload: bytes) -> None:
        """Deliver a message to the workers with a route, and answer the request that it belongs to."""
        known = self._named(channel)
        if known is None:
            return
        if known.handle is not None:
            known.handle(payload)
            return
        try:
            message = decode(payload)
            if not isinstance(message, ChannelPublication):
                self._deliver_presence(known.channel, message)
            elif known.is_continuous or not message.offset:
                self._deliver(known, message)
            # Otherwise the check of the channel will read it.
        except (BadMessage, BadFrame):
            self._bad_messages.value += 1

    def _deliver_presence(self, channel: str, message: ChannelJoin | ChannelLeave) -> None:
        if peers := self._routes.get(channel):
            is_join = isinstance(message, ChannelJoin)
            deliver = self._delivery.deliver_join if is_join else self._delivery.deliver_leave
            deliver(peers, channel, message.info)

    def _deliver(self, known: NodeChannel, message: ChannelPublication) -> None:
        links, channel = self.links, known.channel
        own = self._own.pop(message.number, None) if message.sender == self.sender else None
        if own is None:
            links.number = 0
        else:
            links.asker, links.number = own[1].link, own[1].number
        if message.offset:
            known.position = Position(message.offset, message.epoch)
        if peers := self._routes.get(channel):
            links.deliver_publication(peers, channel, message.publication, message.epoch)
        if own is not None and links.number:
            own[1](Position(message.offset, message.epoch))

    def on_ready(self, server: RedisServer) -> None:
        """See `RedisListener`."""
        self._targets.clear()
        self.channels_here.on_ready(server)
        for function in self.ready:
            function(server)

    def on_lost(self, server: RedisServer, reason: str) -> None:
        """See `RedisListener`."""
        error = EngineUnavailable(reason)
        self._fail_own([number for number, (of, _) in self._own.items() if of is server], error)
        self.channels_here.on_lost(server, error)
        for function in self.lost:
            function(server)

    def on_unsubscribed(self, server: RedisServer, channel: bytes) -> None:
        """See `RedisListener`."""
        self.channels_here.on_unsubscribed(server, channel)

    def on_moved(self) -> None:
        """See `RedisListener`."""
        self._targets.clear()
        for server in self.channels_here.on_moved():
            # Their own messages may not come back. Those that do have arrived before the answer.
            numbers = [number for number, (of, _) in self._own.items() if of is server]
            server.call(partial(self._fail_moved, numbers), "PING")

    def _fail_moved(self, numbers: list[int], reply: Any, error: Exception | None) -> None:
        self._fail_own(numbers, EngineUnavailable("the channel has moved to another server"))

    def _fail_own(self, numbers: list[int], error: Exception) -> None:
        for number in numbers:
            if number in self._own:
                self._own.pop(number)[1](None, error)


def _milliseconds(seconds: float) -> int:
    return max(1, int(seconds * 1000))


def _position(packed: bytes) -> Position:
    return Position(*decode_position(packed)) if packed else _UNNUMBERED


def _page(reply: Any, step: int) -> HistoryPage:
    """Return what the script read."""
    top, first, *entries = reply
    position = _position(top)
    publications = [
        decode_entry(entry, first + step * number, position.epoch).publication for number, entry in enumerate(entries)
    ]
    return HistoryPage(publications, position)
