"""One client's session: what may follow what, in which order, and when it ends.

    OPENED ──connect──▶ CONNECTED ──▶ CLOSED
       └───refused────▶ REFUSED ────────┘

A session is told what arrives (`receive`, `closed`) and what time it is (`wake`), and tells its `Connection` what to
send. Commands run one at a time, in the order of arrival: while one waits for the engine or for a handler, the next
ones queue, and past a limit the socket is not read. What each command does is in `realtime.protocol.commands`.
Nothing here knows a socket, a thread or a reactor.
"""

from __future__ import annotations

import enum
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from typing import Any, Protocol

import msgspec
from msgspec import Raw, Struct

from realtime import errors
from realtime.errors import ClientError, Disconnect, EngineUnavailable, KeysUnavailable
from realtime.protocol import messages
from realtime.protocol.client import Client
from realtime.protocol.forms import Form
from realtime.protocol.messages import ProtocolError
from realtime.protocol.node import Node
from realtime.protocol.rules import ResolvedChannel
from realtime.protocol.subscription import Subscription
from realtime.records import ClientInfo

# Seconds. A client whose connect was refused closes the connection itself; one that does not is shown out.
REFUSED_DELAY = 5.0


class Connection(Protocol):
    """What a session needs of its shell. form: the wire form of what it takes.

    secret: names the session to whoever sends commands for it by other ways (emulation), "" if nobody does.
    """

    @property
    def form(self) -> Form: ...

    @property
    def secret(self) -> str: ...

    def send(self, payload: bytes) -> None:
        """One message to this client alone."""

    def deliver(self, frame: bytes) -> None:
        """A ready frame, shared with other clients. Never raises."""

    def close(self, code: int, reason: str) -> None:
        """Close after what is queued has left, or after a deadline."""

    def pause(self) -> None:
        """Read no more from the client until `resume`. Both may be called any number of times."""

    def resume(self) -> None: ...


class Request(Struct, frozen=True):
    """The opening handshake that brought the client here. Header names are in lower case."""

    headers: dict[str, str]
    query: dict[str, str]
    path: str
    remote_address: str


class State(enum.Enum):
    OPENED = enum.auto()
    REFUSED = enum.auto()
    CONNECTED = enum.auto()
    CLOSED = enum.auto()


_TALKING = (State.OPENED, State.CONNECTED)
_PONG = messages.Command()


class Session:
    """See the module.

    info: who the client is, empty until it is connected. handle: the client as handlers see it. refreshable: whether
    a token admitted it, so that it may bring another. subscriptions: by channel, those still joining included.
    """

    __slots__ = (
        "_commands",
        "_connection",
        "_expire_by",
        "_paused",
        "_ping_at",
        "_pong_by",
        "_pumping",
        "_queue",
        "_stale_by",
        "_waiting",
        "bucket",
        "encoding",
        "handle",
        "info",
        "node",
        "refreshable",
        "request",
        "state",
        "subscriptions",
    )

    def __init__(
        self, node: Node, commands: Mapping[str, CommandFunction], connection: Connection, request: Request
    ) -> None:
        self.node = node
        self.request = request
        self.state = State.OPENED
        self.info = ClientInfo("", "")
        self.handle: Client | None = None
        self.refreshable = False
        self.subscriptions: dict[str, Subscription] = {}
        self._commands = commands
        self._connection = connection
        self.encoding = connection.form.encoding
        # None marks the place of a message that could not be read.
        self._queue: deque[messages.Command | None] = deque()
        self._waiting = self._pumping = self._paused = False
        self._ping_at = self._pong_by = self._expire_by = math.inf
        self._stale_by = self._after(node.settings.stale_close_delay or math.inf)
        self.bucket = 0
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
        try:
            for command in self.encoding.commands(message):
                if command == _PONG and self._pong_by < math.inf:
                    # Never behind the commands that wait: that they take long is not the client's fault. The deadline
                    # that is armed wakes us once for nothing, which is cheaper than moving it at every pong.
                    self._pong_by = math.inf
                else:
                    self._queue.append(command)
        except ProtocolError:
            # The commands before it are still acted on.
            self._queue.append(None)
        if not self._pumping:
            self._pump()
        if len(self._queue) > self.node.settings.command_queue and not self._paused:
            self._paused = True
            self._connection.pause()

    def _pump(self) -> None:
        self._pumping = True
        while self._queue and not self._waiting and self.state in _TALKING:
            try:
                self._take(self._queue.popleft())
            except ProtocolError:
                self.disconnect(*errors.BAD_PROTOCOL)
        self._pumping = False
        if self._paused and len(self._queue) <= self.node.settings.command_queue // 2:
            self._paused = False
            if self._pong_by < math.inf:
                # It may have come long ago, and is read only now.
                self._pong_by = self._after(self.node.settings.pong_timeout)
                self.arm()
            self._connection.resume()

    def _take(self, command: messages.Command | None) -> None:
        if command is None:
            raise ProtocolError("unreadable")
        name, request = command.request()
        if (name == "connect") != (self.state is State.OPENED) or (not command.id and name not in ("", "send")):
            raise ProtocolError("out of place")
        if not name:
            raise ProtocolError("a pong without a ping")
        self._waiting = True
        self.node.run(self._execute(command.id, name, request), self._executed)

    async def _execute(self, id: int, name: str, request: Any) -> None:
        try:
            await self._commands[name](self, id, request)
        except Disconnect as error:
            self.disconnect(error.code, error.reason)
        except (EngineUnavailable, KeysUnavailable):
            self._refuse(id, name, ClientError(*errors.INTERNAL_ERROR))
        except ClientError as error:
            self._refuse(id, name, error)
        except Exception as error:
            self.node.failed(error)
            self._refuse(id, name, ClientError(*errors.INTERNAL_ERROR))

    def _executed(self, result: Any, error: BaseException | None) -> None:
        self._waiting = False
        if error is not None:
            self.node.failed(error)
            self.disconnect(*errors.SERVER_ERROR)
        elif not self._pumping:
            self._pump()

    def reply(self, id: int, name: str, result: Struct) -> None:
        """Answer command `id`; harmless when the client has gone meanwhile."""
        if self.state is not State.CLOSED:
            self._connection.send(self.encoding.reply(id, name, result))

    def _refuse(self, id: int, name: str, error: ClientError) -> None:
        if self.state is State.CLOSED or not id:
            return
        self._connection.send(self.encoding.error_reply(id, error))
        if name == "connect":
            # What followed in the same message counted on the connect: it is dropped without a word.
            self.state = State.REFUSED
            self._queue.clear()
            self._stale_by = self._after(REFUSED_DELAY)
            self.arm()

    # -- time --------------------------------------------------------------------------------------------------------

    def _after(self, delay: float) -> float:
        return self.node.deadlines.now + delay

    def _close_time(self, expire_at: float, grace: float) -> float:
        """The loop time at which what expires at `expire_at` (Unix seconds, 0.0 for never) is ended."""
        return self._after(expire_at - self.node.wall_clock() + grace) if expire_at else math.inf

    def arm(self) -> None:
        """Have `wake` called at what is due next."""
        due = min(self._stale_by, self._ping_at, self._pong_by, self._expire_by, self._subscriptions_due())
        if due < math.inf:
            self.node.deadlines.set(self, due)

    def wake(self) -> None:
        """Something is due."""
        now = self.node.deadlines.now
        if self._stale_by <= now:
            # 3502 is final. A client whose connect command is still being worked on has done its part: it comes back.
            self.disconnect(*(errors.SERVER_ERROR if self._waiting else errors.STALE))
        elif self._pong_by <= now and not self._paused:
            self.disconnect(*errors.NO_PONG)
        elif self._expire_by <= now:
            self.disconnect(*errors.CONNECTION_EXPIRED)
        else:
            self._end_expired(now)
            if self._ping_at <= now:
                self._ping(now)
            self.arm()

    def _ping(self, now: float) -> None:
        settings = self.node.settings
        self._ping_at = now + settings.ping_interval
        if self._pong_by < math.inf:
            return  # the client is not being read, and a second pong would be one too many
        if settings.pong_timeout > 0:
            self._pong_by = now + settings.pong_timeout
        self._connection.send(self.encoding.ping)

    def _subscriptions_due(self) -> float:
        ends = [subscription.expire_at for subscription in self.subscriptions.values() if subscription.expire_at]
        return self._close_time(min(ends), self.node.settings.expired_sub_close_delay) if ends else math.inf

    def _end_expired(self, now: float) -> None:
        grace = self.node.settings.expired_sub_close_delay
        for subscription in list(self.subscriptions.values()):
            if subscription.live and self._close_time(subscription.expire_at, grace) <= now:
                self.end_subscription(subscription.channel, *errors.SUBSCRIPTION_EXPIRED_PUSH)

    def expire(self, expire_at: float) -> None:
        """The connection ends at `expire_at` (Unix seconds, 0.0 for never), with a grace if it may be refreshed."""
        self._expire_by = self._close_time(
            expire_at, self.node.settings.expired_close_delay if self.refreshable else 0.0
        )
        self.arm()

    # -- who it is, and what it may ----------------------------------------------------------------------------------

    def begin(self, info: ClientInfo, name: str, version: str) -> None:
        """The client is connected, as `info`. name, version: what it says of its software."""
        settings = self.node.settings
        self.state = State.CONNECTED
        self.info = info
        self.handle = Client(self, name, version, self.request.headers, self.request.remote_address)
        self._stale_by = math.inf
        if settings.ping_interval > 0:
            # Spread, so that clients that came together are not pinged together.
            self._ping_at = self._after(settings.ping_interval * random.uniform(0.5, 1.0))
        self.node.registry.add(self)
        self.node.engine.connected(info)
        self.arm()

    def may(self, verb: str, channel: str, options: ResolvedChannel) -> bool:
        """Whether the options let this client "publish", ask for "presence" or for "history"."""
        subscription = self.subscriptions.get(channel)
        subscribed = subscription is not None and subscription.live
        return self.node.settings.insecure or options.allows(verb, self.user, subscribed)

    @property
    def secret(self) -> str:
        """See `Connection.secret`."""
        return self._connection.secret

    def subscription(self, channel: str, options: ResolvedChannel, chan_info: bytes) -> Subscription:
        """A subscription of this client, not yet joined."""
        info = msgspec.structs.replace(self.info, chan_info=chan_info)
        return Subscription(self, self._connection.deliver, self._connection.form, self.node, channel, options, info)

    def describe(self, conn_info: bytes) -> None:
        """Others see the client with this `conn_info` from now on."""
        self.info = msgspec.structs.replace(self.info, conn_info=conn_info)
        for subscription in self.subscriptions.values():
            self.describe_in(subscription, msgspec.structs.replace(subscription.info, conn_info=conn_info))

    def describe_in(self, subscription: Subscription, info: ClientInfo) -> None:
        """The same in one channel, with all that is shown there."""
        if info != subscription.info:
            self.node.run(quietly(subscription.describe(info)), self._left)

    # -- what the server does to it ----------------------------------------------------------------------------------

    def send(self, data: Any) -> None:
        """A message to this client alone, outside any channel; `data`: anything that JSON holds."""
        if self.state is State.CONNECTED:
            message = messages.Message(Raw(self.encoding.made(data) or b"null"))
            self._connection.send(self.encoding.push("", "message", message))

    def end_subscription(self, channel: str, code: int, reason: str) -> None:
        """Unsubscribe the client; from code 2500 on it comes back at once."""
        subscription = self.subscriptions.get(channel)
        if subscription is None or not subscription.live:
            return
        self.abandon(subscription)
        self._connection.send(self.encoding.push(channel, "unsubscribe", messages.Unsubscribe(code, reason)))

    def abandon(self, subscription: Subscription) -> None:
        """End a subscription at whatever stage it is, without waiting for the engine, which may be away."""
        if self.subscriptions.get(subscription.channel) is subscription:
            del self.subscriptions[subscription.channel]
        self.node.run(quietly(subscription.leave()), self._left)

    def lost_position(self, channel: str) -> None:
        """The client may have missed publications: it shall subscribe again, and recover or be told that it can't."""
        self.end_subscription(channel, *errors.LOST_POSITION)

    def disconnect(self, code: int, reason: str) -> None:
        """Close the connection with this code; the client is gone for everybody from this moment on."""
        if self.state is not State.CLOSED:
            self._end()
            self._connection.close(code, reason)

    def closed(self) -> None:
        """The socket is gone."""
        if self.state is not State.CLOSED:
            self._end()

    def _end(self) -> None:
        was_connected = self.state is State.CONNECTED
        self.state = State.CLOSED
        self.node.deadlines.clear(self)
        self._queue.clear()
        if was_connected:
            self.node.registry.remove(self)
            self.node.engine.disconnected(self.client)
            # One that is still joining is undone by its own coroutine, which finds the session closed.
            for subscription in [s for s in self.subscriptions.values() if s.live]:
                self.abandon(subscription)
            if self.node.handlers.disconnected is not None:
                self.node.run(quietly(self.node.handlers.disconnected(self.handle)), self._left)

    def _left(self, result: Any, error: BaseException | None) -> None:
        if error is not None:
            self.node.failed(error)


CommandFunction = Callable[[Session, int, Any], Coroutine[Any, Any, None]]


async def quietly(work: Awaitable[Any]) -> None:
    """Wait for work of which only the attempt matters: what it undoes is already undone on this worker."""
    with suppress(EngineUnavailable, ClientError, Disconnect):
        await work
