"""The `Engine` of a worker: it asks the broker process, over a link that the supervisor provides.

The worker's side of the truth is here: which channels it wants, who is present through it, who is connected. With
every fresh stream the broker is told all of that again, so neither a broker that was restarted nor a stream that was
cut leaves it wrong for longer than it takes to connect.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from realtime.config.settings import EngineSettings
from realtime.errors import LIMIT_EXCEEDED, ClientError, EngineUnavailable
from realtime.metrics import Metrics
from realtime.process.link import Link, adopt
from realtime.pubsub import broker_messages
from realtime.pubsub.broker_core import PresenceEntry
from realtime.pubsub.engine import Receiver
from realtime.pubsub.history import PAGE_BYTES
from realtime.supervision.loop_time import LoopTimeLedger
from realtime.types import ClientInfo, EngineStats, HistoryOptions, HistoryPage, Position

REQUEST_LIMIT = broker_messages.FRAME_LIMIT - 1024
"""Bytes of the longest request: what comes of a publication, a little longer than the request, has to fit as well."""

RESTORE_BYTES = 1024 * 1024
"""About how long a Restore gets, unless one entry alone is longer."""

_log = Logger()

T = TypeVar("T")


class _Call:
    """A request that waits for its answer. unsent: its length in bytes while it waits for a stream, then 0."""

    __slots__ = ("answer", "deadline", "request", "unsent")

    def __init__(self, request: broker_messages.BrokerRequest, deadline: float, unsent: int) -> None:
        self.request = request
        self.deadline = deadline
        self.unsent = unsent
        self.answer: Deferred[Any] = Deferred()


class BrokerEngine:
    """An `Engine` whose state is the broker process's.

    Requests fail with EngineUnavailable when the answer takes longer than `publish_timeout`, and when the stream ends
    before it came: whether the broker did what was asked is not known then. Requests made while there is no stream
    wait for one, for that time too. An answered coroutine goes on at once, on the stack that worked off the answer,
    so nothing of the same stream comes in between.

    A channel that was subscribed is asked for on every fresh stream until `unsubscribe`, also when `subscribe` failed.

    reactor: twisted's. on_lost: called when the stream has ended, to have the supervisor provide another. accounts: the
    loop's, which are charged for the stream.
    """

    def __init__(
        self,
        receiver: Receiver,
        settings: EngineSettings,
        metrics: Metrics,
        reactor: Any,
        on_lost: Callable[[], None],
        accounts: LoopTimeLedger | None = None,
    ) -> None:
        self._accounts = accounts
        self._receiver = receiver
        self._settings = settings
        self._reactor = reactor
        self._on_lost = on_lost
        self._link: Link | None = None
        self._instance = ""  # of the broker that we last spoke with
        self._attached = False  # whether there ever was a stream
        self._closed = False
        self._calls: dict[int, _Call] = {}  # in the order of their deadlines
        self._last_id = 0
        self._unsent = 0  # bytes of calls that wait for a stream
        self._timer: IDelayedCall | None = None
        self._channels: set[str] = set()
        self._occupants: dict[tuple[str, str], PresenceEntry] = {}  # by channel and client
        self._clients: dict[str, ClientInfo] = {}
        self._subscriptions = 0
        # By kind: what comes and is no answer.
        self._unasked: dict[type, Callable[[Any], None]] = {
            broker_messages.Published: self._published,
            broker_messages.Joined: self._joined,
            broker_messages.Left: self._left,
            broker_messages.Instructed: self._instructed,
            broker_messages.Welcome: self._welcomed,
        }
        self._requests = metrics.counter("realtime_engine_requests", "Requests to the engine.")
        self._timeouts = metrics.counter("realtime_engine_timeouts", "Requests to the engine not answered in time.")
        self._lost = metrics.counter("realtime_engine_lost_links", "Streams to the engine that ended.")
        metrics.gauge("realtime_engine_waiting", "Requests that wait for the engine.", lambda: len(self._calls))

    # The stream

    def attach(self, fd: int) -> None:
        """Go on over this stream, in place of the one before, if any. Takes ownership of `fd`.

        Before it returns, the broker was sent all that this worker holds and the requests that waited; then, unless
        it is the first stream, `Receiver.interrupted` was called.
        """
        if self._closed:
            os.close(fd)
            return
        if self._link is not None:
            self._link.cut("another stream took its place")
            self._fail(list(self._calls), "the broker was lost")
        frames = [broker_messages.pack(message) for message in (*self._introduction(), *self._take_unsent())]
        # These are as long as what we hold anyway; the limit is for what comes on top.
        limit = self._settings.queue_max_size + sum(map(len, frames))
        soon = asyncio.get_running_loop().call_soon
        self._link = link = Link(
            self._reactor, soon, broker_messages.ToWorker, limit, self._receive, self._ended, self._accounts
        )
        adopt(self._reactor, fd, link)
        for frame in frames:
            link.send(frame)
        again, self._attached = self._attached, True
        if again:
            self._receiver.interrupted()

    def close(self) -> None:
        """Leave the broker for good: what was sent goes out; what waits for an answer fails, as does all from now on.

        `on_lost` is not called.
        """
        self._closed = True
        link, self._link = self._link, None
        if link is not None:
            link.close()
        self._fail(list(self._calls), "this worker is leaving")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _introduction(self) -> Iterator[broker_messages.BrokerMessage]:
        yield broker_messages.Hello(broker_messages.VERSION, self._instance)
        for channels in _parts(self._channels, len):
            yield broker_messages.Restore(channels, [], [])
        occupants = ((channel, o.info, o.present, o.announce) for (channel, _), o in self._occupants.items())
        for some in _parts(occupants, lambda entry: len(entry[1].conn_info) + len(entry[1].chan_info)):
            yield broker_messages.Restore([], some, [])
        for clients in _parts(self._clients.values(), lambda info: len(info.user)):
            yield broker_messages.Restore([], [], clients)
        yield broker_messages.Tally(self._subscriptions)

    def _take_unsent(self) -> Iterator[broker_messages.BrokerMessage]:
        for call in self._calls.values():
            yield call.request
            call.unsent = 0
            # What was given up since: there may have been no room for the request that takes it back.
            match call.request:
                case broker_messages.Subscribe(channel=channel) if channel not in self._channels:
                    yield broker_messages.Unsubscribe(channel)
                case broker_messages.Enter(channel=channel, info=info) if (channel, info.client) not in self._occupants:
                    yield broker_messages.Leave(0, channel, info.client)
        self._unsent = 0

    def _ended(self, link: Link, reason: str) -> None:
        self._lost.value += 1
        if link is not self._link:
            return
        _log.warn("the stream to the broker ended: {reason}", reason=reason)
        self._link = None
        self._fail(list(self._calls), "the broker was lost")
        self._on_lost()

    def _fail(self, numbers: list[int], reason: str) -> None:
        calls = [self._calls.pop(number) for number in numbers]
        for call in calls:
            self._unsent -= call.unsent
        for call in calls:
            call.answer.errback(EngineUnavailable(reason))

    # Requests

    def _ask(self, kind: Callable[..., broker_messages.BrokerRequest], *fields: object) -> Deferred[Any]:
        """Send a request; what it comes to. Raises ClientError 106 when it is too long for a frame."""
        if self._closed:
            raise EngineUnavailable("this worker is leaving")
        self._requests.value += 1
        self._last_id += 1
        request = kind(self._last_id, *fields)
        try:
            frame = broker_messages.pack(request)
        except broker_messages.BadFrame:
            raise ClientError(*LIMIT_EXCEEDED) from None
        if len(frame) > REQUEST_LIMIT:
            raise ClientError(*LIMIT_EXCEEDED)
        unsent = 0
        if self._link is not None:
            self._link.send(frame)
        else:
            unsent = len(frame)
            if self._unsent + unsent > self._settings.queue_max_size:
                raise EngineUnavailable("there is no broker, and too much waits for one")
            self._unsent += unsent
        timeout = self._settings.publish_timeout
        self._calls[self._last_id] = call = _Call(request, self._reactor.seconds() + timeout, unsent)
        if self._timer is None:
            self._timer = self._reactor.callLater(timeout, self._expire)
        return call.answer

    def _expire(self) -> None:
        """Fail what has waited for too long, and look again when the next call will have."""
        now = self._reactor.seconds()
        late = []
        self._timer = None
        for number, call in self._calls.items():
            if call.deadline > now:
                self._timer = self._reactor.callLater(call.deadline - now, self._expire)
                break
            late.append(number)
        self._timeouts.value += len(late)
        self._fail(late, "the broker did not answer in time")

    def _tell(self, message: broker_messages.BrokerMessage) -> None:
        """Send what needs no answer. Without a stream there is no need to: the next one begins with all we hold."""
        if self._link is not None:
            self._link.send(broker_messages.pack(message))

    # What comes in

    def _receive(self, message: Any) -> None:
        kind = type(message)
        if take := self._unasked.get(kind):
            take(message)
            return
        call = self._calls.pop(message.id, None)
        if call is None:
            return  # it came too late
        if kind is broker_messages.Failed:
            call.answer.errback(ClientError(message.code, message.message, message.temporary))
        else:
            call.answer.callback(message.result)

    def _published(self, message: broker_messages.Published) -> None:
        self._receiver.published(message.channel, message.publication, message.epoch)

    def _joined(self, message: broker_messages.Joined) -> None:
        self._receiver.joined(message.channel, message.info)

    def _left(self, message: broker_messages.Left) -> None:
        self._receiver.left(message.channel, message.info)

    def _instructed(self, message: broker_messages.Instructed) -> None:
        self._receiver.instructed(message.order)

    def _welcomed(self, message: broker_messages.Welcome) -> None:
        if message.version != broker_messages.VERSION:
            raise broker_messages.BadFrame(
                f"the broker speaks version {message.version}, this worker {broker_messages.VERSION}"
            )
        self._instance = message.instance

    # Engine

    async def publish(
        self,
        channel: str,
        data: bytes,
        *,
        retention: HistoryOptions,
        info: ClientInfo | None = None,
        tags: dict[str, str] | None = None,
        idempotency_key: str = "",
        version: int = 0,
        version_epoch: str = "",
        delta: bool = False,
        binary: bool = False,
    ) -> Position:
        return await self._ask(
            broker_messages.Publish,
            channel,
            data,
            retention,
            info,
            tags,
            idempotency_key,
            version,
            version_epoch,
            delta,
            binary,
        )

    async def subscribe(self, channel: str) -> None:
        self._channels.add(channel)
        await self._ask(broker_messages.Subscribe, channel)

    def unsubscribe(self, channel: str) -> None:
        self._channels.discard(channel)
        self._tell(broker_messages.Unsubscribe(channel))

    async def history(
        self,
        channel: str,
        *,
        retention: HistoryOptions,
        since: Position | None = None,
        limit: int = 0,
        reverse: bool = False,
        max_bytes: int = PAGE_BYTES,
    ) -> HistoryPage:
        return await self._ask(broker_messages.History, channel, retention, since, limit, reverse, max_bytes)

    async def remove_history(self, channel: str) -> None:
        await self._ask(broker_messages.RemoveHistory, channel)

    async def enter(self, channel: str, info: ClientInfo, *, present: bool, announce: bool) -> None:
        occupant = PresenceEntry(info, present, announce)
        before = self._occupants.get((channel, info.client))
        self._occupants[channel, info.client] = occupant
        try:
            await self._ask(broker_messages.Enter, channel, info, present, announce)
        except (EngineUnavailable, ClientError):
            # One that was there before stays; the next stream begins with what it is now.
            if before is None and self._occupants.get((channel, info.client)) is occupant:
                del self._occupants[channel, info.client]
                self._tell(broker_messages.Leave(0, channel, info.client))
            raise

    async def leave(self, channel: str, client: str) -> None:
        self._occupants.pop((channel, client), None)
        await self._ask(broker_messages.Leave, channel, client)

    async def presence(self, channel: str) -> dict[str, ClientInfo]:
        return await self._ask(broker_messages.Presence, channel)

    async def presence_stats(self, channel: str) -> tuple[int, int]:
        return await self._ask(broker_messages.PresenceStats, channel)

    def connected(self, info: ClientInfo) -> None:
        self._clients[info.client] = info = ClientInfo(info.user, info.client)  # all that is counted
        self._tell(broker_messages.Connected(info))

    async def admit(self, info: ClientInfo, limit: int) -> bool:
        info = ClientInfo(info.user, info.client)
        try:
            admitted = await self._ask(broker_messages.Admit, info, limit)
        except BaseException:
            # The broker may have counted it all the same, or do so when it gets to it.
            self._tell(broker_messages.Disconnected(info.client))
            raise
        if admitted:
            # From now on every stream begins with it. Those that ended before the answer have taken their count along.
            self._clients[info.client] = info
        return admitted

    def disconnected(self, client: str) -> None:
        if self._clients.pop(client, None) is not None:
            self._tell(broker_messages.Disconnected(client))

    def tally(self, subscriptions: int) -> None:
        self._subscriptions = subscriptions
        self._tell(broker_messages.Tally(subscriptions))

    async def census(self) -> EngineStats:
        return await self._ask(broker_messages.TakeCensus)

    async def instruct(self, order: bytes, *, worker: str = "") -> int:
        return await self._ask(broker_messages.Instruct, order, worker)


def _parts(things: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """The things in lists of about RESTORE_BYTES, going by their `size` and 256 bytes for the rest of each."""
    part: list[T] = []
    room = RESTORE_BYTES
    for thing in things:
        room -= size(thing) + 256
        if room < 0 and part:
            yield part
            part, room = [], RESTORE_BYTES - size(thing)
        part.append(thing)
    if part:
        yield part
