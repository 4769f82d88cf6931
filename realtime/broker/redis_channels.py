"""The channels with a route on this node: their subscriptions at Redis, and their positions across outages.

A channel is *continuous* while its subscription lasts: each message published since arrives once, in order. When the
subscription ends against our will (a lost connection, a server that has other data, a slot that moved), the channel is
subscribed again as soon as its server is there, and in the same write its history is read from the last position on.
Nothing else of the channel is delivered or answered before that check:

* The history has all publications behind the position: they are delivered, and subscribers notice nothing.
* It has not, or the epoch is another one: the workers learn that publications are missing, and inform the positioned
  subscribers.

Joins and leaves are in no history. Subscribers that receive them are informed after every interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol

from twisted.logger import Logger

from realtime.broker.delivery import Reply
from realtime.broker.redis_messages import BadMessage, ChannelPublication, decode_entry, decode_position
from realtime.errors import EngineUnavailable
from realtime.metrics import Metrics
from realtime.pubsub.engine import PAGE_BYTES
from realtime.redis.keys import key
from realtime.redis.scripts import Script
from realtime.redis.servers import RedisServer
from realtime.repetition import Repetition
from realtime.types import Position

_log = Logger()


RETRY_INTERVAL = 0.5
"""Seconds until a subscription that Redis has refused or ended is tried again."""


SLICE = 200
"""Channels that are subscribed again in one turn of the loop: about 2 ms."""


class NodeChannel:
    """A channel with a route, until Redis has confirmed the end of its subscription; or a name of the engine's own.

    name: of its pub/sub channel. server: that has it. is_wanted: the last command was to subscribe, so that messages
    published behind it come back. is_continuous: subscribed and checked. position: of the last publication that was
    delivered, None if unknown. commands: counts them, as only the confirmation of the last one counts. waiting: replies
    to requests to subscribe. handle: gets the messages of a name of the engine's own, None for a channel.
    """

    __slots__ = ("channel", "commands", "handle", "is_continuous", "is_wanted", "name", "position", "server", "waiting")

    def __init__(
        self, channel: str, name: bytes, server: RedisServer, handle: Callable[[bytes], None] | None = None
    ) -> None:
        self.channel = channel
        self.name = name
        self.server = server
        self.handle = handle
        self.is_wanted = self.is_continuous = False
        self.position: Position | None = None
        self.commands = 0
        self.waiting: list[Reply] = []

    def answer(self, error: Exception | None = None) -> None:
        """Answer the requests to subscribe."""
        waiting, self.waiting = self.waiting, []
        for reply in waiting:
            reply(None, error)


class ChannelOwner(Protocol):
    """The holder of the routes."""

    def has_route(self, channel: str) -> bool:
        """Whether the channel has a route."""

    def find_server(self, channel: str) -> RedisServer:
        """Return the server that has the channel now."""

    def history_script(self, server: RedisServer) -> Script:
        """Return the script that reads pages, see `ChannelScripts.history`."""

    def deliver_missed(self, channel: NodeChannel, publication: ChannelPublication) -> None:
        """Deliver a publication that the history had."""

    def on_missed(self, channel: str, *, publications: bool) -> None:
        """Handle missing joins and leaves, and with `publications` missing publications."""


class NodeChannels:
    """See the module. prefix: of keys."""

    def __init__(self, owner: ChannelOwner, prefix: str, reactor: Any, metrics: Metrics) -> None:
        self._owner = owner
        self._prefix = prefix
        self._reactor = reactor
        self._refused: set[NodeChannel] = set()  # those to try again
        self._timer: Any = None
        self._due: dict[NodeChannel, None] = {}  # those to subscribe in the next turns
        self._slice: Any = None
        self._reports: Repetition[str] = Repetition()
        self._by_channel: dict[str, NodeChannel] = {}
        self._by_name: dict[bytes, NodeChannel] = {}
        self.named: Callable[[bytes], NodeChannel | None] = self._by_name.get
        self.get: Callable[[str], NodeChannel | None] = self._by_channel.get
        help = "Channels that were checked after an interruption of Redis, by whether publications were missing."
        self._kept, self._broken = (
            metrics.counter("realtime_redis_checked_channels", help, result=result) for result in ("kept", "missing")
        )
        self._recovered = metrics.counter(
            "realtime_redis_recovered_publications", "Publications delivered after an interruption of Redis."
        )

    def __iter__(self) -> Iterator[NodeChannel]:
        return iter(list(self._by_name.values()))

    def listen(self, name: str, handle: Callable[[bytes], None]) -> None:
        """Subscribe to a name of the engine's own, whenever its server is there."""
        own_name = key(self._prefix, "node", name)
        self._by_name[own_name] = known = NodeChannel(name, own_name, self._owner.find_server(name), handle)
        self._subscribe(known)

    def close_all(self) -> None:
        """Try nothing again."""
        for timer in (self._timer, self._slice):
            if timer is not None:
                timer.cancel()
        self._timer = self._slice = None

    def _is_needed(self, known: NodeChannel) -> bool:
        return known.handle is not None or self._owner.has_route(known.channel)

    def open(self, channel: str) -> None:
        """Subscribe to a channel that has its first route now."""
        known = self._by_channel.get(channel)
        if known is None:
            name = key(self._prefix, "channel", channel)
            known = NodeChannel(channel, name, self._owner.find_server(channel))
            self._by_channel[channel] = self._by_name[name] = known
        known.position = None
        self._subscribe(known)

    def close(self, channel: str) -> None:
        """Unsubscribe from a channel that has no route any more."""
        known = self._by_channel[channel]
        known.commands = command = known.commands + 1
        known.is_wanted = known.is_continuous = False
        known.answer(EngineUnavailable("unsubscribed meanwhile"))

        def confirmed(reply: Any, error: Exception | None) -> None:
            if command == known.commands:
                self._forget(known)

        known.server.unsubscribe(known.name, confirmed)

    def _forget(self, known: NodeChannel) -> None:
        del self._by_channel[known.channel], self._by_name[known.name]
        self._refused.discard(known)
        self._due.pop(known, None)

    def _subscribe(self, known: NodeChannel, *, again: bool = False) -> None:
        """again: after an interruption."""
        known.commands = command = known.commands + 1
        known.is_wanted = known.server.is_ready
        if not known.is_wanted:
            return

        def confirmed(reply: Any, error: Exception | None) -> None:
            if command != known.commands:
                return
            if error is not None:
                known.is_wanted = False
                self._report(error, "can't subscribe to channel {channel!r}: {error}", known)
                known.answer(error)
                self._try_again(known)
            elif known.position is None:
                self._continue(known, again=again, is_complete=False)

        known.server.subscribe(known.name, confirmed)
        if known.position is not None:
            self._check(known, known.position, command)

    def _try_again(self, known: NodeChannel) -> None:
        self._refused.add(known)
        if self._timer is None:
            self._timer = self._reactor.callLater(RETRY_INTERVAL, self._retry)

    def _retry(self) -> None:
        self._timer = None
        refused, self._refused = self._refused, set()
        for known in refused:
            known.server = self._owner.find_server(known.channel)
        self._subscribe_soon(refused)

    def _subscribe_soon(self, channels: Iterable[NodeChannel]) -> None:
        """Subscribe again, the first channels now, and the others in the next turns or by `resume`."""
        self._due.update(dict.fromkeys(channels))
        if self._slice is None:
            self._subscribe_slice()

    def _subscribe_slice(self) -> None:
        self._slice = None
        for known in list(islice(self._due, SLICE)):
            self.resume(known)
        if self._due:
            self._slice = self._reactor.callLater(0, self._subscribe_slice)

    def resume(self, known: NodeChannel) -> None:
        """Subscribe now to a channel that waits for its turn: a request for it must not be carried out before."""
        if known in self._due:
            del self._due[known]
            if not known.is_wanted and self._is_needed(known):
                self._subscribe(known, again=True)

    def _check(self, known: NodeChannel, position: Position, command: int) -> None:
        """Read the publications behind the position."""

        def read(page: Any, error: Exception | None) -> None:
            if command != known.commands or not known.is_wanted:
                return
            try:
                missed = _missed_since(position, page) if error is None else None
            except BadMessage as bad:
                missed, error = None, bad
            if error is not None:
                self._report(
                    error,
                    "can't read the history of channel {channel!r} after an interruption: {error};"
                    " its positioned subscribers start anew",
                    known,
                )
            for publication in missed or ():
                self._recovered.value += 1
                self._owner.deliver_missed(known, publication)
            self._continue(known, again=True, is_complete=missed is not None)

        keys = [key(self._prefix, kind, known.channel) for kind in ("meta", "history")]
        terms: list[bytes | str | int] = ["", "", -1, position.offset, PAGE_BYTES]
        known.server.run(read, self._owner.history_script(known.server), keys, terms)

    def _report(self, error: Exception, line: str, known: NodeChannel) -> None:
        if isinstance(error, EngineUnavailable):
            return
        if self._reports.admit(known.channel, self._reactor.seconds()) is not None:
            _log.error(line, channel=known.channel, error=error)

    def _continue(self, known: NodeChannel, *, again: bool, is_complete: bool) -> None:
        """Pass everything on from now on. is_complete: no publication is missing."""
        known.is_continuous = True
        if again and known.handle is None:
            (self._kept if is_complete else self._broken).value += 1
            if not is_complete:
                known.position = None
            self._owner.on_missed(known.channel, publications=not is_complete)
        known.answer()

    # Servers

    def on_ready(self, server: RedisServer) -> None:
        """Subscribe again to the channels of a server."""
        of_server = [known for known in self if known.server is server and self._is_needed(known)]
        of_server.sort(key=lambda known: known.handle is None)  # orders first
        self._subscribe_soon(of_server)

    def on_lost(self, server: RedisServer, error: Exception) -> None:
        """Hold the positions of the channels of a server, and fail the requests to subscribe."""
        for known in self:
            if known.server is server:
                self._end(known, error)

    def on_unsubscribed(self, server: RedisServer, name: bytes) -> None:
        """Handle the end of a subscription that Redis has ended."""
        known = self._by_name.get(name)
        if known is not None and known.server is server and known.is_wanted:
            self._end(known, EngineUnavailable("Redis has ended the subscription"))
            self._try_again(known)

    def _end(self, known: NodeChannel, error: Exception) -> None:
        known.commands += 1
        known.is_wanted = known.is_continuous = False
        known.answer(error)
        if not self._is_needed(known):
            self._forget(known)

    def on_moved(self) -> set[RedisServer]:
        """Move channels to the servers that have them now. Return their servers before."""
        left: set[RedisServer] = set()
        for known in self:
            server = self._owner.find_server(known.channel)
            if server is not known.server:
                left.add(known.server)
                known.server.unsubscribe(known.name)
                known.server = server
                known.is_continuous = False
                if self._is_needed(known):
                    self._subscribe(known, again=True)
                else:
                    known.commands += 1
                    self._forget(known)
        return left


def _missed_since(position: Position, page: Any) -> list[ChannelPublication] | None:
    """Return the publications of a page that continue a position up to the top; None if they don't. Raises BadMessage.

    page: an answer of `ChannelScripts.history`.
    """
    if not page:
        return None  # the metadata are gone, or of other data
    packed, first, *entries = page
    top, epoch = decode_position(packed)
    if epoch != position.epoch or position.offset + len(entries) != top or (entries and first != position.offset + 1):
        return None
    return [decode_entry(entry, first + number, epoch) for number, entry in enumerate(entries)]
