"""The broker: the process that is the embedded engine. `python -m realtime.broker.process`, started by the supervisor.

It holds the exchange, and a link to each worker. It has no user code and no clients, so it goes on when a worker
dies. What a worker has to do with it, see `realtime.worker.engine`; what they say, `realtime.pubsub.broker_messages`.
"""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger

from realtime.config.settings import EngineSettings
from realtime.errors import INTERNAL_ERROR, LIMIT_EXCEEDED, ClientError
from realtime.metrics import Metrics
from realtime.process import child
from realtime.process.link import PEER_ENDED, Link, adopt
from realtime.pubsub import broker_messages
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.history import make_epoch
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork
from realtime.types import ClientInfo, Publication

SWEEP_INTERVAL = 0.25
"""Seconds between two looks for what is over."""

BEAT_INTERVAL = 1.0
"""Seconds between two beats: nobody's code but ours runs here, so the supervisor need only see that it is not stuck."""

SWEEP_PAUSE = 0.01
"""Seconds until the next look when there was more than one look should free."""

PATIENCE = 0.25
"""The share of a worker's queue that answers may fill before its other requests wait; the rest is for publications."""

_log = Logger()


class Broker:
    """The exchange behind links.

    reactor: twisted's, with monotonic `seconds`. accounts: the loop's, which are charged for its links and its sweeps.
    """

    def __init__(
        self, settings: EngineSettings, metrics: Metrics, reactor: Any, accounts: LoopTimeLedger | None = None
    ) -> None:
        self._accounts = accounts or LoopTimeLedger(time.monotonic_ns)
        timers = self._accounts.open(LoopWork.TIMERS)
        self._sweep_on = self._accounts.charging(timers, self._sweep_on)  # type: ignore[method-assign]
        self._sweeping: object | None = None  # the call that goes on with it
        self.instance = make_epoch()
        self._settings = settings
        self._reactor = reactor
        self.now: Callable[[], float] = reactor.seconds
        self._peers: dict[int, _WorkerPeer] = {}
        self._deserted: Deferred[None] | None = None  # while we drain
        self.exchange: BrokerCore[Link] = BrokerCore(_LinkDelivery(metrics), settings.max_channels)
        metrics.gauge("realtime_broker_channels", "Channels with a subscriber.", lambda: self.exchange.channels)
        metrics.gauge("realtime_broker_streams", "Channels with a history.", lambda: self.exchange.streams)
        metrics.gauge("realtime_broker_backlog_bytes", "Bytes that wait for workers.", self._backlog)
        self.publications = metrics.counter("realtime_broker_publications", "Publications taken from workers.")
        self.requests = metrics.counter("realtime_broker_requests", "Requests worked off.")
        self.cuts = metrics.counter("realtime_broker_cut_links", "Streams to workers that were cut, for any reason.")

    async def drain(self, timeout: float) -> None:
        """Wait until every worker has left. The supervisor ends them before it ends us, but a signal to the whole
        process group reaches all at once, and they still have clients to tell and handlers that publish."""
        self._deserted = Deferred()
        if self._peers:
            await self._deserted

    def attach(self, slot: int, fd: int) -> None:
        """Speak with the worker of this slot over `fd`, which is owned from now on. What was there before is gone."""
        before = self._peers.pop(slot, None)
        if before is not None:
            before.replaced()
        self._peers[slot] = peer = _WorkerPeer(self, str(slot))
        limit = self._settings.queue_max_size
        patience = max(1, int(limit * PATIENCE))
        soon = asyncio.get_running_loop().call_soon
        link = Link(
            self._reactor, soon, broker_messages.ToBroker, limit, peer.receive, self._ended, self._accounts, patience
        )
        peer.begin(link)
        adopt(self._reactor, fd, link)

    def _ended(self, link: Link, reason: str) -> None:
        """A worker is gone, or its link was cut: its clients leave."""
        if reason != PEER_ENDED:
            self.cuts.value += 1
        self.exchange.detach(link)
        for slot, peer in self._peers.items():
            if peer.link is link:
                _log.info("the stream to worker {slot} ended: {reason}", slot=slot, reason=reason)
                del self._peers[slot]
                break
        if not self._peers and self._deserted is not None and not self._deserted.called:
            self._deserted.callback(None)

    def sweep(self) -> None:
        """Free what is over, so much that others need not wait for long. Every SWEEP_INTERVAL seconds."""
        if self.exchange.sweep(self.now()) and self._sweeping is None:
            self._sweeping = self._reactor.callLater(SWEEP_PAUSE, self._sweep_on)

    def _sweep_on(self) -> None:
        self._sweeping = None
        try:
            self.sweep()
        except Exception:
            _log.failure("what is over could not be freed")

    def _backlog(self) -> int:
        return sum(peer.link.backlog for peer in self._peers.values())


class _LinkDelivery:
    """The way out of the exchange: one frame, shared by all links it goes to."""

    def __init__(self, metrics: Metrics) -> None:
        self._routed = metrics.counter("realtime_broker_routed", "Publications handed to workers, once for each.")

    def published(self, peers: Collection[Link], channel: str, publication: Publication, epoch: str) -> None:
        self._routed.value += len(peers)
        _send(peers, broker_messages.Published(channel, publication, epoch))

    def joined(self, peers: Collection[Link], channel: str, info: ClientInfo) -> None:
        _send(peers, broker_messages.Joined(channel, info))

    def left(self, peers: Collection[Link], channel: str, info: ClientInfo) -> None:
        _send(peers, broker_messages.Left(channel, info))

    def instructed(self, peers: Collection[Link], order: bytes) -> None:
        _send(peers, broker_messages.Instructed(order))


def _send(peers: Collection[Link], message: broker_messages.BrokerMessage) -> None:
    frame = broker_messages.pack(message)
    for peer in peers:
        peer.send(frame)


class _WorkerPeer:
    """One worker, for as long as one stream to it lasts: works its messages off."""

    def __init__(self, broker: Broker, address: str) -> None:
        self.link: Link
        self._address = address
        self._broker = broker
        self._exchange = broker.exchange
        self._now = broker.now
        self._returning = False
        # By kind: what gives an answer, and what gets none.
        self._requests: dict[type, Callable[[Any], broker_messages.Answer | None]] = {}
        self._others: dict[type, Callable[[Any], None]] = {broker_messages.Hello: self._hello}

    def begin(self, link: Link) -> None:
        self.link = link
        self._exchange.attach(link, self._address)

    def replaced(self) -> None:
        """Another stream to the same slot came: what this one held goes now, not when its end is noticed."""
        self.link.cut("another stream took its place")
        self._exchange.detach(self.link)

    def receive(self, message: Any) -> None:
        """Work one message off. Raises BadFrame for one that is out of place, and only then."""
        kind = type(message)
        if act := self._requests.get(kind):
            self._broker.requests.value += 1
            answer = self._answer(act, message)
            if message.id:
                self.link.send(answer)
        elif note := self._others.get(kind):
            note(message)
        else:
            raise broker_messages.BadFrame(f"{kind.__name__} is out of place")

    def _answer(
        self, act: Callable[[Any], broker_messages.Answer | None], request: broker_messages.BrokerRequest
    ) -> bytes:
        try:
            return broker_messages.pack(act(request) or broker_messages.Done(request.id))
        except ClientError as error:
            return broker_messages.pack(broker_messages.Failed(request.id, error.code, error.message, error.temporary))
        except broker_messages.BadFrame:
            return broker_messages.pack(broker_messages.Failed(request.id, *LIMIT_EXCEEDED))
        except Exception:
            _log.failure("a request of kind {kind} failed", kind=type(request).__name__)
            return broker_messages.pack(broker_messages.Failed(request.id, *INTERNAL_ERROR))

    # Before and after the greeting

    def _hello(self, message: broker_messages.Hello) -> None:
        if message.version != broker_messages.VERSION:
            raise broker_messages.BadFrame(
                f"the worker speaks version {message.version}, this broker {broker_messages.VERSION}"
            )
        # Its clients left when its last stream to this same broker ended, so now they come back. Another broker's
        # subscribers were never told that anybody left.
        self._returning = message.instance == self._broker.instance
        self._requests = {
            broker_messages.Publish: self._publish,
            broker_messages.Subscribe: self._subscribe,
            broker_messages.History: self._history,
            broker_messages.RemoveHistory: self._remove_history,
            broker_messages.Enter: self._enter,
            broker_messages.Leave: self._leave,
            broker_messages.Presence: self._presence,
            broker_messages.PresenceStats: self._presence_stats,
            broker_messages.TakeCensus: self._census,
            broker_messages.Instruct: self._instruct,
            broker_messages.Admit: self._admit,
        }
        self._others = {
            broker_messages.Restore: self._restore,
            broker_messages.Unsubscribe: self._unsubscribe,
            broker_messages.Connected: self._connected,
            broker_messages.Disconnected: self._disconnected,
            broker_messages.Tally: self._tally,
        }
        self.link.send(broker_messages.pack(broker_messages.Welcome(broker_messages.VERSION, self._broker.instance)))

    def _restore(self, message: broker_messages.Restore) -> None:
        for channel in message.channels:
            self._exchange.subscribe(self.link, channel, again=True)
        for channel, info, present, announce in message.occupants:
            self._exchange.enter(
                self.link, channel, info, present=present, announce=announce, again=True, quiet=not self._returning
            )
        for info in message.clients:
            self._exchange.connected(self.link, info)

    # Requests, and what needs no answer

    def _publish(self, request: broker_messages.Publish) -> broker_messages.Answer:
        self._broker.publications.value += 1
        position = self._exchange.publish(
            self._now(),
            request.channel,
            request.data,
            request.retention,
            request.info,
            request.tags,
            request.idempotency_key,
            request.version,
            request.version_epoch,
            request.delta,
            request.binary,
        )
        return broker_messages.Placed(request.id, position)

    def _subscribe(self, request: broker_messages.Subscribe) -> None:
        self._exchange.subscribe(self.link, request.channel)

    def _unsubscribe(self, message: broker_messages.Unsubscribe) -> None:
        self._exchange.unsubscribe(self.link, message.channel)

    def _history(self, request: broker_messages.History) -> broker_messages.Answer:
        page = self._exchange.history(
            self._now(),
            request.channel,
            request.retention,
            request.since,
            request.limit,
            request.reverse,
            request.max_bytes,
        )
        return broker_messages.Page(request.id, page)

    def _remove_history(self, request: broker_messages.RemoveHistory) -> None:
        self._exchange.remove_history(request.channel)

    def _enter(self, request: broker_messages.Enter) -> None:
        self._exchange.enter(
            self.link, request.channel, request.info, present=request.present, announce=request.announce
        )

    def _leave(self, request: broker_messages.Leave) -> None:
        self._exchange.leave(self.link, request.channel, request.client)

    def _presence(self, request: broker_messages.Presence) -> broker_messages.Answer:
        return broker_messages.Present(request.id, self._exchange.presence(request.channel))

    def _presence_stats(self, request: broker_messages.PresenceStats) -> broker_messages.Answer:
        return broker_messages.Stats(request.id, self._exchange.presence_stats(request.channel))

    def _connected(self, message: broker_messages.Connected) -> None:
        self._exchange.connected(self.link, message.info)

    def _disconnected(self, message: broker_messages.Disconnected) -> None:
        self._exchange.disconnected(self.link, message.client)

    def _tally(self, message: broker_messages.Tally) -> None:
        self._exchange.tally(self.link, message.subscriptions)

    def _census(self, request: broker_messages.TakeCensus) -> broker_messages.Answer:
        return broker_messages.Counted(request.id, self._exchange.census())

    def _instruct(self, request: broker_messages.Instruct) -> broker_messages.Answer:
        return broker_messages.Reached(request.id, self._exchange.instruct(request.order, request.worker))

    def _admit(self, request: broker_messages.Admit) -> broker_messages.Answer:
        return broker_messages.Admitted(request.id, self._exchange.admit(self.link, request.info, request.limit))


async def start(process: child.Child) -> None:
    """Be the broker of this process's supervisor."""
    broker = Broker(process.settings.engine, process.metrics, process.reactor, process.accounts)
    stuck = process.settings.loop.stuck or math.inf
    process.pulse.interval = max(process.pulse.interval, min(BEAT_INTERVAL, stuck / 4))
    process.pulse.chores.add(SWEEP_INTERVAL, broker.sweep, wanted=broker.exchange.perishable)
    process.on_link = broker.attach
    process.on_drain = broker.drain


if __name__ == "__main__":
    sys.exit(child.main(sys.argv[1:], start))
