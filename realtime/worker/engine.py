"""The worker's end of the embedded engine: an `Engine` that asks the broker process over a Unix stream.

The supervisor provides the stream. This side holds the authoritative state of its worker: subscribed channels, present
and connected clients. Every fresh stream begins with all of it, so a restarted broker or a broken stream leaves the
broker's view wrong only until the next stream connects.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec
from msgspec import Struct
from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.config.settings import EngineSettings
from realtime.errors import LIMIT_EXCEEDED, ClientError, EngineUnavailable
from realtime.handlers.coroutines import DoneCallback
from realtime.metrics import Metrics
from realtime.process.link import REPLACED, Link, adopt
from realtime.process.reactor import turn_end_caller
from realtime.pubsub import broker_messages
from realtime.pubsub.broker_messages import ANSWERS, BadFrame, Published
from realtime.pubsub.broker_state import chunks
from realtime.pubsub.engine import (
    AddClient,
    AddPresence,
    AdmitClient,
    Answer,
    Cut,
    EngineNotice,
    EngineRequest,
    Receiver,
    RemoveClient,
    RemovePresence,
    ReportSubscriptions,
    Subscribe,
    Unsubscribe,
)
from realtime.supervision.loop_time import LoopAccount, LoopTimeLedger, LoopWork
from realtime.types import ClientInfo, Position

REQUEST_LIMIT = broker_messages.FRAME_LIMIT - 1024
"""Upper limit in bytes of a request's frame: the publication made from it is a little longer, and has to fit too."""

RESTORE_BYTES = 1024 * 1024
"""Approximate limit in bytes of one Restore; a single longer entry still fits into one."""

_log = Logger()

_decode = broker_messages.message_decoder(broker_messages.TO_WORKER)


def _decoded(decode: Callable[[bytes], Any], body: bytes) -> Any:
    """Decode a frame's body. Raises BadFrame."""
    try:
        return decode(body)
    except (ValueError, RecursionError) as error:
        # msgspec's own errors and UnicodeDecodeError are ValueErrors.
        raise BadFrame(f"not a message: {error}") from error


_answer_decoders: dict[type, Callable[[bytes], Any]] = {
    kind: broker_messages.answer_decoder(kind) for kind in broker_messages.REQUESTS
}


class _Call(Struct, gc=False):
    """A request without an answer yet.

    unsent: its length in bytes while it waits for a stream, then 0. done: gets its answer or error. account: charged
    for `done`.
    """

    request: EngineRequest[Any]
    deadline: float
    unsent: int
    done: DoneCallback
    account: LoopAccount


class _Arrivals:
    """The clients of one batch that the broker has moved here, and that have not been claimed.

    A fresh stream does not begin with them: if they do not arrive, another worker may have them still. is_current: the
    stream is the one that they came over, so the broker has them here. presence: their channels, by client.
    """

    __slots__ = ("clients", "is_current", "presence")

    def __init__(self, cut: broker_messages.CutReached) -> None:
        self.clients = {info.client: info for info in cut.clients}
        self.presence: dict[str, list[str]] = {}
        for channel, clients in cut.presence.items():
            for client in clients:
                self.presence.setdefault(client, []).append(channel)
        self.is_current = True


class BrokerEngine:
    """An `Engine` whose state is in the broker process.

    A request fails with EngineUnavailable when its answer takes longer than `publish_timeout`, and when the stream ends
    before the answer arrived; the broker may or may not have carried it out. Without a stream, requests wait for the
    next one, up to the same timeout. The coroutine that awaits an answer continues at once, on the stack that received
    it, so no later message of the stream comes in between.

    A subscribed channel is part of every fresh stream until `Unsubscribe`, even if `Subscribe` failed.

    reactor: twisted's. on_lost: called when the stream has ended, to have the supervisor provide another. ledger: the
    loop's, which is charged for the stream. on_clients_lost: called when there are clients for `TakeLostClients`.
    """

    def __init__(
        self,
        receiver: Receiver,
        settings: EngineSettings,
        metrics: Metrics,
        reactor: Any,
        on_lost: Callable[[], None],
        ledger: LoopTimeLedger | None = None,
        takes_lost_clients: bool = False,
        generation: int = 0,
    ) -> None:
        """takes_lost_clients: whether `TakeLostClients` will be asked. generation: see `engine.worker_address`."""
        self._hello = broker_messages.Hello(broker_messages.VERSION, "", takes_lost_clients, generation)
        self._ledger = ledger or LoopTimeLedger(time.monotonic_ns)
        self._account = self._ledger.open(LoopWork.ENGINE)
        self._receiver, self._settings, self._reactor = receiver, settings, reactor
        self._on_lost, self.on_clients_lost = on_lost, _do_nothing
        self._link: Link | None = None
        self._closed = self._is_welcome = self._is_catching_up = False
        self._calls: dict[int, _Call] = {}  # by number, which is also the order of their deadlines
        self._last_number = 0
        self._unsent = 0  # bytes of the calls that wait for a stream
        self._timer: IDelayedCall | None = None
        # The state of this worker, which a fresh stream begins with.
        self._channels: set[str] = set()
        self._presence: dict[tuple[str, str], AddPresence] = {}  # by channel and client
        self._clients: dict[str, ClientInfo] = {}
        self._sessions: dict[str, str] = {}  # secrets by client, see `Cut`
        self._subscriptions = 0
        self._arrivals: dict[str, _Arrivals] = {}  # by batch
        # Requests and notices that change that state, and messages that are no answers, by kind.
        self._stateful: dict[type, Callable[[Any], Deferred[Any]]] = {
            Subscribe: self._subscribe,
            AddPresence: self._add_presence,
            RemovePresence: self._remove_presence,
            AdmitClient: self._admit_client,
            Cut: self._cut,
        }
        self._notices: dict[type, Callable[[Any], None]] = {
            Unsubscribe: self._unsubscribe,
            AddClient: self._add_client,
            RemoveClient: self._remove_client,
            ReportSubscriptions: self._report_subscriptions,
        }
        self._deliveries: dict[type, Callable[[Any], None]] = {
            broker_messages.Joined: self._on_joined,
            broker_messages.Left: self._on_left,
            broker_messages.OrderSent: self._on_order,
            broker_messages.CutReached: self._on_cut,
            broker_messages.CaughtUp: self._on_caught_up,
            broker_messages.Missed: self._on_missed,
            broker_messages.ClientsLost: lambda message: self.on_clients_lost(),
            broker_messages.RequestFailed: self._on_failed,
            broker_messages.Welcome: self._on_welcome,
        }
        self._requests = metrics.counter("realtime_engine_requests", "Requests to the engine.")
        self._timeouts = metrics.counter("realtime_engine_timeouts", "Requests to the engine not answered in time.")
        self._lost_links = metrics.counter("realtime_engine_lost_links", "Streams to the engine that ended.")
        help = "Requests to the engine without an answer yet."
        metrics.gauge("realtime_engine_pending_requests", help, lambda: len(self._calls))

    # The stream

    def attach(self, fd: int) -> None:
        """Continue over this stream, in place of the previous one, if any. Takes ownership of `fd`.

        Sends all state of this worker and the waiting requests. `Receiver.on_interruption` is called when the broker
        answers, unless this is the first stream, or continues the previous one without a gap.
        """
        if self._closed:
            os.close(fd)
            return
        if self._link is not None:
            self._link.cut(REPLACED)
            self._note_end(self._link)
            self._fail(list(self._calls), "the broker was lost")
        self._hello = msgspec.structs.replace(self._hello, stream=self._hello.stream + 1)
        # Whether the broker has answered, and whether it is sending what earlier streams did not deliver.
        self._is_welcome = self._is_catching_up = False
        frames = [*map(broker_messages.pack, self._introduction()), *self._take_unsent()]
        # This worker holds as many bytes anyway; the limit applies to further frames.
        limit = self._settings.queue_max_size + sum(map(len, frames))
        call_at_end = turn_end_caller(self._reactor)
        self._link = link = Link(self._reactor, call_at_end, limit, self._receive, self._on_link_end, self._ledger)
        adopt(self._reactor, fd, link)
        for frame in frames:
            link.send(frame)
        for arrivals in self._arrivals.values():
            arrivals.is_current = False

    def close(self) -> None:
        """Leave the broker for good: queued frames go out; waiting and later requests fail. `on_lost` is not called."""
        self._closed = True
        link, self._link = self._link, None
        if link is not None:
            link.close()
        self._fail(list(self._calls), "this worker is leaving")
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _introduction(self) -> Iterator[broker_messages.BrokerMessage | EngineNotice]:
        yield self._hello
        for channels in chunks(self._channels, len, RESTORE_BYTES):
            yield broker_messages.Restore(channels, [], [])
        yield from self._state_of(self._presence.values(), self._clients.values())
        yield ReportSubscriptions(self._subscriptions)

    def _state_of(
        self, presence: Iterable[AddPresence], clients: Iterable[ClientInfo]
    ) -> Iterator[broker_messages.Restore]:
        for some in chunks(presence, lambda add: len(add.info.conn_info) + len(add.info.chan_info), RESTORE_BYTES):
            yield broker_messages.Restore([], some, [])
        for few in chunks(clients, lambda info: len(info.user), RESTORE_BYTES):
            yield broker_messages.Restore([], [], few, _of(self._sessions, few))

    def _take_unsent(self) -> Iterator[bytes]:
        for number, call in self._calls.items():
            yield broker_messages.pack(call.request, number)
            call.unsent = 0
            # The caller may have undone the request since, when there was no stream, or no room for the opposite one.
            match call.request:
                case Subscribe(channel=channel) if channel not in self._channels:
                    yield broker_messages.pack(Unsubscribe(channel))
                case AddPresence(channel=channel, info=info) if (channel, info.client) not in self._presence:
                    yield broker_messages.pack(RemovePresence(channel, info.client))
        self._unsent = 0

    def _on_link_end(self, link: Link, reason: str) -> None:
        self._lost_links.value += 1
        if link is not self._link:
            return
        _log.warn(
            "the stream to the broker ended: {reason}; waiting for the supervisor to provide another", reason=reason
        )
        self._link = None
        self._note_end(link)
        self._fail(list(self._calls), "the broker was lost")
        self._on_lost()

    def _note_end(self, link: Link) -> None:
        """Remember the point from which the next stream has to continue this one."""
        previous, handled = self._hello.previous, self._hello.handled
        try:
            if not link.is_continuable:
                previous = handled = 0
            elif self._is_welcome:
                previous, handled = self._hello.stream, link.count_handled()
        except BadFrame:
            previous = handled = 0
        self._hello = msgspec.structs.replace(self._hello, previous=previous, handled=handled)

    def _fail(self, numbers: list[int], reason: str) -> None:
        calls = [self._calls.pop(number) for number in numbers]
        for call in calls:
            self._unsent -= call.unsent
        for call in calls:
            call.done(None, EngineUnavailable(reason))

    # Requests and notices

    def ask(self, request: EngineRequest[Answer]) -> Deferred[Answer]:
        """See `Engine.ask`. The call itself never raises; errors come with the Deferred."""
        stateful = self._stateful.get(type(request))
        return self._send(request) if stateful is None else stateful(request)

    def ask_then(self, request: EngineRequest[Answer], done: DoneCallback) -> None:
        """See `Engine.ask_then`. For requests that do not change the state of this worker."""
        if type(request) in self._stateful:
            raise TypeError(f"{type(request).__name__} needs ask()")
        self._call(request, done)

    def tell(self, notice: EngineNotice) -> None:
        """See `Engine.tell`."""
        self._notices[type(notice)](notice)

    def _send(self, request: EngineRequest[Answer]) -> Deferred[Answer]:
        # Not of a subclass, which drivers of coroutines would have to look up among Deferred's.
        outcome: Deferred[Answer] = Deferred()

        def settle(answer: Answer, error: BaseException | None) -> None:
            if error is None:
                outcome.callback(answer)
            else:
                outcome.errback(Failure(error))

        self._call(request, settle)
        return outcome

    def _call(self, request: EngineRequest[Any], done: DoneCallback) -> None:
        if self._closed:
            done(None, EngineUnavailable("this worker is leaving"))
            return
        self._requests.value += 1
        self._last_number = number = self._last_number + 1
        try:
            frame = broker_messages.pack(request, number)
        except BadFrame:
            frame = b""
        if not 0 < len(frame) <= REQUEST_LIMIT:
            done(None, ClientError(*LIMIT_EXCEEDED))
            return
        unsent = 0
        if self._link is not None:
            self._link.send(frame)
        else:
            unsent = len(frame)
            if self._unsent + unsent > self._settings.queue_max_size:
                reason = "there is no stream to the broker, and the queue for the next one is full"
                done(None, EngineUnavailable(reason))
                return
            self._unsent += unsent
        timeout = self._settings.publish_timeout
        self._calls[number] = _Call(request, self._reactor.seconds() + timeout, unsent, done, self._ledger.current)
        if self._timer is None:
            self._timer = self._reactor.callLater(timeout, self._expire)

    def _expire(self) -> None:
        """Fail the calls past their deadline; run again at the next deadline."""
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

    def _send_unanswered(self, message: EngineNotice | EngineRequest[Any]) -> None:
        """Send without a number. Not needed without a stream: the next one begins with the state of this worker."""
        if self._link is not None:
            self._link.send(broker_messages.pack(message))

    # The state of this worker

    def _subscribe(self, request: Subscribe) -> Deferred[None]:
        self._channels.add(request.channel)
        return self._send(request)

    def _unsubscribe(self, notice: Unsubscribe) -> None:
        self._channels.discard(notice.channel)
        self._send_unanswered(notice)

    def _add_presence(self, request: AddPresence) -> Deferred[None]:
        key = request.channel, request.info.client
        is_new = key not in self._presence
        self._presence[key] = request
        answer = self._send(request)
        # A client that was present before stays so; the next stream begins with its latest info.
        return answer.addErrback(self._undo_add_presence, request) if is_new else answer

    def _undo_add_presence(self, failure: Failure, request: AddPresence) -> Failure:
        channel, client = request.channel, request.info.client
        if failure.check(EngineUnavailable, ClientError) and self._presence.get((channel, client)) is request:
            del self._presence[channel, client]
            self._send_unanswered(RemovePresence(channel, client))
        return failure

    def _remove_presence(self, request: RemovePresence) -> Deferred[None]:
        self._presence.pop((request.channel, request.client), None)
        return self._send(request)

    def _add_client(self, notice: AddClient) -> None:
        info = _identity(notice.info)
        self._clients[info.client] = info
        self._send_unanswered(AddClient(info))

    def _admit_client(self, request: AdmitClient) -> Deferred[bool]:
        info = _identity(request.info)
        return self._send(AdmitClient(info, request.limit)).addCallbacks(
            self._on_admission, self._on_admission_failed, callbackArgs=(info,), errbackArgs=(info,)
        )

    def _on_admission(self, admitted: bool, info: ClientInfo) -> bool:
        if admitted:
            # From now on every stream begins with it. A stream that ended before the answer took its count along.
            self._clients[info.client] = info
        return admitted

    def _on_admission_failed(self, failure: Failure, info: ClientInfo) -> Failure:
        # The broker may have counted the client all the same, or may do so when it gets to the request.
        self._send_unanswered(RemoveClient(info.client))
        return failure

    def _remove_client(self, notice: RemoveClient) -> None:
        self._sessions.pop(notice.client, None)
        if self._clients.pop(notice.client, None) is not None:
            self._send_unanswered(notice)

    def _report_subscriptions(self, notice: ReportSubscriptions) -> None:
        self._subscriptions = notice.subscriptions
        self._send_unanswered(notice)

    # Clients that move

    def _cut(self, request: Cut) -> Deferred[None]:
        return self._send(request).addCallbacks(
            self._on_moved, self._on_not_moved, callbackArgs=(request,), errbackArgs=(request,)
        )

    def _on_moved(self, answer: None, request: Cut) -> None:
        for client in request.clients:
            self._clients.pop(client, None)
            self._sessions.pop(client, None)
        for channel, clients in request.presence.items():
            for client in clients:
                self._presence.pop((channel, client), None)

    def _on_not_moved(self, failure: Failure, request: Cut) -> Failure:
        # The broker may have moved the clients all the same, or may do so when it gets to the request.
        clients = [self._clients[client] for client in request.clients if client in self._clients]
        keys = [(channel, client) for channel, clients in request.presence.items() for client in clients]
        self._restore([self._presence[key] for key in keys if key in self._presence], clients)
        return failure

    def _restore(self, presence: list[AddPresence], clients: list[ClientInfo]) -> None:
        """Tell the broker again that it has these clients from this worker. A fresh stream begins with them anyway."""
        if self._link is not None:
            for message in self._state_of(presence, clients):
                self._link.send(broker_messages.pack(message))

    def _on_cut(self, message: broker_messages.CutReached) -> None:
        self._arrivals[message.batch] = arrivals = _Arrivals(message)
        # The state that this stream began with did not have these clients.
        arrivals.is_current = not self._is_catching_up
        self._receiver.on_cut(message.batch)

    def claim(self, batch: str, info: ClientInfo, secret: str, presence: list[AddPresence]) -> None:
        """See `Engine.claim`. Without the `Cut`, or after another stream, the broker has to learn of the client."""
        arrivals = self._arrivals.get(batch)
        is_known = arrivals is not None and arrivals.clients.pop(info.client, None) is not None
        identity = self._clients[info.client] = _identity(info)
        if secret:
            self._sessions[info.client] = secret
        self._presence.update(((request.channel, info.client), request) for request in presence)
        if not (is_known and arrivals is not None and arrivals.is_current):
            self._restore(presence, [identity])

    def forget_arrivals(self, batch: str) -> list[ClientInfo]:
        """See `Engine.forget_arrivals`."""
        arrivals = self._arrivals.pop(batch, None)
        if arrivals is None:
            return []
        for client in arrivals.clients if arrivals.is_current else ():
            self._send_unanswered(RemoveClient(client))
            for channel in arrivals.presence.get(client, ()):
                self._send_unanswered(RemovePresence(channel, client))
        return list(arrivals.clients.values())

    # Frames from the broker

    def _receive(self, number: int, body: bytes) -> None:
        if number > ANSWERS:
            self._receive_own(number - ANSWERS, body)
            return
        call = self._calls.get(number) if number else None
        if number and call is None:
            return  # answered after its deadline
        message = _decoded(_decode if call is None else _answer_decoders[type(call.request)], body)
        # The next frame is often charged to the same account, so that is not switched back; the link does it at last.
        account = self._account if call is None else call.account
        if self._ledger.current is not account:
            self._ledger.switch(account)
        if call is not None:
            del self._calls[number]
            call.done(message, None)
        elif type(message) is Published:  # the short path
            self._receiver.on_publication(message.channel, message.publication, message.epoch)
        else:
            self._deliveries[type(message)](message)

    def _receive_own(self, number: int, body: bytes) -> None:
        """Deliver a publication, which answers the request of this number, too."""
        message = _decoded(_decode, body)
        if self._ledger.current is not self._account:
            self._ledger.switch(self._account)
        self._receiver.on_publication(message.channel, message.publication, message.epoch)
        call = self._calls.pop(number, None)
        if call is not None:
            self._ledger.switch(call.account)
            call.done(Position(message.publication.offset, message.epoch), None)

    def _on_joined(self, message: broker_messages.Joined) -> None:
        self._receiver.on_join(message.channel, message.info)

    def _on_left(self, message: broker_messages.Left) -> None:
        self._receiver.on_leave(message.channel, message.info)

    def _on_missed(self, message: broker_messages.Missed) -> None:
        self._receiver.on_missed(message.channel, message.publications)

    def _on_order(self, message: broker_messages.OrderSent) -> None:
        self._receiver.on_order(message.order)

    def _on_failed(self, message: broker_messages.RequestFailed) -> None:
        call = self._calls.pop(message.request, None)
        if call is not None:
            call.done(None, ClientError(message.code, message.message, message.temporary))

    def _on_welcome(self, message: broker_messages.Welcome) -> None:
        if message.version != broker_messages.VERSION:
            raise BadFrame(f"the broker speaks version {message.version}, this worker {broker_messages.VERSION}")
        self._hello = msgspec.structs.replace(self._hello, instance=message.instance)
        self._is_welcome = True
        if message.continues:
            self._is_catching_up = True
        elif self._hello.stream > 1:
            self._receiver.on_interruption()

    def _on_caught_up(self, message: broker_messages.CaughtUp) -> None:
        if message.stream == self._hello.stream:
            self._is_catching_up = False


def _do_nothing() -> None:
    return None


def _identity(info: ClientInfo) -> ClientInfo:
    """The fields that count connections, without the JSON texts."""
    return ClientInfo(info.user, info.client)


def _of(sessions: Mapping[str, str], clients: Iterable[ClientInfo]) -> dict[str, str]:
    """Return the secrets of these clients."""
    return {info.client: sessions[info.client] for info in clients if info.client in sessions} if sessions else {}
