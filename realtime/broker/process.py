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
from realtime.pubsub.broker_messages import BadFrame
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
_decode = broker_messages.message_decoder(broker_messages.TO_BROKER)


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
        publications = metrics.counter("realtime_broker_publications", "Publications taken from workers.")
        self.core: BrokerCore[Link] = BrokerCore(_LinkDelivery(metrics), settings.max_channels, publications)
        metrics.gauge("realtime_broker_channels", "Channels with a subscriber.", lambda: self.core.channels)
        metrics.gauge("realtime_broker_streams", "Channels with a history.", lambda: self.core.streams)
        metrics.gauge("realtime_broker_backlog_bytes", "Bytes that wait for workers.", self._backlog)
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
        link = Link(self._reactor, soon, limit, peer.receive, self._ended, self._accounts, patience)
        peer.begin(link)
        adopt(self._reactor, fd, link)

    def _ended(self, link: Link, reason: str) -> None:
        """A worker is gone, or its link was cut: its clients leave."""
        if reason != PEER_ENDED:
            self.cuts.value += 1
        self.core.detach(link)
        for slot, peer in self._peers.items():
            if peer.link is link:
                _log.info("the stream to worker {slot} ended: {reason}", slot=slot, reason=reason)
                del self._peers[slot]
                break
        if not self._peers and self._deserted is not None and not self._deserted.called:
            self._deserted.callback(None)

    def sweep(self) -> None:
        """Free what is over, so much that others need not wait for long. Every SWEEP_INTERVAL seconds."""
        if self.core.sweep(self.now()) and self._sweeping is None:
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
    """Delivers to workers: one frame, shared by all links it goes to."""

    def __init__(self, metrics: Metrics) -> None:
        self._routed = metrics.counter("realtime_broker_routed", "Publications handed to workers, once for each.")

    def deliver_publication(self, peers: Collection[Link], channel: str, publication: Publication, epoch: str) -> None:
        self._routed.value += len(peers)
        _send(peers, broker_messages.Published(channel, publication, epoch))

    def deliver_join(self, peers: Collection[Link], channel: str, info: ClientInfo) -> None:
        _send(peers, broker_messages.Joined(channel, info))

    def deliver_leave(self, peers: Collection[Link], channel: str, info: ClientInfo) -> None:
        _send(peers, broker_messages.Left(channel, info))

    def deliver_order(self, peers: Collection[Link], order: bytes) -> None:
        _send(peers, broker_messages.OrderSent(order))


def _send(peers: Collection[Link], message: broker_messages.BrokerMessage) -> None:
    frame = broker_messages.pack(message)
    for peer in peers:
        peer.send(frame)


class _WorkerPeer:
    """One worker, for as long as one stream to it lasts: carries out its requests."""

    def __init__(self, broker: Broker, address: str) -> None:
        self.link: Link
        self._address = address
        self._broker = broker
        self._core = broker.core
        self._now = broker.now
        self._is_returning = False
        # By kind; no request is in place before the greeting.
        self._requests: dict[type, Callable[[Link, float, Any], Any]] = {}
        self._others: dict[type, Callable[[Link, float, Any], None]] = {broker_messages.Hello: self._hello}

    def begin(self, link: Link) -> None:
        """Register with the core."""
        self.link = link
        self._core.attach(link, self._address)

    def replaced(self) -> None:
        """Drop this peer's state now, as its slot has another stream, and not when the end of this one is noticed."""
        self.link.cut("another stream took its place")
        self._core.detach(self.link)

    def receive(self, number: int, body: bytes) -> None:
        """Carry out one message. Raises BadFrame for one that is invalid or out of place, and only then."""
        try:
            message = _decode(body)
        except (ValueError, RecursionError) as error:
            # msgspec's own errors and UnicodeDecodeError are ValueErrors.
            raise BadFrame(f"not a message: {error}") from error
        kind = type(message)
        if operation := self._requests.get(kind):
            self._broker.requests.value += 1
            answer = self._answer(operation, message, number)
            if number:
                self.link.send(answer)
        elif note := self._others.get(kind):
            note(self.link, self._now(), message)
        else:
            raise BadFrame(f"{kind.__name__} is out of place")

    def _answer(self, operation: Callable[[Link, float, Any], Any], request: Any, number: int) -> bytes:
        """Carry out a request; returns the frame of its answer."""
        try:
            return broker_messages.pack(operation(self.link, self._now(), request), number)
        except ClientError as error:
            return _failed(number, error.code, error.message, error.temporary)
        except BadFrame:
            return _failed(number, *LIMIT_EXCEEDED)
        except Exception:
            _log.failure("a request of kind {kind} failed", kind=type(request).__name__)
            return _failed(number, *INTERNAL_ERROR)

    def _hello(self, link: Link, now: float, message: broker_messages.Hello) -> None:
        if message.version != broker_messages.VERSION:
            raise BadFrame(f"the worker speaks version {message.version}, this broker {broker_messages.VERSION}")
        # When its previous stream to this same broker ended, its clients left; now they join again. The subscribers
        # of another broker never received those leaves, so they receive no joins either.
        self._is_returning = message.instance == self._broker.instance
        operations = self._core.operations
        self._requests = {kind: operations[kind] for kind in broker_messages.REQUESTS}
        self._others = {kind: operations[kind] for kind in broker_messages.NOTICES}
        self._others[broker_messages.Restore] = self._restore
        link.send(broker_messages.pack(broker_messages.Welcome(broker_messages.VERSION, self._broker.instance)))

    def _restore(self, link: Link, now: float, message: broker_messages.Restore) -> None:
        self._core.restore(link, message.channels, message.presence, message.clients, announce=self._is_returning)


def _failed(number: int, code: int, message: str, temporary: bool) -> bytes:
    return broker_messages.pack(broker_messages.RequestFailed(number, code, message, temporary))


async def start(process: child.Child) -> None:
    """Be the broker of this process's supervisor."""
    broker = Broker(process.settings.engine, process.metrics, process.reactor, process.accounts)
    stuck = process.settings.loop.stuck or math.inf
    process.pulse.interval = max(process.pulse.interval, min(BEAT_INTERVAL, stuck / 4))
    process.pulse.chores.add(SWEEP_INTERVAL, broker.sweep, wanted=broker.core.has_expirable)
    process.on_link = broker.attach
    process.on_drain = broker.drain


if __name__ == "__main__":
    sys.exit(child.main(sys.argv[1:], start))
