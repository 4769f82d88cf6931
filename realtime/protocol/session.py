"""One client's session: its state, its commands, its subscriptions, and its end.

The transport passes in messages (`receive`) and the end of the connection (`closed`); a session sends through
its `Connection`. It knows no socket, thread or reactor. The other parts of a session:

    session_state     the states, and the way through them
    command_queue     commands that wait for others
    session_timers    time limits: opening, pings, expiry
    commands          what each command does
    subscription      one subscription of the session
    replay            missed publications that follow a reply

A command that waits for nothing is one call on the way from `receive` to `reply`, without queue, coroutine or task.

On a unidirectional transport the client sends its connect request and nothing else; further messages are ignored.
There are no replies and no pongs, so a refusal is a disconnect.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from functools import partial
from math import inf
from typing import Any

import msgspec
from msgspec import Raw, Struct, UnsetType

from realtime import errors
from realtime.errors import ClientError, Disconnect, EngineUnavailable, KeysUnavailable, RealtimeError
from realtime.http.handshake import OpeningRequest
from realtime.protocol import messages
from realtime.protocol.channel_rules import ResolvedChannel
from realtime.protocol.client import ConnectedClient, release
from realtime.protocol.command_queue import LONG_MESSAGE, CommandQueue, channel_of
from realtime.protocol.context import Connection, SessionServices, SessionSettings
from realtime.protocol.messages import ProtocolError, Pub, SubscribeRequest
from realtime.protocol.orders import RefreshOrder, SubscribeOrder, UnsubscribeOrder
from realtime.protocol.replay import Replays
from realtime.protocol.session_state import ACCEPTING, CONNECTED, OPENED, Departure, SessionState
from realtime.protocol.session_timers import SessionTimers
from realtime.protocol.subscription import JoinResult, ReplyRoom, Subscription, SubscriptionSource
from realtime.pubsub.engine import Publish, RemoveClient
from realtime.types import ClientInfo, Position, SubscribeOptions

# How an error ends a connection without replies, by code (client protocol, section 2.9); others end it with 3004.
_WITHOUT_REPLIES = {
    errors.TOKEN_EXPIRED[0]: errors.CONNECTION_EXPIRED,
    errors.EXPIRED[0]: errors.CONNECTION_EXPIRED,
    errors.TOO_MANY_REQUESTS[0]: errors.TOO_MANY_COMMANDS,
    errors.PERMISSION_DENIED[0]: errors.DENIED,
}

_PONG = messages.Command()
_UNKNOWN_CLIENT = ClientInfo("", "")


class Session(SessionTimers):
    """See the module.

    info: the client's identity, empty until it is admitted. handle: the client as handlers see it, None before.
    is_refreshable: a token admitted the client, so it may send another one. subscriptions: by channel, including those
    that are still joining. subscribing: channels of subscribe commands whose permission is being decided.

    running: number of commands that wait for the engine or a handler. busy_channels: the channels of those, where
    several may run. queue: commands that wait for these, None for an empty queue. background: number of actions of the
    server that wait for the engine. departure: set while the session is about to move to another worker.
    """

    __slots__ = (
        "_commands",
        "_connection",
        "background",
        "busy_channels",
        "departure",
        "encoding",
        "handle",
        "info",
        "is_refreshable",
        "queue",
        "replays",
        "request",
        "running",
        "state",
        "subscribing",
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
        super().__init__(settings, services)
        self.request = request
        self.state = SessionState.OPENED
        self.info = _UNKNOWN_CLIENT
        self.handle: ConnectedClient | None = None
        self.is_refreshable = False
        self.subscriptions: dict[str, Subscription] = {}
        self.subscribing: set[str] | tuple[()] = ()
        self.running = self.background = 0
        self.departure: Departure | None = None
        self.busy_channels: set[str] | tuple[()] = ()
        self._commands = commands
        self._connection = connection
        self.encoding = connection.form.encoding
        self.queue: CommandQueue | None = None
        self.replays: Replays | None = None
        self.schedule_deadline()

    @property
    def client(self) -> str:
        """The id of this connection."""
        return self.info.client

    @property
    def user(self) -> str:
        """The application's user id."""
        return self.info.user

    @property
    def connection(self) -> Connection:
        """The connection of this session."""
        return self._connection

    @property
    def secret(self) -> str:
        """See `Connection.secret`."""
        return self._connection.secret

    def channels(self) -> list[str]:
        """Return the channels to which the client is subscribed."""
        return [channel for channel, subscription in self.subscriptions.items() if subscription.is_active]

    @property
    def is_connected(self) -> bool:
        """Whether the client has been admitted."""
        return self.state is CONNECTED

    # -- messages and commands ---------------------------------------------------------------------------------------

    def receive(self, message: bytes) -> None:
        """Handle one whole message of the client."""
        if self.state not in ACCEPTING:
            return
        encoding = self.encoding
        # The commonest message on an idle connection needs no decoding.
        if self._pong_by < inf and message == encoding.ping:
            self._pong_received()
            return
        if encoding.unidirectional and (self.running or self.state is CONNECTED):
            return
        if self.running or self.queue is not None or len(message) > LONG_MESSAGE:
            self._enqueue(message)
            return
        # A single command with none before it starts at once, without a queue.
        try:
            command = encoding.decode_command(message)
            if command is None:
                self._enqueue(message)
            elif self._pong_by < inf and command == _PONG:
                self._pong_received()
            else:
                self.start(command)
        except ProtocolError as error:
            self.disconnect(*errors.BAD_PROTOCOL, detail=str(error))

    def _enqueue(self, message: bytes) -> None:
        queue = self.queue
        if queue is None:
            queue = self.queue = CommandQueue(self)
        settings = self.settings
        fields = settings.first_fields if self.state is OPENED else settings.client.max_command_fields
        queue.append(self.encoding.decode_commands(message, fields), len(message))
        if not queue.is_starting:
            # All replies to the commands of a message leave together.
            holds = self._connection.hold()
            try:
                queue.start_ready()
            finally:
                if holds:
                    self._connection.release()
        if self.queue is not None:
            queue.limit()

    def take_pong(self, command: messages.Command) -> bool:
        is_pong = self._pong_by < inf and command == _PONG
        if is_pong:
            self._pong_received()
        return is_pong

    def start(self, command: messages.Command) -> None:
        """Start one command. Raises ProtocolError for one that is invalid, or not allowed now."""
        name, request = command.request()
        if (name == "connect") != (self.state is OPENED) or (not command.id and name not in ("", "send")):
            raise ProtocolError("the command is not allowed in this state, or has no id")
        if not name:
            raise ProtocolError("a pong without a ping")
        counters = self.services.counters
        counters.commands[name].value += 1
        if self.settings.client.commands_per_second and self._exceeds_rate():
            self._refuse(command.id, name, request, ClientError(*errors.TOO_MANY_REQUESTS, kind="command_rate"))
            return
        try:
            rest = self._commands[name](self, command.id, request)
        except Exception as error:
            self._answer_failure(command.id, name, request, error)
            return
        if rest is None:
            return
        self.running += 1
        if self.settings.client.concurrency > 1 and (channel := channel_of(command)):
            self.busy_channels = self.busy_channels or set()
            self.busy_channels.add(channel)
        finished = partial(self._finished, command.id, name, request)
        if isinstance(rest, Publish):
            self.services.engine.ask_then(rest, finished)
        else:
            self.services.run(rest, finished)

    def _finished(self, id: int, name: str, request: Any, result: Any, error: BaseException | None) -> None:
        """Go on after a command that has waited. result: of a publication, which is answered now; else None."""
        try:
            if result is not None:
                self.reply(id, name, messages.EMPTY)
            elif isinstance(error, Exception):
                self._answer_failure(id, name, request, error)
            elif error is not None:
                raise error
        except BaseException as unexpected:
            self.services.report_error(unexpected)
            self.disconnect(*errors.SERVER_ERROR)
        if self.busy_channels:
            self.busy_channels.discard(getattr(request, "channel", ""))
        self.running -= 1
        if self._commands is _DRAINING and not self.running:
            if self.queue is not None and not self.queue.is_starting:
                self.queue.start_ready()  # refuses the queued commands
            self.disconnect(*errors.SHUTDOWN)
        elif self.queue is not None and not self.queue.is_starting:
            self.queue.start_ready()

    def decode_request_data(self, raw: Raw | UnsetType) -> Any:
        """Return the data of a request as handlers get it. Raises ClientError 107."""
        encoding = self.encoding
        return encoding.decode_data(encoding.validate_data(raw))

    # Called by the queue

    @property
    def is_paused(self) -> bool:
        """Whether the socket is not read, because too many commands wait, or the session is about to move."""
        return self.queue is not None and (self.queue.is_paused or self.departure is not None)

    @property
    def is_congested(self) -> bool:
        """Whether the client has to take its replies before its next command starts."""
        return self._connection.is_congested

    def wait_until_drained(self) -> None:
        self._connection.when_drained(self.drained)

    def drained(self) -> None:
        """Go on with commands and replays that waited for the socket to take all frames."""
        if self.queue is not None and not self.queue.is_starting:
            self.queue.start_ready()
        if self.replays is not None:
            self.replays.resume()

    def pause_reading(self) -> None:
        self._connection.pause()

    def resume_reading(self) -> None:
        self._restart_pong_limit()
        self._connection.resume()

    # -- replies -----------------------------------------------------------------------------------------------------

    def reply(self, id: int, name: str, result: Struct) -> None:
        """Answer command `id`; harmless after the end of the session."""
        if self.state is not SessionState.CLOSED:
            self._connection.send(self.encoding.encode_reply(id, name, result))

    def reply_to_rpc(self, id: int, result: Any) -> None:
        """Answer the RPC command `id` with its handler's result; harmless after the end of the session.

        Raises as `Encoding.encode_data`.
        """
        if self.state is not SessionState.CLOSED:
            self._connection.send(self.encoding.encode_rpc_reply(id, result))

    def reply_to_presence(self, id: int, members: Iterable[bytes]) -> None:
        """Answer the presence command `id`; harmless after the end of the session. members: encoded entries."""
        if self.state is not SessionState.CLOSED:
            self._connection.send(self.encoding.encode_presence_reply(id, members))

    def _answer_failure(self, id: int, name: str, request: Any, error: Exception) -> None:
        """Answer a command that raised `error`."""
        match error:
            case Disconnect():
                detail = detail_of(error) or f"by its {name} command"
                self.disconnect(error.code, error.reason, kind=error.kind, detail=detail)
                return
            case ClientError():
                pass
            case EngineUnavailable():
                error = ClientError(*errors.INTERNAL_ERROR, kind="engine")
            case KeysUnavailable():
                error = ClientError(*errors.INTERNAL_ERROR, kind="keys")
            case _:
                self.services.report_error(error)
                error = ClientError(*errors.INTERNAL_ERROR)
        self._refuse(id, name, request, error)

    def _refuse(self, id: int, name: str, request: Any, error: ClientError) -> None:
        if self.state is SessionState.CLOSED:
            return
        self.services.counters.count_error(name, error.code)
        describe = partial(self._describe_command, name, request)
        self.services.client_log.refuse_by(
            error.code, error.kind, name, describe, reason=error.message, detail=detail_of(error)
        )
        if name == "connect" and self.state is CONNECTED:
            self.disconnect(*errors.SERVER_ERROR)  # a bug in the server, after the reply was sent
            return
        if self.encoding.unidirectional:
            self.disconnect(*_WITHOUT_REPLIES.get(error.code, errors.SERVER_ERROR), kind="refused")
            return
        if id:
            self._connection.send(self.encoding.encode_error(id, error))
        if name == "connect":
            # The commands behind a connect in the same message depend on it: they are dropped without a reply.
            self.state = SessionState.REFUSED
            if self.queue is not None:
                self.queue.clear()
            self._limit_refused()
        elif not error.temporary and error.code != errors.TOKEN_EXPIRED[0]:
            self._count_failure(name)

    # -- admission ---------------------------------------------------------------------------------------------------

    def complete_connect(self, name: str, version: str, meta: bytes) -> None:
        """Make the admitted client a connected one. name, version, meta: see `ConnectedClient`."""
        self.state = SessionState.CONNECTED
        self.handle = ConnectedClient(self, name, version, self.request.headers, self.request.remote_address, meta)
        self.services.sessions.add(self)
        if self.services.client_log.debug:
            self.services.client_log.came(self.describe)
        self._start_pings()

    def is_allowed(self, verb: str, channel: str, channel_options: ResolvedChannel) -> bool:
        """Return whether the channel's options let this client "publish", or read "presence" or "history"."""
        subscription = self.subscriptions.get(channel)
        is_subscribed = subscription is not None and subscription.is_active
        return self.settings.client.insecure or channel_options.allows(verb, self.user, is_subscribed)

    # -- subscriptions -----------------------------------------------------------------------------------------------

    def make_subscription(
        self,
        request: SubscribeRequest,
        channel_options: ResolvedChannel,
        options: SubscribeOptions,
        source: SubscriptionSource,
    ) -> Subscription:
        """Make a subscription of this client, before it joins, with the requested features as far as granted.

        channel_options: of `request.channel`. Raises as `Subscription.grant`.
        """
        channel_options = channel_options.with_override(options.override)
        info = msgspec.structs.replace(self.info, chan_info=options.info) if options.info else self.info
        connection = self._connection
        subscription = Subscription(
            self, connection.sink, connection.form, request.channel, channel_options, info, source
        )
        # The client is a subscriber once it has joined.
        insecure = self.settings.client.insecure
        subscription.grant(
            request,
            history=insecure or channel_options.allows("history", self.user, True),
            presence=insecure or channel_options.allows("presence", self.user, True),
        )
        return subscription

    def reply_room(self) -> ReplyRoom:
        """Return the room for missed publications in a reply that is sent now: less behind replies on their way."""
        return ReplyRoom(self.settings.client.recovery_reply_size - self._connection.unsent())

    async def join(
        self, subscription: Subscription, request: SubscribeRequest, room: ReplyRoom | None = None
    ) -> JoinResult | None:
        """Have the subscription join its channel. Returns None if it has ended by then.

        Without a result the subscription leaves nothing behind. room, and what is raised: as for `Subscription.join`.
        """
        self.subscriptions[request.channel] = subscription
        try:
            joined = await subscription.join(request, room)
        except BaseException:
            self.remove_subscription(subscription)
            raise
        if self.state is SessionState.CLOSED or self.subscriptions.get(request.channel) is not subscription:
            self.remove_subscription(subscription)
            return None
        result = joined.result
        is_unrecovered = result.was_recovering and result.recoverable and not result.recovered
        if is_unrecovered and request.epoch == result.epoch and request.offset > result.offset:
            self.services.client_log.refuse("recovery_ahead", self.describe, channel=repr(request.channel))
        return joined

    def activate(self, subscription: Subscription, joined: JoinResult) -> None:
        """Let publications through, after the reply with `joined.result` was sent."""
        if self.state is SessionState.CLOSED:
            self.remove_subscription(subscription)
            return
        if not subscription.activate(joined):
            self.subscription_lost_position(subscription)
            return
        if subscription.replay is not None:
            self.replays = self.replays or Replays(self, self._connection)
            self.replays.begin(subscription, subscription.replay)
        if subscription.renewal is not None:
            options, subscription.renewal = subscription.renewal, None
            self.subscribe(subscription.channel, options, None)

    def remove_subscription(self, subscription: Subscription, *, is_returning: bool = False) -> None:
        """End a subscription at any stage, without a wait for the engine, which may be away.

        is_returning: see `RemovePresence`.
        """
        if self.subscriptions.get(subscription.channel) is subscription:
            del self.subscriptions[subscription.channel]
        self.run_in_background(subscription.leave(is_returning=is_returning))

    def subscription_lost_position(self, subscription: Subscription) -> None:
        """Have the client subscribe again: it may have missed publications, and then recovers or learns of the gap."""
        if self.departure is not None and self.departure.is_frozen:
            self.departure.lost.add(subscription.channel)
        elif subscription.source is SubscriptionSource.CLIENT:
            self.unsubscribe(subscription.channel, *errors.LOST_POSITION)
        else:
            self.disconnect(*errors.INSUFFICIENT_STATE)

    def update_conn_info(self, conn_info: bytes) -> None:
        """Show the client to others with this `conn_info` from now on."""
        self.info = msgspec.structs.replace(self.info, conn_info=conn_info)
        for subscription in self.subscriptions.values():
            self.update_info(subscription, msgspec.structs.replace(subscription.info, conn_info=conn_info))

    def update_info(self, subscription: Subscription, info: ClientInfo) -> None:
        """Show the client to others in the channel of `subscription` as `info` from now on."""
        if info != subscription.info:
            self.run_in_background(subscription.update_info(info))

    # -- actions of the server ---------------------------------------------------------------------------------------

    def _push(self, channel: str, name: str, body: Struct) -> None:
        self._connection.send(self.encoding.encode_push(channel, name, body), is_push=True)

    def push_publications(self, channel: str, publications: Iterable[Pub]) -> None:
        """Send publications of a channel, without regard to the limit of the outbox: the caller has waited for it."""
        for publication in publications:
            self._connection.send(self.encoding.encode_push(channel, "pub", publication))

    def send(self, data: Any) -> None:
        """Send a message to this client alone, outside any channel. data: any value that JSON can hold."""
        if self.state is CONNECTED:
            self._push("", "message", messages.MessagePush(Raw(self.encoding.encode_data(data) or b"null")))

    def subscribe(self, channel: str, options: SubscribeOptions, since: Position | None) -> None:
        """Subscribe the client to a channel, or give its subscription these terms.

        since: the client's position in the channel, if any; without meaning for a subscribed client.
        """
        if self.state is not CONNECTED or (options.expire_at and options.expire_at <= self.services.wall_clock()):
            return
        if self.departure is not None and self.departure.put_off(
            SubscribeOrder(self.user, channel, options, self.client, since=since)
        ):
            return
        subscription = self.subscriptions.get(channel)
        if subscription is None:
            self.run_in_background(self._subscribe(channel, options, since))
        elif subscription.is_active:
            self.run_in_background(self._renew(subscription, options))
        else:
            subscription.renewal = options  # for `activate`

    def _expiry_of(self, options: SubscribeOptions) -> float:
        """Return the time at which a subscription of the server ends, with a grace in which the server may renew it."""
        return options.expire_at and options.expire_at + self.settings.client.expired_sub_close_delay

    async def _renew(self, subscription: Subscription, options: SubscribeOptions) -> None:
        """Give an active subscription new terms, without a leave and a join, and tell the client."""
        channel = subscription.channel
        info = msgspec.structs.replace(self.info, chan_info=options.info)
        channel_options = self.services.rules.options(channel).with_override(options.override)
        subscription.expire_at = self._expiry_of(options)
        self.schedule_deadline()
        position = await subscription.renew(channel_options, info)

        def push() -> None:
            if subscription.is_active:
                recoverable, positioned = subscription.recoverable, subscription.positioned
                renewed = messages.SubscribePush(recoverable, position.epoch, position.offset, positioned)
                self._push_subscribe(channel, options, renewed)

        # The push states a position, so the publications up to there leave first.
        if subscription.replay is None:
            self.services.hub.when_delivered(channel, push)
        else:
            position = subscription.replay.position
            push()

    def _push_subscribe(self, channel: str, options: SubscribeOptions, push: messages.SubscribePush) -> None:
        self._push(channel, "subscribe", msgspec.structs.replace(push, data=self.encoding.embed(options.data)))

    async def _subscribe(self, channel: str, options: SubscribeOptions, since: Position | None) -> None:
        limit = self.settings.client.channel_limit
        if 0 < limit <= len(self.subscriptions):
            self.disconnect(*errors.CHANNEL_LIMIT)
            return
        request = SubscribeRequest(channel)
        if since is not None:
            request = SubscribeRequest(channel, recover=True, offset=since.offset, epoch=since.epoch)
        channel_options = self.services.rules.options(channel)
        subscription = self.make_subscription(request, channel_options, options, SubscriptionSource.SERVER)
        joined = await self.join(subscription, request)
        if joined is None:
            return
        result = joined.result
        subscription.expire_at = self._expiry_of(options)
        granted = messages.SubscribePush(result.recoverable, result.epoch, result.offset, result.positioned)
        self._push_subscribe(channel, options, granted)
        self.push_publications(channel, result.publications or ())
        self.activate(subscription, joined)
        self.schedule_deadline()

    def unsubscribe(self, channel: str, code: int, reason: str) -> None:
        """End the client's subscription to `channel`, if any; with a code from 2500 on the client subscribes again."""
        if self.departure is not None and self.departure.put_off(
            UnsubscribeOrder(self.user, channel, self.client, code=code, reason=reason)
        ):
            return
        if self.subscribing:
            self.subscribing.discard(channel)
        subscription = self.subscriptions.get(channel)
        if subscription is None:
            return
        was_active = subscription.is_active
        self.remove_subscription(subscription, is_returning=was_active and code >= errors.LOST_POSITION[0])
        if was_active:  # otherwise its subscribe command gets an error reply
            self.services.client_log.refuse_by(code, "", "", self.describe, channel=repr(channel), reason=reason)
            self._push(channel, "unsubscribe", messages.UnsubscribePush(code, reason))

    def refresh(self, expire_at: float, info: bytes) -> None:
        """Let the connection expire at `expire_at` (Unix seconds, 0.0 for never), and tell the client.

        info: see `update_conn_info`; b"" leaves it.
        """
        if self.departure is not None and self.departure.put_off(
            RefreshOrder(self.user, expire_at, info=info, client=self.client)
        ):
            return
        try:
            ttl = self.ttl(expire_at)
        except ClientError:
            self.disconnect(*errors.CONNECTION_EXPIRED)
            return
        if info:
            self.update_conn_info(info)
        self.set_expiry(expire_at)
        self._push("", "refresh", messages.RefreshPush(bool(ttl), ttl))

    def disconnect(self, code: int, reason: str, *, kind: str = "", detail: str = "") -> None:
        """Close the connection with this code. The session has ended when this returns.

        kind, detail: of the cause, for the log; "" where the code tells it.
        """
        if self.state is not SessionState.CLOSED:
            self.services.client_log.refuse_by(code, kind, "", self.describe, reason=reason, detail=detail)
            self._end(code, reason)
            self._connection.close(code, reason)

    def drain(self) -> None:
        """Disconnect the client because the worker stops, after the answers to the commands that are under way.

        Queued commands, and those that would begin meanwhile, are refused: the client's next worker carries them out.
        """
        if self.running:
            self._commands, self.departure = _DRAINING, None
        else:
            self.disconnect(*errors.SHUTDOWN)

    def closed(self) -> None:
        """End the session: its connection is closed."""
        if self.state is not SessionState.CLOSED:
            if self.services.client_log.debug:
                self.services.client_log.went(self.describe, "its connection has ended")
            self._end(*errors.CONNECTION_CLOSED)

    def describe(self) -> dict[str, object]:
        """Return the facts about this client for the log."""
        return {
            "client": self.client,
            "user": repr(self.user) if self.user else "",
            "address": self.request.remote_address,
            "transport": self._connection.transport_name,
        }

    def _describe_command(self, name: str, request: Any) -> dict[str, object]:
        channel = getattr(request, "channel", "")
        subject = channel or getattr(request, "method", "")
        return {
            **self.describe(),
            "request": f"{name} {subject!r}" if subject else name,
            "channel": repr(channel),
        }

    def _end(self, code: int, reason: str) -> None:
        was_connected = self.state is CONNECTED
        self.state = SessionState.CLOSED
        self.services.deadlines.clear(self)
        if self.queue is not None:
            self.queue.clear()
            self.queue = None
        if was_connected:
            self.services.sessions.remove(self)
            self.services.engine.tell(RemoveClient(self.client))
            # A subscription that is still joining is undone by its own coroutine, which finds the session closed.
            for subscription in [each for each in self.subscriptions.values() if each.is_active]:
                self.remove_subscription(subscription)
            if self.services.handlers.disconnected is not None:
                self.run_in_background(self.services.handlers.disconnected(self.handle, code, reason))
        if self.handle is not None:
            release(self.handle)

    def run_in_background(self, work: Awaitable[Any]) -> None:
        """Start work, and ignore refusals and an engine that is away: this worker's own state has changed already."""
        self.background += 1
        self.services.run(_without_refusals(work), self._end_background)

    def _end_background(self, result: Any, error: BaseException | None) -> None:
        self.background -= 1
        if error is not None:
            self.services.report_error(error)
        self.settle()

    # -- hand-over ---------------------------------------------------------------------------------------------------

    @property
    def is_settled(self) -> bool:
        """Whether nothing is under way that a move to another worker would interrupt."""
        is_starting = self.queue is not None and self.queue.is_starting
        is_sending = self.replays is not None and self.replays.is_sending
        return not (self.running or self.background or is_starting or is_sending or self.state is SessionState.CLOSED)

    def settle(self) -> None:
        """Report a session that is about to move as ready, if nothing is under way any more."""
        departure = self.departure
        if departure is not None and not departure.is_ready and self.is_settled:
            departure.is_ready = True
            departure.ready()


# Carries out a command: (session, id, request). Returns the rest of its work, or None if there is none. The rest may be
# a publication, to be answered without a result when the engine has accepted it.
CommandFunction = Callable[[Session, int, Any], Coroutine[Any, Any, None] | Publish | None]


def _refuse_command(session: Session, id: int, request: Any) -> None:
    raise ClientError(*errors.INTERNAL_ERROR)


# The commands of a session that drains.
_DRAINING: Mapping[str, CommandFunction] = defaultdict(lambda: _refuse_command)


def detail_of(error: Exception) -> str:
    """Return the cause of a refusal in words, for the log; "" for none."""
    return str(error.__cause__) if isinstance(error.__cause__, RealtimeError) else ""


async def _without_refusals(work: Awaitable[Any]) -> None:
    with suppress(EngineUnavailable, ClientError, Disconnect):
        await work
