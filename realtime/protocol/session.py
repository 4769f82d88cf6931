"""One client's session: what may follow what, in which order, and when it ends.

    OPENED ──connect──▶ CONNECTED ──▶ CLOSED
       └───refused────▶ REFUSED ────────┘

A session is told what arrives (`receive`, `closed`) and what time it is (`on_deadline`), and tells its `Connection`
what to send. Commands run one at a time, in the order of arrival: while one waits for the engine or for a handler, the
next ones queue, and past a limit the socket is not read. Where `client.concurrency` allows for several at a time,
connect runs alone all the same, and the commands of one channel keep their order. What each command does is in
`realtime.protocol.commands`. Nothing here knows a socket, a thread or a reactor.

On a unidirectional transport the client says one thing, its connect request; there are no replies and no pongs, so a
refusal is a disconnect, and what else it sends means nothing.
"""

from __future__ import annotations

import enum
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import suppress
from typing import Any, Protocol

import msgspec
from msgspec import Raw, Struct

from realtime import errors
from realtime.errors import ClientError, Disconnect, EngineUnavailable, KeysUnavailable
from realtime.http.handshake import OpeningRequest
from realtime.protocol import messages
from realtime.protocol.channel_rules import ResolvedChannel
from realtime.protocol.client import ConnectedClient, release
from realtime.protocol.context import SessionServices, SessionSettings
from realtime.protocol.messages import ProtocolError, SubscribeRequest
from realtime.protocol.subscription import JoinResult, Subscription, SubscriptionSource
from realtime.protocol.wire_formats import WireFormat
from realtime.pubsub.engine import AddClient, AdmitClient, RemoveClient
from realtime.pubsub.subscriber import Sink
from realtime.types import ClientInfo, Position, SubscribeOptions

# Seconds. A client whose connect was refused closes the connection itself; one that does not is shown out.
REFUSED_DELAY = 5.0
# Commands of one client that are begun before others may have a turn: half a millisecond's worth, if they are simple.
COMMANDS_AT_ONCE = 32
# Seconds' worth of commands at the allowed rate: so many may come at once, so many more are refused, and then it ends.
RATE_BURST = 2.0
# Seconds in which the failed commands are counted together.
ERROR_WINDOW = 5.0
# Seconds. More does not fit the SDKs' integers, and is 68 years.
LONGEST_TTL = 2**31 - 1
# The share of its grace by which an expired connection may be closed later, so that many do not end at once.
EXPIRY_SPREAD = 0.1

# The errors that end a connection without replies, and how (client protocol, section 2.9); any other ends it with 3004.
_WITHOUT_REPLIES = {
    errors.TOKEN_EXPIRED[0]: errors.CONNECTION_EXPIRED,
    errors.EXPIRED[0]: errors.CONNECTION_EXPIRED,
    errors.TOO_MANY_REQUESTS[0]: errors.TOO_MANY_COMMANDS,
    errors.PERMISSION_DENIED[0]: errors.DENIED,
}


class Connection(Protocol):
    """What a session needs of its shell. form: the wire form of what it takes.

    secret: names the session to whoever sends commands for it by other ways (emulation), "" if nobody does.
    pings: whether the session asks for signs of life, by the pings of the protocol; if not, the transport sees to it.
    """

    @property
    def form(self) -> WireFormat: ...

    @property
    def secret(self) -> str: ...

    @property
    def pings(self) -> bool: ...

    @property
    def sink(self) -> Sink: ...

    def send(self, payload: bytes) -> None:
        """One message to this client alone."""

    def close(self, code: int, reason: str) -> None:
        """Close after what is queued has left, or after a deadline."""

    def pause(self) -> None:
        """Read no more from the client until `resume`. Both may be called any number of times."""

    def resume(self) -> None: ...


class SessionState(enum.Enum):
    OPENED = enum.auto()
    REFUSED = enum.auto()
    CONNECTED = enum.auto()
    CLOSED = enum.auto()


# Names of our own, for what is done at each command: a member of an Enum takes six times as long to find.
_OPENED, _CONNECTED = _TALKING = (SessionState.OPENED, SessionState.CONNECTED)
_NEVER = math.inf
_PONG = messages.Command()
# Stands for a message that could not be read, behind the commands that came before it: it is none either.
_UNREADABLE = messages.Command(id=1)


class Session:
    """See the module.

    info: who the client is, empty until it is admitted. handle: the client as handlers see it. refreshable: whether
    a token admitted it, so that it may bring another. subscriptions: by channel, those still joining included.
    """

    __slots__ = (
        "_busy",
        "_commands",
        "_connection",
        "_expire_by",
        "_failures",
        "_paused",
        "_ping_at",
        "_pong_by",
        "_pumping",
        "_queue",
        "_rate_due",
        "_running",
        "_stale_by",
        "deadline_bucket",
        "encoding",
        "handle",
        "info",
        "refreshable",
        "request",
        "services",
        "settings",
        "state",
        "subscriptions",
    )

    def __init__(
        self,
        settings: SessionSettings,
        services: SessionServices,
        commands: Mapping[str, CommandFunction],
        connection: Connection,
        request: OpeningRequest,
    ) -> None:
        self.settings = settings
        self.services = services
        self.request = request
        self.state = SessionState.OPENED
        self.info = ClientInfo("", "")
        self.handle: ConnectedClient | None = None
        self.refreshable = False
        self.subscriptions: dict[str, Subscription] = {}
        self._commands = commands
        self._connection = connection
        self.encoding = connection.form.encoding
        # Most sessions have nothing waiting at most times, and an empty deque is not small.
        self._queue: deque[messages.Command] | tuple[()] = ()
        self._running = 0
        # The channels of the commands that run, where several may.
        self._busy: set[str] | tuple[()] = ()
        # When the commands so far would be used up at the allowed rate.
        self._rate_due = 0.0
        # How many commands failed since when.
        self._failures = (0, -math.inf)
        self._pumping = self._paused = False
        self._ping_at = self._pong_by = self._expire_by = math.inf
        self._stale_by = self._after(settings.client.stale_close_delay or math.inf)
        self.deadline_bucket = 0
        self.arm()

    @property
    def client(self) -> str:
        """The id of this connection."""
        return self.info.client

    @property
    def user(self) -> str:
        """The application's user id."""
        return self.info.user

    def channels(self) -> list[str]:
        """The channels to which the client is subscribed."""
        return [channel for channel, subscription in self.subscriptions.items() if subscription.live]

    # -- what arrives ------------------------------------------------------------------------------------------------

    def receive(self, message: bytes) -> None:
        """One whole message of the client."""
        if self.state not in _TALKING:
            return
        encoding = self.encoding
        if self._pong_by < _NEVER and message == encoding.ping:
            self._ponged()
            return
        if encoding.unidirectional and (self._running or self.state is _CONNECTED):
            return
        if self._running or self._queue or self._pumping:
            self._enqueue(message)
            return
        # With nothing to wait for, one command needs no queue.
        try:
            command = encoding.command(message)
            if command is None:
                self._enqueue(message)
            elif self._pong_by < _NEVER and command == _PONG:
                self._ponged()
            else:
                self._take(command)
        except ProtocolError:
            self.disconnect(*errors.BAD_PROTOCOL)

    def _enqueue(self, message: bytes) -> None:
        queue = self._queue or deque()
        try:
            for command in self.encoding.commands(message):
                if self._pong_by < _NEVER and command == _PONG:
                    self._ponged()
                else:
                    queue.append(command)
        except ProtocolError:
            # The commands before it are still acted on.
            queue.append(_UNREADABLE)
        self._queue = queue
        if not self._pumping:
            self._pump()
        if len(self._queue) > self.settings.client.command_queue and not self._paused:
            self._paused = True
            self._connection.pause()

    def _ponged(self) -> None:
        # Never behind the commands that wait: that they take long is not the client's fault. The deadline that is armed
        # wakes us once for nothing, which is cheaper than moving it at every pong.
        self._pong_by = math.inf

    def _pump(self) -> None:
        """Begin what may begin now; what is too much for one turn of the loop, in turns with other work."""
        self._pumping = True
        slices = self.services.slices
        while self._begin_some():
            slices.start_slice()
            if not slices.has_time:
                slices.add(self._begin_others())
                return
        self._pumped()

    def _begin_others(self) -> Iterator[None]:
        while self._begin_some():
            yield
        self._pumped()

    def _begin_some(self) -> bool:
        """Begin commands that wait; whether there may be more that could begin."""
        for _ in range(COMMANDS_AT_ONCE):
            if not self._queue or self.state not in _TALKING:
                return False
            command = self._next() if self._running else self._queue.popleft()
            if command is None:
                return False
            try:
                self._take(command)
            except ProtocolError:
                self.disconnect(*errors.BAD_PROTOCOL)
        return bool(self._queue)

    def _pumped(self) -> None:
        self._pumping = False
        if not self._queue:
            self._queue = ()
        if self._paused and len(self._queue) <= self.settings.client.command_queue // 2:
            self._paused = False
            if self._pong_by < math.inf:
                # It may have come long ago, and is read only now.
                self._pong_by = self._after(self.settings.client.pong_timeout)
                self.arm()
            self._connection.resume()

    def _next(self) -> messages.Command | None:
        """Take the first command that may begin beside those that run out of the queue."""
        queue, settings = self._queue, self.settings.client
        if not queue or self._running >= settings.concurrency or self.state is SessionState.OPENED:
            return None
        for place in range(min(len(queue), settings.command_queue)):
            command = queue[place]
            channel = _channel_of(command)
            if channel is None:
                return None  # what is no command waits for those before it
            if channel not in self._busy:
                del queue[place]
                return command
        return None

    def _take(self, command: messages.Command) -> None:
        name, request = command.request()
        if (name == "connect") != (self.state is _OPENED) or (not command.id and name not in ("", "send")):
            raise ProtocolError("out of place")
        if not name:
            raise ProtocolError("a pong without a ping")
        counters = self.services.counters
        counters.commands[name].value += 1
        if self.settings.client.commands_per_second and self._is_too_much():
            counters.bad_input["command_rate"].value += 1
            self._refuse(command.id, name, ClientError(*errors.TOO_MANY_REQUESTS))
            return
        try:
            rest = self._commands[name](self, command.id, request)
        except Exception as error:
            self._failed(command.id, name, error)
            return
        if rest is None:
            return
        self._running += 1
        if self.settings.client.concurrency > 1 and (channel := _channel_of(command)):
            self._busy = self._busy or set()
            self._busy.add(channel)
        self.services.run(self._execute(command.id, name, request, rest), self._executed)

    def _is_too_much(self) -> bool:
        """Whether this command is over the rate. A client that goes on all the same is disconnected."""
        rate = self.settings.client.commands_per_second
        now = self.services.deadlines.now
        self._rate_due = max(self._rate_due, now) + 1 / rate
        # Half a command is the sum of what the additions were rounded by, and more.
        commands = (self._rate_due - now) * rate - 0.5
        if commands > 2 * RATE_BURST * rate:
            self.disconnect(*errors.TOO_MANY_COMMANDS)
        return commands > RATE_BURST * rate

    async def _execute(self, id: int, name: str, request: Any, rest: Coroutine[Any, Any, None]) -> None:
        try:
            await rest
        except Exception as error:
            self._failed(id, name, error)
        finally:
            if self._busy:
                self._busy.discard(getattr(request, "channel", ""))

    def _failed(self, id: int, name: str, error: Exception) -> None:
        """A command came to this, in place of its reply."""
        match error:
            case Disconnect():
                self.disconnect(error.code, error.reason)
            case ClientError():
                self._refuse(id, name, error)
            case EngineUnavailable() | KeysUnavailable():
                self._refuse(id, name, ClientError(*errors.INTERNAL_ERROR))
            case _:
                self.services.report_error(error)
                self._refuse(id, name, ClientError(*errors.INTERNAL_ERROR))

    def _executed(self, result: Any, error: BaseException | None) -> None:
        self._running -= 1
        if error is not None:
            self.services.report_error(error)
            self.disconnect(*errors.SERVER_ERROR)
        elif not self._pumping:
            self._pump()

    def reply(self, id: int, name: str, result: Struct) -> None:
        """Answer command `id`; harmless when the client has gone meanwhile."""
        if self.state is not SessionState.CLOSED:
            self._connection.send(self.encoding.reply(id, name, result))

    def answer(self, id: int, value: Any) -> None:
        """Answer the RPC with command `id` by what its handler returned; harmless when the client has gone meanwhile.

        Raises as `Encoding.made`.
        """
        if self.state is not SessionState.CLOSED:
            self._connection.send(self.encoding.answer(id, value))

    def _refuse(self, id: int, name: str, error: ClientError) -> None:
        if self.state is SessionState.CLOSED:
            return
        self.services.counters.count_error(name, error.code)
        if name == "connect" and self.state is SessionState.CONNECTED:
            self.disconnect(*errors.SERVER_ERROR)  # a mistake of ours, after the reply
            return
        if self.encoding.unidirectional:
            self.disconnect(*_WITHOUT_REPLIES.get(error.code, errors.SERVER_ERROR))
            return
        if id:
            self._connection.send(self.encoding.error_reply(id, error))
        if name == "connect":
            # What followed in the same message counted on the connect: it is dropped without a word.
            self.state = SessionState.REFUSED
            self._queue = ()
            self._stale_by = self._after(REFUSED_DELAY)
            self.arm()
        elif not error.temporary and error.code != errors.TOKEN_EXPIRED[0]:
            self._count_failure()

    def _count_failure(self) -> None:
        """Disconnect the client when too many of its commands failed by its own fault."""
        limit, now = self.settings.client.error_limit, self.services.deadlines.now
        failed, since = self._failures
        self._failures = (failed + 1, since) if now - since <= ERROR_WINDOW else (1, now)
        if 0 < limit < self._failures[0]:
            self.disconnect(*errors.TOO_MANY_ERRORS)

    # -- time --------------------------------------------------------------------------------------------------------

    def _after(self, delay: float) -> float:
        return self.services.deadlines.now + delay

    def _close_time(self, expire_at: float, grace: float) -> float:
        """The loop time at which what expires at `expire_at` (Unix seconds, 0.0 for never) is ended."""
        return self._after(expire_at - self.services.wall_clock() + grace) if expire_at else math.inf

    def arm(self) -> None:
        """Have `on_deadline` called at what is due next."""
        due = min(self._stale_by, self._ping_at, self._pong_by, self._expire_by, self._subscriptions_due())
        if due < math.inf and self.state is not SessionState.CLOSED:
            self.services.deadlines.set(self, due)

    def on_deadline(self) -> None:
        """Something is due."""
        now = self.services.deadlines.now
        if self._stale_by <= now:
            if self.state is SessionState.REFUSED:
                self.disconnect(*errors.CONNECTION_CLOSED)
            else:
                # 3502 is final. A client whose connect command is still being worked on has done its part.
                self.disconnect(*(errors.SERVER_ERROR if self._running else errors.STALE))
        elif self._pong_by <= now and not self._paused:
            self.disconnect(*errors.NO_PONG)
        elif self._expire_by <= now:
            self.disconnect(*errors.CONNECTION_EXPIRED)
        else:
            self._end_expired(now)
            if self._ping_at <= now and self.state is SessionState.CONNECTED:
                self._ping(now)
            self.arm()

    def _ping(self, now: float) -> None:
        settings = self.settings.client
        self._ping_at = now + settings.ping_interval
        if self._pong_by < math.inf:
            return  # the client is not being read, and a second pong would be one too many
        if settings.pong_timeout > 0 and not self.encoding.unidirectional:
            self._pong_by = now + settings.pong_timeout
        self._connection.send(self.encoding.ping)

    @property
    def pings(self) -> tuple[int, bool]:
        """What the client is told: seconds between two pings, 0 for none, and whether it shall answer them."""
        settings = self.settings.client
        if not (settings.ping_interval > 0 and self._connection.pings):
            return 0, False
        return math.ceil(settings.ping_interval), settings.pong_timeout > 0 and not self.encoding.unidirectional

    def _subscriptions_due(self) -> float:
        ends = [subscription.end_at for subscription in self.subscriptions.values() if subscription.end_at]
        return self._close_time(min(ends), 0.0) if ends else math.inf

    def _end_expired(self, now: float) -> None:
        for subscription in list(self.subscriptions.values()):
            if subscription.live and self._close_time(subscription.end_at, 0.0) <= now:
                if subscription.origin is SubscriptionSource.CLIENT:
                    self.end_subscription(subscription.channel, *errors.SUBSCRIPTION_EXPIRED_PUSH)
                else:
                    self.disconnect(*errors.SUBSCRIPTION_EXPIRED)
                    return

    def ttl(self, expire_at: float) -> int:
        """Whole seconds until `expire_at` (Unix seconds), 0 for never. Raises ClientError 110 when it has passed."""
        if not expire_at:
            return 0
        left = expire_at - self.services.wall_clock()
        if left <= 0:
            raise ClientError(*errors.EXPIRED)
        return min(math.ceil(left), LONGEST_TTL)

    def expire(self, expire_at: float) -> None:
        """The connection ends at `expire_at` (Unix seconds, 0.0 for never), with a grace if it may be refreshed."""
        grace = self.settings.client.expired_close_delay if self.refreshable else 0.0
        self._expire_by = self._close_time(expire_at, grace * random.uniform(1.0, 1.0 + EXPIRY_SPREAD))
        self.arm()

    # -- who it is, and what it may ----------------------------------------------------------------------------------

    async def admit(self, info: ClientInfo) -> None:
        """The client shall be `info`, and counts as connected; the caller then calls `begin`, or `dismiss` at any end.

        Raises Disconnect when its user has as many connections as it may, and EngineUnavailable.
        """
        engine, limit = self.services.engine, self.settings.client.user_connection_limit
        self.info = info
        if not (limit and info.user):
            engine.tell(AddClient(info))
        elif not await engine.ask(AdmitClient(info, limit)):
            raise Disconnect(*errors.CONNECTION_LIMIT)

    def dismiss(self) -> None:
        """The client, once admitted, is not let in after all."""
        self.services.engine.tell(RemoveClient(self.client))
        for subscription in list(self.subscriptions.values()):
            self.abandon(subscription)

    def begin(self, name: str, version: str, meta: bytes) -> None:
        """The admitted client is connected. name, version: what it says of its software. meta: see
        `ConnectedClient.meta`."""
        self.state = SessionState.CONNECTED
        self.handle = ConnectedClient(self, name, version, self.request.headers, self.request.remote_address, meta)
        self._stale_by = math.inf
        interval, _ = self.pings
        if interval:
            # Spread, so that clients that came together are not pinged together.
            self._ping_at = self._after(self.settings.client.ping_interval * random.uniform(0.5, 1.0))
        self.services.sessions.add(self)
        self.arm()

    def may(self, verb: str, channel: str, options: ResolvedChannel) -> bool:
        """Whether the options let this client "publish", ask for "presence" or for "history"."""
        subscription = self.subscriptions.get(channel)
        subscribed = subscription is not None and subscription.live
        return self.settings.client.insecure or options.allows(verb, self.user, subscribed)

    @property
    def secret(self) -> str:
        """See `Connection.secret`."""
        return self._connection.secret

    # -- its subscriptions -------------------------------------------------------------------------------------------

    def subscription(
        self, request: SubscribeRequest, options: ResolvedChannel, terms: SubscribeOptions, origin: SubscriptionSource
    ) -> Subscription:
        """A subscription of this client that is not joined yet, with what it asks for as far as that is granted.

        options: of `request.channel`. Raises ClientError 107 for a filter that is not allowed or not valid.
        """
        options = options.overridden(terms.override)
        info = msgspec.structs.replace(self.info, chan_info=terms.info) if terms.info else self.info
        subscription = Subscription(
            self, self._connection.sink, self._connection.form, request.channel, options, info, origin
        )
        subscription.grant(
            request,
            history=self.may("history", request.channel, options),
            presence=self.may("presence", request.channel, options),
        )
        return subscription

    async def join(self, subscription: Subscription, request: SubscribeRequest) -> JoinResult | None:
        """Have it join, and return what `Subscription.join` does; None if it was ended meanwhile.

        Whatever comes of it but a result, the subscription leaves nothing behind. Raises as `Subscription.join`.
        """
        self.subscriptions[request.channel] = subscription
        try:
            joined = await subscription.join(request)
        except BaseException:
            self.abandon(subscription)
            raise
        if self.state is SessionState.CLOSED or self.subscriptions.get(request.channel) is not subscription:
            self.abandon(subscription)
            return None
        result = joined.result
        if result.was_recovering and not result.recovered:
            ahead = request.epoch == result.epoch and request.offset > result.offset
            self.services.counters.bad_input["recovery_ahead"].value += ahead
        return joined

    def open(self, subscription: Subscription, joined: JoinResult) -> None:
        """Let publications through, once the client was told of the subscription. joined: what `join` returned."""
        if self.state is SessionState.CLOSED:
            self.abandon(subscription)
        elif not subscription.open(joined):
            self.lost_position(subscription)

    def describe(self, conn_info: bytes) -> None:
        """Others see the client with this `conn_info` from now on."""
        self.info = msgspec.structs.replace(self.info, conn_info=conn_info)
        for subscription in self.subscriptions.values():
            self.describe_in(subscription, msgspec.structs.replace(subscription.info, conn_info=conn_info))

    def describe_in(self, subscription: Subscription, info: ClientInfo) -> None:
        """The same in one channel, with all that is shown there."""
        if info != subscription.info:
            self.services.run(quietly(subscription.describe(info)), self.undone)

    # -- what the server does to it ----------------------------------------------------------------------------------

    def _push(self, channel: str, name: str, body: Struct) -> None:
        self._connection.send(self.encoding.push(channel, name, body))

    def send(self, data: Any) -> None:
        """A message to this client alone, outside any channel; `data`: anything that JSON holds."""
        if self.state is SessionState.CONNECTED:
            self._push("", "message", messages.MessagePush(Raw(self.encoding.made(data) or b"null")))

    def subscribe(self, channel: str, terms: SubscribeOptions, since: Position | None) -> None:
        """Subscribe the client to a channel, unless it is. since: where it knows the channel from, if it does."""
        if self.state is SessionState.CONNECTED and channel not in self.subscriptions:
            self.services.run(quietly(self._subscribe(channel, terms, since)), self.undone)

    async def _subscribe(self, channel: str, terms: SubscribeOptions, since: Position | None) -> None:
        if terms.expire_at and terms.expire_at <= self.services.wall_clock():
            return
        limit = self.settings.client.channel_limit
        if 0 < limit <= len(self.subscriptions):
            self.disconnect(*errors.CHANNEL_LIMIT)
            return
        request = SubscribeRequest(channel)
        if since is not None:
            request = SubscribeRequest(channel, recover=True, offset=since.offset, epoch=since.epoch)
        subscription = self.subscription(
            request, self.services.rules.options(channel), terms, SubscriptionSource.SERVER
        )
        joined = await self.join(subscription, request)
        if joined is None:
            return
        result = joined.result
        subscription.end_at = terms.expire_at
        self._push(
            channel,
            "subscribe",
            messages.SubscribePush(
                recoverable=result.recoverable,
                epoch=result.epoch,
                offset=result.offset,
                positioned=result.positioned,
                data=messages.embedded(terms.data),
            ),
        )
        for publication in result.publications or ():
            self._push(channel, "pub", publication)
        self.open(subscription, joined)
        self.arm()

    def end_subscription(self, channel: str, code: int, reason: str) -> None:
        """Unsubscribe the client; from code 2500 on it comes back at once."""
        subscription = self.subscriptions.get(channel)
        if subscription is None:
            return
        live = subscription.live
        self.abandon(subscription)
        if live:  # else its subscribe command is answered with an error
            self._push(channel, "unsubscribe", messages.UnsubscribePush(code, reason))

    def refresh(self, expire_at: float, info: bytes) -> None:
        """The connection expires at `expire_at` (Unix seconds, 0.0 for never). info: see `describe`; b"" leaves it."""
        try:
            ttl = self.ttl(expire_at)
        except ClientError:
            self.disconnect(*errors.CONNECTION_EXPIRED)
            return
        if info:
            self.describe(info)
        self.expire(expire_at)
        self._push("", "refresh", messages.RefreshPush(bool(ttl), ttl))

    def abandon(self, subscription: Subscription) -> None:
        """End a subscription at whatever stage it is, without waiting for the engine, which may be away."""
        if self.subscriptions.get(subscription.channel) is subscription:
            del self.subscriptions[subscription.channel]
        self.services.run(quietly(subscription.leave()), self.undone)

    def lost_position(self, subscription: Subscription) -> None:
        """The client may have missed publications: it shall come back, and recover or be told that it can't."""
        if subscription.origin is SubscriptionSource.CLIENT:
            self.end_subscription(subscription.channel, *errors.LOST_POSITION)
        else:
            self.disconnect(*errors.INSUFFICIENT_STATE)

    def disconnect(self, code: int, reason: str) -> None:
        """Close the connection with this code; the client is gone for everybody from this moment on."""
        if self.state is not SessionState.CLOSED:
            self.services.counters.count_disconnect(code)
            self._end()
            self._connection.close(code, reason)

    def closed(self) -> None:
        """The socket is gone."""
        if self.state is not SessionState.CLOSED:
            self._end()

    def _end(self) -> None:
        was_connected = self.state is SessionState.CONNECTED
        self.state = SessionState.CLOSED
        self.services.deadlines.clear(self)
        self._queue = ()
        if was_connected:
            self.services.sessions.remove(self)
            self.services.engine.tell(RemoveClient(self.client))
            # One that is still joining is undone by its own coroutine, which finds the session closed.
            for subscription in [s for s in self.subscriptions.values() if s.live]:
                self.abandon(subscription)
            if self.services.handlers.disconnected is not None:
                self.services.run(quietly(self.services.handlers.disconnected(self.handle)), self.undone)
        if self.handle is not None:
            release(self.handle)

    def undone(self, result: Any, error: BaseException | None) -> None:
        """Take the outcome of work that nobody waits for."""
        if error is not None:
            self.services.report_error(error)


def _channel_of(command: messages.Command) -> str | None:
    """The channel that a command concerns, "" for none; None for what is no command."""
    try:
        _, request = command.request()
    except ProtocolError:
        return None
    return getattr(request, "channel", "")


# What is left to do when it returns, None for nothing.
CommandFunction = Callable[[Session, int, Any], Coroutine[Any, Any, None] | None]


async def quietly(work: Awaitable[Any]) -> None:
    """Wait for work of which only the attempt matters: what it undoes is already undone on this worker."""
    with suppress(EngineUnavailable, ClientError, Disconnect):
        await work
