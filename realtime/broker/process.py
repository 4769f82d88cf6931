"""The broker process: the embedded engine. The supervisor starts it with `python -m realtime.broker.process`.

It holds the core (`realtime.pubsub.broker_core`) and a link to each worker. It runs no user code and has no clients, so
it survives the crash of a worker. The other end of a link is `realtime.worker.engine`; their messages are in
`realtime.pubsub.broker_messages`.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from realtime.broker.delivery import LinkDelivery, failed
from realtime.broker.handover import PeerState, StateSource, StateTarget, formats
from realtime.broker.persistence import Persistence
from realtime.broker.stored_first import StoredFirstLink, UnstoredFrames
from realtime.config.settings import EngineSettings
from realtime.errors import INTERNAL_ERROR, LIMIT_EXCEEDED, ClientError
from realtime.metrics import Counter, Metrics
from realtime.process import child
from realtime.process.heap import TRIM_INTERVAL, HeapTrimmer, find_malloc_trim
from realtime.process.link import PEER_ENDED, REPLACED, Link, LinkState, adopt
from realtime.process.node import NodeIdentity
from realtime.process.reactor import turn_end_caller
from realtime.pubsub import broker_messages
from realtime.pubsub.broker_core import BrokerCore
from realtime.pubsub.broker_messages import BadFrame
from realtime.pubsub.broker_state import StatePart
from realtime.pubsub.engine import MESSAGES_DROPPED, Publish, ReportSubscriptions, worker_address
from realtime.pubsub.history import make_epoch
from realtime.pubsub.time_slices import TimeSlicer
from realtime.supervision.health import broker_beat_interval
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork
from realtime.types import NodeInfo

SWEEP_INTERVAL = 0.25
"""Seconds between two sweeps for expired history and idempotency keys."""

SLICE = 0.005
"""Seconds of a turn in which clients of an ended worker leave."""

SWEEP_PAUSE = 0.01
"""Seconds until the next sweep if one sweep did not free everything."""

PATIENCE = 0.25
"""Share of a worker's queue that answers may fill before its further requests wait. The rest is for publications."""

RESTORE_TIMEOUT = 1.0
"""Seconds for which a restarted broker holds requests until all workers have restored their subscriptions."""

PAUSE_SHARE = 0.5
"""Share of the time that workers wait for an answer in which the state may go to another process."""

LEAVE_TIMEOUT = 2.0
"""Seconds after which a broker ends that another process has taken the place of, if the supervisor does not end it."""

HOLD = 1.0
"""Seconds for which the clients of a worker whose stream has ended stay listed, and deliveries to it are queued: within
some milliseconds a fresh stream continues the ended one. The successor of a dead worker ends this time."""

FIRST_GENERATION = 1
"""The generation of the broker that a server starts with. An earlier broker died without a hand-over of its state."""

CoreMaker = Callable[[LinkDelivery, int, Counter, Callable[[], NodeInfo]], BrokerCore[Link]]
"""Makes the core from the arguments of `BrokerCore`."""

_log = Logger()
_decode = broker_messages.message_decoder(broker_messages.TO_BROKER)

FORMATS = formats()
"""See `realtime.worker.formats`."""


class Broker:
    """The core behind links to the workers.

    reactor: twisted's, with monotonic `seconds`. ledger: the loop's, which is charged for the links and the sweeps.
    instance: identifies this run of the broker, which may go on in another process. is_frozen: between `freeze` and
    `thaw`, or for ever.
    workers: their number; 0 for unknown. describe_node: see `BrokerCore`. is_restoring: see `restore`. held_limit:
    bytes of one worker's requests that are held meanwhile.
    """

    def __init__(
        self,
        settings: EngineSettings,
        metrics: Metrics,
        reactor: Any,
        ledger: LoopTimeLedger | None = None,
        workers: int = 0,
        describe_node: Callable[[], NodeInfo] = NodeInfo,
        make_core: CoreMaker = BrokerCore,
    ) -> None:
        self._workers = workers
        self.is_restoring = False
        self.is_frozen = False
        self._has_restored = False
        self._restore_timer: IDelayedCall | None = None
        self.held_limit = settings.queue_max_size
        self._link_drops = metrics.counter(*MESSAGES_DROPPED, reason="link")
        self._restart_drops = metrics.counter(*MESSAGES_DROPPED, reason="restart")
        self._ledger = ledger or LoopTimeLedger(time.monotonic_ns)
        self._charged_sweep = self._ledger.charging(self._ledger.open(LoopWork.TIMERS), self._continue_sweep)
        self._sweep_timer: object | None = None  # of a sweep that did not free everything
        self.instance = make_epoch()
        self._settings = settings
        self._reactor = reactor
        self.now: Callable[[], float] = reactor.seconds
        self._peers: dict[Link, _WorkerPeer] = {}
        # Of streams that have ended: the peers whose clients may return, and the leaves of the others.
        self._held: dict[_WorkerPeer, Any] = {}
        self._leaving: dict[_WorkerPeer, Iterator[None]] = {}
        self._slices = TimeSlicer(reactor.seconds, SLICE, self._call_next_turn)
        self._links_account = self._ledger.open(LoopWork.ENGINE)
        self._all_left: Deferred[None] | None = None  # while draining
        self._early: list[tuple[int, int]] | None = None  # streams that came while stored channels are read
        publications = metrics.counter("realtime_broker_publications", "Publications received from workers.")
        self.delivery = LinkDelivery(metrics)
        parts = self.delivery, settings.max_channels, publications, describe_node
        self.persistence: Persistence | None = None
        self._unstored: UnstoredFrames | None = None
        if settings.type == "memory" and settings.memory.path:
            self.persistence = kept = Persistence(settings.memory, settings.max_channels, metrics, reactor, self)
            self._unstored = UnstoredFrames(kept) if kept.waits else None
            self.core: BrokerCore[Link] = BrokerCore(*parts, kept.streams, kept.keys)
        else:
            self.core = make_core(*parts)
        metrics.gauge("realtime_broker_channels", "Channels with a subscriber.", lambda: self.core.channels)
        metrics.gauge("realtime_broker_streams", "Channels with a history.", lambda: self.core.streams)
        metrics.gauge("realtime_broker_backlog_bytes", "Bytes queued for workers.", self._backlog)
        self.requests = metrics.counter("realtime_broker_requests", "Requests of workers carried out.")
        self.cuts = metrics.counter(
            "realtime_broker_cut_links", "Streams to workers that the broker ended, for any reason."
        )

    async def drain(self, timeout: float) -> None:
        """Wait until every worker has left.

        The supervisor ends the workers before the broker. A signal to the whole process group reaches all at once
        though, while workers still disconnect clients and their handlers still publish.
        """
        self._all_left = Deferred()
        if self._peers:
            await self._all_left
        if self.persistence is not None:
            await self.persistence.close()

    async def load(self) -> None:
        """Read the channels of an earlier broker, if they are stored. Raises RealtimeError with a line for the
        operator."""
        if self.persistence is not None:
            self._early = []
            await self.persistence.load(lambda part: self.core.import_part(part, ()))
            early, self._early = self._early, None
            for stream in early:
                self.attach(*stream)

    def hold_back(self, is_held: bool) -> None:
        """Stop or continue reading the requests of all workers."""
        for link in self._peers:
            link.hold_back(is_held)

    def attach(self, slot: int, fd: int) -> None:
        """Connect to a worker of this slot over `fd`, and own it from now on."""
        if self.is_frozen:
            os.close(fd)  # the supervisor provides another
            return
        if self._early is not None:
            self._early.append((slot, fd))
            return
        peer = _WorkerPeer(self, slot, self._make_link)
        self._peers[peer.link] = peer
        adopt(self._reactor, fd, peer.link)

    def replace(self, slot: int, address: str, *, is_returning: bool) -> None:
        """End the earlier streams of a worker that has introduced itself over a new one, and of dead ones of its slot.

        Its request for the clients of the dead must not come before their end is noticed. is_returning: the worker had
        a stream to this broker, so its clients stay listed until it has restored its state.
        """
        for link, peer in list(self._peers.items()):
            if peer.address == address or (peer.slot == slot and peer.address and link.is_hung_up):
                del self._peers[link]
                link.cut(REPLACED)
                self._hold(peer)
        for peer in list(self._held):
            # A living worker of the slot hands over to the one that introduces itself, and will return.
            if peer.slot == slot and not (is_returning if peer.address == address else peer.is_alive):
                self._let_leave(peer)
        # Where the same clients come back over the new stream, the leaves come first.
        for peer in [peer for peer in self._leaving if peer.slot == slot]:
            for _ in self._leaving.pop(peer, ()):
                pass

    def has_held(self, address: str) -> bool:
        """Whether clients of an earlier stream of this worker are still listed."""
        return any(peer.address == address for peer in self._held)

    def let_held_leave(self, address: str) -> None:
        """Let the clients leave that a returning worker, which has restored its state, has lost meanwhile."""
        for peer in [peer for peer in self._held if peer.address == address]:
            self._let_leave(peer)

    def continue_stream(self, link: Link, address: str, hello: broker_messages.Hello) -> list[bytes] | None:
        """Route to a returning worker what is routed to its earlier streams.

        Return the frames that it has not handled, None if some are lost; these are counted.
        """
        earlier = sorted((peer for peer in self._held if peer.address == address), key=lambda peer: peer.stream)
        rest = None
        for peer in earlier:
            self.core.inherit(link, peer.link)
            rest = peer.link.take_rest(hello.handled_of(peer.stream))
            self._count_drops(peer.link)
        return rest

    def restore(self) -> None:
        """Handle the first worker of an earlier broker: hold all requests until every worker has restored its state.

        Otherwise the publications that waited at the first worker would miss the subscribers of the others.
        """
        if not self._has_restored and not self.is_restoring and self._workers > 1:
            self.is_restoring = True
            self._restore_timer = self._reactor.callLater(RESTORE_TIMEOUT, self._stop_waiting)

    def note_restored(self) -> None:
        """Carry out the held requests, if every worker has restored its state."""
        if self.is_restoring and len(self._restored_slots()) >= self._workers:
            assert self._restore_timer is not None
            self._restore_timer.cancel()
            self._release()

    def _restored_slots(self) -> set[int]:
        """Return the slots all of whose workers have restored their state: two during a hand-over."""
        peers = self._peers.values()
        return {peer.slot for peer in peers} - {peer.slot for peer in peers if not peer.has_restored}

    def _stop_waiting(self) -> None:
        """Carry out the held requests, as a worker takes too long. Publications without history may be lost to it."""
        self._restart_drops.value += sum(peer.unstored for peer in self._peers.values())
        _log.warn(
            "{present} of {workers} workers have restored their subscriptions within {seconds} s;"
            " publications without history do not reach the others",
            present=len(self._restored_slots()),
            workers=self._workers,
            seconds=RESTORE_TIMEOUT,
        )
        self._release()

    def _release(self) -> None:
        self._restore_timer = None
        self.is_restoring, self._has_restored = False, True
        for peer in list(self._peers.values()):
            peer.release()

    # Another process that takes the place of this one: `realtime.broker.handover`

    @property
    def is_settled(self) -> bool:
        """Whether the state can go to another process: all streams are whole, and all workers have restored theirs."""
        is_whole = all(link.is_open for link in self._peers) and not (self._held or self._leaving)
        is_stored = self.persistence is None or not self.persistence.is_holding_back
        return is_whole and is_stored and self.core.is_settled and not self.is_restoring

    def freeze(self) -> list[tuple[PeerState, int, LinkState]] | None:
        """Read, write and change nothing from now on. Return the workers' streams, with a descriptor of each.

        None, and everything goes on, if the state is not settled. Call it from a timer, when no stream is in the midst
        of a read.
        """
        if self.is_settled:
            for link in self._peers:
                link.suspend()
            # Else a worker has sent something invalid, or the disk is slow.
            if self.is_settled and (self.persistence is None or self.persistence.freeze()):
                self.is_frozen = True
                # Those in the core come first.
                self._peers = dict(sorted(self._peers.items(), key=lambda item: not item[1].address))
                return [(peer.export(), link.fileno(), link.freeze()) for link, peer in self._peers.items()]
            self._read_again()
        return None

    def export(self) -> Iterator[StatePart]:
        """Yield the parts of the core's state."""
        return self.core.export([link for link, peer in self._peers.items() if peer.address])

    def thaw(self) -> None:
        """Go on after `freeze`, as no other process does."""
        self.is_frozen = False
        if self.persistence is not None:
            self.persistence.thaw()
        for link in self._peers:
            link.thaw()
        self._read_again()

    def _read_again(self) -> None:
        for link in [link for link in self._peers if link.is_open]:
            link.read_again()

    def release(self) -> None:
        """Another process goes on after `freeze`: close our copies of the streams."""
        if self.persistence is not None:
            self.persistence.release()
        for link in self._peers:
            os.close(link.release())
        self._peers.clear()
        self._note_left()

    def expect(self, instance: str, peers: Sequence[PeerState]) -> None:
        """Take the place of a frozen broker. Parts of its core's state follow, and then `go_on`."""
        self.instance, self._has_restored = instance, True
        for state in peers:
            peer = _WorkerPeer(self, state.slot, self._make_link)
            self._peers[peer.link] = peer
            peer.go_on_from(state)

    def import_part(self, part: StatePart) -> None:
        """Take over a part of the core's state."""
        self.core.import_part(part, list(self._peers))

    def go_on(self, streams: Sequence[tuple[int, LinkState]]) -> None:
        """Serve these streams, in the order of `expect`. Owns the descriptors. Raises OSError."""
        links = list(self._peers)
        if self.persistence is not None:
            self.persistence.take_over()
        for link, (fd, state) in zip(links, streams, strict=True):
            adopt(self._reactor, fd, link)
            link.go_on_from(state)
        for link, (_, state) in zip(links, streams, strict=True):
            link.read_again(state.received)

    def _call_next_turn(self, function: Callable[[], None]) -> None:
        self._reactor.callLater(0, self._ledger.charging(self._links_account, function))

    def _make_link(self, on_frame: Callable[[int, bytes], None]) -> Link:
        limit = self._settings.queue_max_size
        patience = max(1, int(limit * PATIENCE))
        call_at_end = turn_end_caller(self._reactor)
        parts = self._reactor, call_at_end, limit, on_frame, self._on_link_end, self._ledger, patience
        if self._unstored is not None:
            return StoredFirstLink(*parts, keeps=True, unstored=self._unstored)
        return Link(*parts, keeps=True)

    def _on_link_end(self, link: Link, reason: str) -> None:
        """Let the clients of a worker leave, as it has ended or its link was cut."""
        if reason != PEER_ENDED:
            self.cuts.value += 1
        self._count_drops(link)
        peer = self._peers.pop(link, None)
        if peer is not None:
            self._hold(peer)
            _log.info(
                "the stream to worker {slot} ended: {reason}; its clients leave, unless it returns within {hold:g} s",
                slot=peer.slot,
                reason=reason,
                hold=HOLD,
            )
        self._note_left()

    def _note_left(self) -> None:
        if not self._peers and self._all_left is not None and not self._all_left.called:
            self._all_left.callback(None)

    def _count_drops(self, link: Link) -> None:
        self._link_drops.value += link.dropped
        link.dropped = 0

    def _hold(self, peer: _WorkerPeer) -> None:
        """End the connections of a worker; keep it routed and its clients listed, as its process may live on."""
        steps = self.core.unlink_steps(peer.link, self.now())
        next(steps, None)
        self._slices.add(steps)
        self._held[peer] = self._reactor.callLater(HOLD, self._let_leave, peer)

    def _let_leave(self, peer: _WorkerPeer) -> None:
        timer = self._held.pop(peer)
        if timer.active():
            timer.cancel()
        # The subscribers of a dead worker are disconnected, so they lose nothing.
        if peer.is_alive and self.core.is_routed(peer.link):
            peer.link.take_rest(None)
        self._count_drops(peer.link)
        self._leaving[peer] = steps = self._leave(peer)
        next(steps, None)
        self._slices.add(steps)
        if self.core.has_lost_clients(str(peer.slot)):
            frame = broker_messages.pack(broker_messages.ClientsLost())
            for link in [link for link, other in self._peers.items() if other.slot == peer.slot and other.takes_lost]:
                link.send(frame)

    def let_all_leave(self) -> None:
        """Let the clients of all workers leave that have ended, at once: none returns any more."""
        for peer in list(self._held):
            self._let_leave(peer)
        for steps in list(self._leaving.values()):
            for _ in steps:
                pass

    def _leave(self, peer: _WorkerPeer) -> Iterator[None]:
        yield from self.core.leave_steps(peer.link, self.now())
        self._leaving.pop(peer, None)

    def sweep(self) -> None:
        """Free expired entries for a short time, and continue after SWEEP_PAUSE. Call it every SWEEP_INTERVAL."""
        if self.is_frozen:
            return
        if self.core.sweep(self.now()) and self._sweep_timer is None:
            self._sweep_timer = self._reactor.callLater(SWEEP_PAUSE, self._charged_sweep)

    def _continue_sweep(self) -> None:
        self._sweep_timer = None
        try:
            self.sweep()
        except Exception:
            _log.failure("freeing expired history and idempotency keys raised; the next sweep tries again")

    def _backlog(self) -> int:
        return sum(peer.link.backlog for peer in (*self._peers.values(), *self._held))


class _WorkerPeer:
    """Carries out the requests of one worker, for as long as one stream to it lasts.

    make_link: makes the link, which calls its argument with each frame. address: of the worker, see `SendOrder`; ""
    before its Hello. stream, takes_lost: as in its Hello. has_restored: the worker's state is complete. unstored:
    publications without history among the held requests.
    """

    def __init__(self, broker: Broker, slot: int, make_link: Callable[[Callable[[int, bytes], None]], Link]) -> None:
        self.slot = slot
        self.address = ""
        self.stream = 0
        self.takes_lost = False
        self._pid = 0
        self._broker = broker
        self._core = broker.core
        self.link = make_link(self.receive)
        self._now = broker.now
        self._is_returning = False
        self.has_restored = False
        self._held: deque[tuple[int, bytes]] | None = None  # frames, while the broker is restoring
        self._held_bytes = 0
        self.unstored = 0
        # By kind. Before Hello, anything else is out of place.
        self._requests: dict[type, Callable[[Link, float, Any], Any]] = {}
        self._others: dict[type, Callable[[Link, float, Any], None]] = {broker_messages.Hello: self._hello}

    @property
    def is_alive(self) -> bool:
        """Whether the worker's process is there. The supervisor reaps an ended one before it starts another."""
        with suppress(PermissionError):  # it runs as another user
            try:
                os.kill(self._pid, 0)
            except ProcessLookupError:
                return False
        return True

    def receive(self, number: int, body: bytes) -> None:
        """Carry out one message. Raises BadFrame, and nothing else, if it is invalid or out of place."""
        try:
            message = _decode(body)
        except (ValueError, RecursionError) as error:
            # msgspec's own errors and UnicodeDecodeError are ValueErrors.
            raise BadFrame(f"not a message: {error}") from error
        kind = type(message)
        if self._held is not None and kind is not broker_messages.Restore:
            self._hold(number, body, message)
            return
        if operation := self._requests.get(kind):
            self._broker.requests.value += 1
            delivery = self._broker.delivery
            delivery.asker, delivery.number = self.link, number
            try:
                answer = operation(self.link, self._now(), message)
                if number and not delivery.number:
                    return  # a delivery was the answer
                frame = broker_messages.pack(answer, number)
            except Exception as error:
                frame = self._failure(message, number, error)
            if number:
                self.link.send(frame)
        elif note := self._others.get(kind):
            note(self.link, self._now(), message)
        else:
            raise BadFrame(f"{kind.__name__} is out of place")

    def _hold(self, number: int, body: bytes, message: Any) -> None:
        assert self._held is not None
        # The first report of subscriptions is the end of the worker's state.
        if not self.has_restored and isinstance(message, ReportSubscriptions):
            self.has_restored = True
            self._core.take_note(self.link, self._now(), message)
            self._broker.note_restored()
            return
        self._held.append((number, body))
        self._held_bytes += len(body)
        self.unstored += isinstance(message, Publish) and not message.history_options.enabled
        if self._held_bytes > self._broker.held_limit:
            self.release()

    def release(self) -> None:
        """Carry out the held requests."""
        held, self._held = self._held, None
        try:
            while held:
                self.receive(*held.popleft())
        except BadFrame as error:
            self.link.cut(str(error))

    def _failure(self, request: Any, number: int, error: Exception) -> bytes:
        """Return the frame of the answer to a request that raised `error`, the current exception."""
        match error:
            case ClientError():
                return failed(number, error.code, error.message, error.temporary)
            case BadFrame():
                return failed(number, *LIMIT_EXCEEDED)
        _log.failure(
            "carrying out a {kind} request of worker {worker} raised; the worker gets an internal error",
            kind=type(request).__name__,
            worker=self.address,
        )
        return failed(number, *INTERNAL_ERROR)

    def _hello(self, link: Link, now: float, message: broker_messages.Hello) -> None:
        if message.version != broker_messages.VERSION:
            raise BadFrame(f"the worker speaks version {message.version}, this broker {broker_messages.VERSION}")
        address = worker_address(self.slot, message.generation)
        self._is_returning = message.instance == self._broker.instance
        self._broker.replace(self.slot, address, is_returning=self._is_returning)
        self.address, self.stream = address, message.stream
        self._pid, self.takes_lost = message.pid, message.takes_lost_clients
        self._core.attach(link, address, str(self.slot))
        # When its previous stream to this same broker ended long ago, its clients left; now they join again. The
        # subscribers of another broker never received those leaves, so they receive no joins either.
        self._core.introduce(link, takes_lost=message.takes_lost_clients, is_returning=self._is_returning)
        if message.instance and not self._is_returning:
            self._broker.restore()
        if self._broker.is_restoring:
            self._held = deque()
        self._serve()
        if self._broker.has_held(address):
            self._others[ReportSubscriptions] = self._returned
        rest = self._broker.continue_stream(link, address, message)
        welcome = broker_messages.Welcome(broker_messages.VERSION, self._broker.instance, rest is not None)
        link.send(broker_messages.pack(welcome))
        if rest is not None:
            link.continue_with(rest)
            link.send(broker_messages.pack(broker_messages.CaughtUp(message.stream)))

    def _serve(self) -> None:
        """Carry out requests from now on."""
        operations = self._core.operations
        self._requests = {kind: operations[kind] for kind in broker_messages.REQUESTS}
        self._others = {kind: operations[kind] for kind in broker_messages.NOTICES}
        self._others[broker_messages.Restore] = self._restore

    def export(self) -> PeerState:
        """Return the state for another process."""
        return PeerState(self.slot, self.address, self.stream, self._is_returning, self._pid, self.takes_lost)

    def go_on_from(self, state: PeerState) -> None:
        """Go on from the state of another process."""
        self.address, self.stream, self._is_returning = state.address, state.stream, state.is_returning
        self._pid, self.takes_lost = state.pid, state.takes_lost
        if self.address:
            self._serve()

    def _returned(self, link: Link, now: float, message: ReportSubscriptions) -> None:
        """Take note of the first report of subscriptions, the end of the worker's state."""
        self._others[ReportSubscriptions] = self._core.operations[ReportSubscriptions]
        self._core.take_note(link, now, message)
        self._broker.let_held_leave(self.address)

    def _restore(self, link: Link, now: float, message: broker_messages.Restore) -> None:
        self._core.restore(
            link,
            message.channels,
            message.presence,
            message.clients,
            message.sessions,
            announce=self._is_returning,
        )


class BrokerService:
    """The broker as the work of a child process."""

    def __init__(self, process: child.Child) -> None:
        self.process = process
        self._source: StateSource | None = None
        settings = process.settings
        self._broker = Broker(
            settings.engine,
            process.metrics,
            process.reactor,
            process.accounts,
            settings.workers.count,
            NodeIdentity(settings, process.supervisor).describe,
            self.make_core,
        )

    def make_core(
        self, delivery: LinkDelivery, max_channels: int, publications: Counter, describe_node: Callable[[], NodeInfo]
    ) -> BrokerCore[Link]:
        """Make the core, which is this machine's memory."""
        return BrokerCore(delivery, max_channels, publications, describe_node)

    async def start(self) -> None:
        """Begin the sweeps, and take the place of a predecessor, or read stored channels. Workers are served as soon as
        their links come."""
        process, heartbeat = self.process, self.process.heartbeat
        heartbeat.slow_down(broker_beat_interval(process.settings.loop))
        trimmer = HeapTrimmer(process.metrics, find_malloc_trim())
        heartbeat.tasks.add(TRIM_INTERVAL, trimmer.trim, is_needed=trimmer.is_due)
        heartbeat.tasks.add(SWEEP_INTERVAL, self._broker.sweep, is_needed=self._broker.core.has_expirable)
        if process.predecessor is not None:
            await StateTarget(process.reactor, process.predecessor, self._broker).taken
        else:
            if process.generation > FIRST_GENERATION:
                self._broker.core.roles.note_loss(self._broker.now())
            await self._broker.load()

    def link(self, slot: int, stream: int) -> None:
        """Serve a worker over a fresh stream."""
        self._broker.attach(slot, stream)

    def adopt(self, stream: int) -> None:
        """Refuse: the broker has no clients."""
        os.close(stream)

    def take_over(self, stream: int) -> None:
        """Refuse: the broker has no clients."""
        os.close(stream)

    async def hand_over(self, stream: int, connections: int, timeout: float) -> dict[str, object]:
        """Hand the state and the streams over to a process that takes the place of this one."""
        if self._source is not None and self._source.is_open:
            return child.hand_nothing_over(stream, "another hand-over is under way")
        pause = self.process.settings.engine.publish_timeout * PAUSE_SHARE
        self._source = StateSource(self.process.reactor, stream, self._broker, timeout, pause)
        reason = await self._source.ended
        if self._broker.is_frozen:
            self.process.reactor.callLater(LEAVE_TIMEOUT, self.process.stop, child.EX_TEMPFAIL)
        return child.handed_over(self._source.moved, reason)

    async def drain(self, timeout: float) -> None:
        """Wait until every worker has left."""
        await self._broker.drain(timeout)


def main(argv: Sequence[str]) -> int:
    """See `realtime.process.child.main`."""
    return child.main(argv, BrokerService)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
