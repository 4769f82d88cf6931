"""The commands of the client protocol: one function or coroutine for each, and their table COMMANDS.

A command that need not wait is a plain function. It may return a coroutine with the rest of its work. Connect and
refresh are in `realtime.protocol.connect`.

A command either replies, or raises ClientError (an error reply), Disconnect (the connection is closed) or
EngineUnavailable (a temporary error). The protocol sets the order of the checks: the first failing check answers.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec

from realtime import errors
from realtime.auth.tokens import Claims, TokenInvalid
from realtime.errors import ClientError, Disconnect
from realtime.protocol import messages
from realtime.protocol.channel_rules import ResolvedChannel
from realtime.protocol.client import subscribe_options
from realtime.protocol.connect import connect, refresh, verified_claims
from realtime.protocol.session import CommandFunction, Session
from realtime.protocol.session_state import SessionState
from realtime.protocol.subscription import SubscriptionSource
from realtime.pubsub.engine import PRESENCE_PAGE, GetHistory, GetPresence, GetPresenceStats, Publish, new_listing
from realtime.pubsub.time_slices import YIELD_EVERY, TimeSlicer
from realtime.types import ClientInfo, Position, SubscribeOptions

# Times that a presence reply is begun, if joins and leaves are lost while it is made.
PRESENCE_ATTEMPTS = 3
# The share of a client's outbox that one page of history may fill.
HISTORY_SHARE = 0.5

# -- subscribe, unsubscribe -------------------------------------------------------------------------------------------


def _checked_options(session: Session, channel: str) -> ResolvedChannel:
    """Return the options of a channel that the client named. Raises Disconnect 3501, ClientError 102 or 107."""
    if not channel:
        raise Disconnect(*errors.BAD_PROTOCOL)
    return session.services.rules.checked_options(channel)


async def subscribe(session: Session, id: int, request: messages.SubscribeRequest) -> None:
    channel_options = _check_subscribe(session, request)
    channel, subscribing = request.channel, session.subscribing or set()
    session.subscribing = subscribing
    subscribing.add(channel)
    try:
        options, grace = await _authorize_subscribe(session, request, channel_options)
        if channel not in subscribing:
            raise ClientError(*errors.PERMISSION_DENIED, kind="unsubscribed")
    finally:
        subscribing.discard(channel)
        session.subscribing = session.subscribing or ()
    ttl = session.ttl(options.expire_at)
    if session.state is SessionState.CLOSED:
        return
    _check_room(session, request.channel)  # again: the session may have other subscriptions now
    subscription = session.make_subscription(request, channel_options, options, SubscriptionSource.CLIENT)
    joined = await session.join(subscription, request)
    if joined is None:
        raise ClientError(*errors.PERMISSION_DENIED, kind="unsubscribed")
    if ttl:
        subscription.expire_at = options.expire_at + grace
        session.schedule_deadline()
    # As with connect: the grant of a handler expires without a warning, and the client subscribes again.
    refreshable = bool(ttl and request.token)
    result = msgspec.structs.replace(
        joined.result, expires=refreshable, ttl=ttl if refreshable else 0, data=session.encoding.embed(options.data)
    )
    session.reply(id, "subscribe", result)
    session.activate(subscription, joined)


def _check_subscribe(session: Session, request: messages.SubscribeRequest) -> ResolvedChannel:
    """Return the channel's options. Raises for a request that fails with any permissions."""
    if not request.channel or request.delta not in ("", "fossil"):
        raise Disconnect(*errors.BAD_PROTOCOL)
    _check_room(session, request.channel)
    channel_options = _checked_options(session, request.channel)
    if request.type:  # maps and shared polls, which this server does not have
        raise ClientError(*errors.NOT_AVAILABLE)
    return channel_options


def _check_room(session: Session, channel: str) -> None:
    limit = session.settings.client.channel_limit
    if channel in session.subscriptions:
        raise ClientError(*errors.ALREADY_SUBSCRIBED)
    if 0 < limit <= len(session.subscriptions):
        raise ClientError(*errors.LIMIT_EXCEEDED, kind="channel_limit")


async def _authorize_subscribe(
    session: Session, request: messages.SubscribeRequest, channel_options: ResolvedChannel
) -> tuple[SubscribeOptions, float]:
    """Check that the client may subscribe: by a token, a user-limited name, the handler, or the channel's options.

    Returns the options of the subscription, and its grace after expiry in seconds, in which the client may refresh it.
    """
    services, channel = session.services, request.channel
    if request.token:
        invalid = ClientError(*errors.PERMISSION_DENIED, kind="subscription_token")
        claims = await _subscription_claims(session, request.token, channel, invalid)
        options = SubscribeOptions(claims.info, claims.data, claims.expire_at, claims.override)
        return options, session.settings.client.expired_sub_close_delay
    if services.rules.is_private(channel):
        raise ClientError(*errors.PERMISSION_DENIED, kind="private_channel")
    users = services.rules.allowed_users(channel, channel_options)
    if users is not None and session.user not in users and not session.settings.client.insecure:
        raise ClientError(*errors.PERMISSION_DENIED, kind="user_channel")
    handler = services.handlers.subscribing(channel)
    if handler is not None:
        grant = await handler(session.handle, channel, session.decode_request_data(request.data))
        return subscribe_options(grant) if grant else SubscribeOptions(), 0.0
    if not (
        session.settings.client.insecure or services.rules.allows_subscribe(channel, channel_options, session.user)
    ):
        raise ClientError(*errors.PERMISSION_DENIED)
    return SubscribeOptions(), 0.0


async def _subscription_claims(session: Session, token: str, channel: str, invalid: Exception) -> Claims:
    claims = await verified_claims(session.services.tokens.subscription, token, invalid)
    if claims.channel != channel or claims.user != session.user or claims.client not in ("", session.client):
        other = TokenInvalid("a subscription token names another channel, user or client")
        raise Disconnect(*errors.INVALID_TOKEN) from other
    return claims


async def sub_refresh(session: Session, id: int, request: messages.SubRefreshRequest) -> None:
    if not request.channel:
        raise Disconnect(*errors.BAD_PROTOCOL)
    subscription = session.subscriptions.get(request.channel)
    if subscription is None:
        raise ClientError(*errors.PERMISSION_DENIED)
    if not request.token:
        raise ClientError(*errors.BAD_REQUEST)
    try:
        claims = await _subscription_claims(session, request.token, request.channel, Disconnect(*errors.INVALID_TOKEN))
    except ClientError:
        # A final error 109 would end the subscription in the SDKs; after a temporary one they try again.
        raise ClientError(*errors.TOKEN_EXPIRED[:2], temporary=True) from None
    if session.subscriptions.get(request.channel) is not subscription:
        raise ClientError(*errors.PERMISSION_DENIED, kind="unsubscribed")
    ttl = session.ttl(claims.expire_at)
    subscription.expire_at = claims.expire_at + session.settings.client.expired_sub_close_delay if ttl else 0.0
    session.update_info(subscription, msgspec.structs.replace(subscription.info, chan_info=claims.info))
    session.reply(id, "sub_refresh", messages.SubRefreshResult(expires=bool(ttl), ttl=ttl))
    session.schedule_deadline()


def unsubscribe(session: Session, id: int, request: messages.UnsubscribeRequest) -> None:
    if not request.channel:
        raise Disconnect(*errors.BAD_PROTOCOL)
    subscription = session.subscriptions.get(request.channel)
    if subscription is not None:
        # No need to wait for the leave: later requests of this client reach the engine behind it.
        session.remove_subscription(subscription)
    session.reply(id, "unsubscribe", messages.EMPTY)


# -- publish, presence, history ---------------------------------------------------------------------------------------


def publish(session: Session, id: int, request: messages.PublishRequest) -> Publish | Coroutine[Any, Any, None]:
    channel, encoding = request.channel, session.encoding
    channel_options = _checked_options(session, channel)
    data = encoding.validate_data(request.data)
    is_json = encoding.is_json(data)
    channel_options.check_client_data(data, is_json)
    if request.type:
        raise ClientError(*errors.BAD_REQUEST)
    handler = session.services.handlers.publishing(channel)
    if handler is not None:
        decision = handler(session.handle, channel, encoding.decode_data(data))
        return _publish_if_allowed(session, id, channel, channel_options, data, decision)
    if not session.is_allowed("publish", channel, channel_options):
        raise ClientError(*errors.PERMISSION_DENIED)
    return _publication(session, channel, channel_options, data, is_json)


async def _publish_if_allowed(
    session: Session, id: int, channel: str, channel_options: ResolvedChannel, data: bytes, decision: Awaitable[Any]
) -> None:
    """Publish after the handler's decision, with its data if it returns any."""
    replacement = await decision
    if replacement is not None:
        data = session.encoding.encode_data(replacement)
    publication = _publication(session, channel, channel_options, data, session.encoding.is_json(data))
    await session.services.engine.ask(publication)
    session.reply(id, "publish", messages.EMPTY)


def _publication(
    session: Session, channel: str, channel_options: ResolvedChannel, data: bytes, is_json: bool
) -> Publish:
    subscription = session.subscriptions.get(channel)
    info = session.info if subscription is None else subscription.info
    return Publish(
        channel, data, channel_options.history_options, info, delta=channel_options.delta_publish, binary=not is_json
    )


def _check_presence(session: Session, channel: str) -> None:
    channel_options = _checked_options(session, channel)
    if not channel_options.presence:
        raise ClientError(*errors.NOT_AVAILABLE)
    if not session.is_allowed("presence", channel, channel_options):
        raise ClientError(*errors.PERMISSION_DENIED)


async def presence(session: Session, id: int, request: messages.PresenceRequest) -> None:
    _check_presence(session, request.channel)
    for _ in range(PRESENCE_ATTEMPTS):
        members = await _members(session, request.channel)
        if members is not None:
            session.reply_to_presence(id, members.values())
            return
    raise ClientError(*errors.INTERNAL_ERROR)


async def _members(session: Session, channel: str) -> dict[str, bytes] | None:
    """Return the encoded entries of a presence reply that is sent at once; None if joins or leaves were lost."""
    engine, slices, listing = session.services.engine, session.services.slices, new_listing()
    encode = session.encoding.encode_member
    members: dict[str, bytes] = {}
    page = await engine.ask(GetPresence(channel, listing))
    with session.services.hub.record_presence(channel) as record:
        while True:
            members.update(zip(page, await slices.map_sliced(encode, page.values()), strict=True))
            if len(page) < PRESENCE_PAGE:
                break
            page = await engine.ask(GetPresence(channel, listing))
        # The pushes of joins and leaves since the first page have overtaken the reply.
        while len(changes := record.take()) >= YIELD_EVERY:
            await _apply_changes(members, changes, encode, slices)
        for client, info in changes.items():
            members.pop(client, None)
            if info is not None:
                members[client] = encode(info)
    return members if record.is_complete or channel not in session.subscriptions else None


async def _apply_changes(
    members: dict[str, bytes],
    changes: dict[str, ClientInfo | None],
    encode: Callable[[ClientInfo], bytes],
    slices: TimeSlicer,
) -> None:
    for client in changes:
        members.pop(client, None)
    joined = {client: info for client, info in changes.items() if info is not None}
    members.update(zip(joined, await slices.map_sliced(encode, joined.values()), strict=True))


async def presence_stats(session: Session, id: int, request: messages.PresenceStatsRequest) -> None:
    _check_presence(session, request.channel)
    clients, users = await session.services.engine.ask(GetPresenceStats(request.channel))
    session.reply(id, "presence_stats", messages.PresenceStatsResult(clients, users))


async def history(session: Session, id: int, request: messages.HistoryRequest) -> None:
    channel_options = _checked_options(session, request.channel)
    if not channel_options.history_options.enabled:
        raise ClientError(*errors.NOT_AVAILABLE)
    if not session.is_allowed("history", request.channel, channel_options):
        raise ClientError(*errors.PERMISSION_DENIED)
    since = Position(request.since.offset, request.since.epoch) if request.since else None
    if request.reverse and since is not None and not since.offset:
        raise ClientError(*errors.BAD_REQUEST)
    maximum = session.settings.client.history_max_publication_limit or math.inf
    # A negative limit asks for all publications, up to the server's limit.
    limit = maximum if request.limit < 0 else min(request.limit, maximum)
    query = GetHistory(
        request.channel,
        channel_options.history_options,
        since,
        limit=-1 if limit == math.inf else int(limit),
        reverse=request.reverse,
        max_bytes=int(session.settings.client.queue_max_size * HISTORY_SHARE),
    )
    page = await session.services.engine.ask(query)
    if since is not None and since.epoch and since.epoch != page.position.epoch:
        raise ClientError(*errors.UNRECOVERABLE_POSITION)
    try:
        publications = await session.services.slices.map_sliced(session.encoding.make_pub, page.publications)
    except Disconnect:
        # The client's encoding can't carry one of them.
        raise ClientError(*errors.NOT_AVAILABLE, kind="encoding") from None
    result = messages.HistoryResult(publications, page.position.epoch, page.position.offset)
    session.reply(id, "history", result)


# -- procedures and messages ------------------------------------------------------------------------------------------


def rpc(session: Session, id: int, request: messages.RPCRequest) -> Coroutine[Any, Any, None] | None:
    handlers = session.services.handlers
    procedure = handlers.procedure(request.method)
    if procedure is None:
        ping = session.settings.rpc_ping
        if ping.enabled and request.method == ping.method:
            session.reply(id, "rpc", messages.RPCResult())
            return None
        exists = handlers.has_procedures or ping.enabled
        raise ClientError(*(errors.METHOD_NOT_FOUND if exists else errors.NOT_AVAILABLE))
    encoding = session.encoding
    data = encoding.decode_data(encoding.validate_data(request.data))
    if not procedure.is_immediate:
        return _reply_later(session, id, procedure(session.handle, data))
    session.reply_to_rpc(id, procedure.call_now(session.handle, data))
    return None


async def _reply_later(session: Session, id: int, result: Awaitable[Any]) -> None:
    session.reply_to_rpc(id, await result)


def send(session: Session, id: int, request: messages.SendRequest) -> Coroutine[Any, Any, None] | None:
    handler = session.services.handlers.message
    if handler is None:
        raise Disconnect(*errors.UNAVAILABLE)
    data = session.decode_request_data(request.data)
    if not handler.is_immediate:
        return _await(handler(session.handle, data))
    handler.call_now(session.handle, data)
    return None


async def _await(result: Awaitable[Any]) -> None:
    await result


COMMANDS: dict[str, CommandFunction] = {
    "connect": connect,
    "refresh": refresh,
    "subscribe": subscribe,
    "sub_refresh": sub_refresh,
    "unsubscribe": unsubscribe,
    "publish": publish,
    "presence": presence,
    "presence_stats": presence_stats,
    "history": history,
    "rpc": rpc,
    "send": send,
}
