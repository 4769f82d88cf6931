"""What each command of the client protocol does: one coroutine each, and the table of them.

A command either replies, or raises ClientError (an error reply), Disconnect (the connection is closed) or
EngineUnavailable (a temporary error). The order of the checks is the protocol's: the first that fails answers.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from realtime import errors
from realtime.errors import ClientError, Disconnect
from realtime.protocol import messages
from realtime.protocol.rules import ResolvedChannel
from realtime.protocol.session import CommandFunction, Session, State, quietly
from realtime.protocol.subscription import Subscription
from realtime.protocol.tokens import Claims, TokenExpired, TokenInvalid
from realtime.records import ClientInfo, ConnectRequest, Position

# -- connect, refresh -------------------------------------------------------------------------------------------------


async def connect(session: Session, id: int, request: messages.ConnectRequest) -> None:
    node, settings = session.node, session.node.settings
    admitted = await _admit(session, request)
    ttl = _ttl(session, admitted.expire_at)
    if session.state is not State.OPENED:
        return
    pinged = settings.ping_interval > 0
    result = messages.ConnectResult(
        client=str(uuid.uuid4()),
        version=node.version,
        # Only a token can be refreshed by the client; what a handler granted ends when it ends.
        expires=bool(ttl and session.refreshable),
        ttl=ttl if session.refreshable else 0,
        data=messages.embedded(admitted.data),
        ping=math.ceil(settings.ping_interval) if pinged else 0,
        pong=pinged and settings.pong_timeout > 0,
        session=session.secret,
        node=node.uid if session.secret and not session.encoding.unidirectional else "",
        time=int(node.wall_clock() * 1000) if settings.connect_include_server_time else 0,
    )
    session.begin(ClientInfo(admitted.user, result.client, admitted.info), request.name, request.version)
    session.expire(admitted.expire_at)
    session.reply(id, "connect", result)


async def _admit(session: Session, request: messages.ConnectRequest) -> Claims:
    """Who the client is: by the application's handler, else by its token, else as anonymous."""
    node, settings = session.node, session.node.settings
    if node.handlers.connecting is not None:
        credentials = await node.handlers.connecting(_asks_to_connect(session, request))
        if credentials is not None:
            return Claims(
                credentials.user, _json(credentials.info), _json(credentials.data), credentials.expire_at or 0.0
            )
    if request.token:
        claims = await _verified(node.tokens.connection, request.token, Disconnect(*errors.INVALID_TOKEN))
        if not claims.user and settings.disallow_anonymous_connection_tokens:
            raise Disconnect(*errors.DENIED)
        session.refreshable = True
        # An insecure server checks tokens all the same, and then lets no connection expire.
        return msgspec.structs.replace(claims, data=b"", expire_at=0.0 if settings.insecure else claims.expire_at)
    if not (settings.insecure or settings.allow_anonymous_connect_without_token):
        raise Disconnect(*errors.BAD_PROTOCOL)
    return Claims("")


def _asks_to_connect(session: Session, request: messages.ConnectRequest) -> ConnectRequest:
    return ConnectRequest(
        token=request.token,
        data=_value(session, request.data),
        headers=session.request.headers,
        query=session.request.query,
        remote_address=session.request.remote_address,
        name=request.name,
        version=request.version,
    )


async def _verified(verify: Callable[[str], Awaitable[Claims]], token: str, invalid: Exception) -> Claims:
    """The claims of `token`. Raises ClientError 109 for an expired one, `invalid` for any other that fails."""
    try:
        return await verify(token)
    except TokenExpired:
        raise ClientError(*errors.TOKEN_EXPIRED) from None
    except TokenInvalid:
        raise invalid from None


def _ttl(session: Session, expire_at: float) -> int:
    """Whole seconds until `expire_at`, 0 for never. Raises ClientError 110 when it has passed."""
    if not expire_at:
        return 0
    left = expire_at - session.node.wall_clock()
    if left <= 0:
        raise ClientError(*errors.EXPIRED)
    return math.ceil(left)


async def refresh(session: Session, id: int, request: messages.RefreshRequest) -> None:
    if not request.token or not session.refreshable:
        raise Disconnect(*errors.BAD_PROTOCOL)
    try:
        claims = await _verified(session.node.tokens.connection, request.token, Disconnect(*errors.INVALID_TOKEN))
    except ClientError:
        # Not error 109, which would be final: the client comes back and fetches a token on the way.
        raise Disconnect(*errors.CONNECTION_EXPIRED) from None
    if claims.user != session.user:
        raise Disconnect(*errors.INVALID_TOKEN)
    ttl = _ttl(session, claims.expire_at)
    session.describe(claims.info)
    session.expire(claims.expire_at)
    session.reply(id, "refresh", messages.RefreshResult(expires=bool(ttl), ttl=ttl))


# -- subscribe, unsubscribe -------------------------------------------------------------------------------------------


def _options(session: Session, channel: str) -> ResolvedChannel:
    """The rules for a channel that the client named. Raises Disconnect 3501, ClientError 102 or 107."""
    if not channel:
        raise Disconnect(*errors.BAD_PROTOCOL)
    return session.node.rules.checked(channel)


async def subscribe(session: Session, id: int, request: messages.SubscribeRequest) -> None:
    options = _check_subscribe(session, request)
    admitted = await _admit_to(session, request, options)
    ttl = _ttl(session, admitted.expire_at)
    if session.state is State.CLOSED:
        return
    subscription = session.subscription(request.channel, options, admitted.info)
    _grant(session, request, subscription)
    session.subscriptions[request.channel] = subscription
    try:
        limit = session.node.settings.recovery_max_publication_limit or -1
        result, position = await subscription.join(request, limit)
    except BaseException:
        session.abandon(subscription)
        raise
    if session.state is State.CLOSED:
        session.abandon(subscription)
        return
    subscription.expire_at = admitted.expire_at
    result = msgspec.structs.replace(result, expires=bool(ttl), ttl=ttl, data=messages.embedded(admitted.data))
    session.reply(id, "subscribe", result)
    if not subscription.open(position):
        session.lost_position(request.channel)
    if ttl:
        session.arm()


def _check_subscribe(session: Session, request: messages.SubscribeRequest) -> ResolvedChannel:
    """The channel's rules, if nothing speaks against the request before it is asked who may subscribe."""
    settings, channel = session.node.settings, request.channel
    if not channel or request.delta not in ("", "fossil"):
        raise Disconnect(*errors.BAD_PROTOCOL)
    if channel in session.subscriptions:
        raise ClientError(*errors.ALREADY_SUBSCRIBED)
    if settings.channel_limit and len(session.subscriptions) >= settings.channel_limit:
        raise ClientError(*errors.LIMIT_EXCEEDED)
    options = _options(session, channel)
    if request.type:
        raise ClientError(*errors.PERMISSION_DENIED)
    if request.tf is not None:
        raise ClientError(*errors.BAD_REQUEST)
    return options


async def _admit_to(session: Session, request: messages.SubscribeRequest, options: ResolvedChannel) -> Claims:
    """Whether the client may subscribe: by a token, a user-limited name, the handler, or the options."""
    node, channel = session.node, request.channel
    if request.token:
        return await _subscription_claims(session, request.token, channel, ClientError(*errors.PERMISSION_DENIED))
    if node.rules.is_private(channel):
        raise ClientError(*errors.PERMISSION_DENIED)
    users = node.rules.limited_to(channel, options)
    if users is not None and session.user not in users and not node.settings.insecure:
        raise ClientError(*errors.PERMISSION_DENIED)
    handler = node.handlers.subscribing(channel)
    if handler is not None:
        granted = await handler(session.handle, channel, _value(session, request.data))
        return Claims(session.user, _json(granted.info), _json(granted.data)) if granted else Claims(session.user)
    if users is None and not (node.settings.insecure or options.allows_subscribe(session.user)):
        raise ClientError(*errors.PERMISSION_DENIED)
    return Claims(session.user)


async def _subscription_claims(session: Session, token: str, channel: str, invalid: Exception) -> Claims:
    claims = await _verified(session.node.tokens.subscription, token, invalid)
    if claims.channel != channel or claims.user != session.user or claims.client not in ("", session.client):
        raise Disconnect(*errors.INVALID_TOKEN)
    return claims


def _grant(session: Session, request: messages.SubscribeRequest, subscription: Subscription) -> None:
    """What the namespace forces, and what the client asked for and may have."""
    options = subscription.options
    kept = options.retention.kept
    history = session.may("history", request.channel, options)
    subscription.recoverable = kept and (
        options.force_recovery or (request.recoverable and (options.allow_recovery or history))
    )
    subscription.positioned = kept and (
        subscription.recoverable
        or options.force_positioning
        or (request.positioned and (options.allow_positioning or history))
    )
    subscription.announced = options.join_leave and (
        options.force_push_join_leave or (request.join_leave and session.may("presence", request.channel, options))
    )


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
        # A final 109 would end the subscription in the SDKs; a temporary one has them try again.
        raise ClientError(*errors.TOKEN_EXPIRED[:2], temporary=True) from None
    ttl = _ttl(session, claims.expire_at)
    subscription.expire_at = claims.expire_at
    session.describe_in(subscription, msgspec.structs.replace(subscription.info, chan_info=claims.info))
    session.reply(id, "sub_refresh", messages.SubRefreshResult(expires=bool(ttl), ttl=ttl))
    session.arm()


async def unsubscribe(session: Session, id: int, request: messages.UnsubscribeRequest) -> None:
    if not request.channel:
        raise Disconnect(*errors.BAD_PROTOCOL)
    subscription = session.subscriptions.pop(request.channel, None)
    if subscription is not None:
        await quietly(subscription.leave())
    session.reply(id, "unsubscribe", messages.EMPTY)


# -- publish, presence, history ---------------------------------------------------------------------------------------


async def publish(session: Session, id: int, request: messages.PublishRequest) -> None:
    node, channel = session.node, request.channel
    options = _options(session, channel)
    data = session.encoding.payload(request.data)
    if not data or request.type:
        raise ClientError(*errors.BAD_REQUEST)
    handler = node.handlers.publishing(channel)
    if handler is not None:
        replaced = await handler(session.handle, channel, session.encoding.value(data))
        data = data if replaced is None else session.encoding.made(replaced)
    elif not session.may("publish", channel, options):
        raise ClientError(*errors.PERMISSION_DENIED)
    subscription = session.subscriptions.get(channel)
    info = subscription.info if subscription is not None else session.info
    await node.engine.publish(channel, data, retention=options.retention, info=info)
    session.reply(id, "publish", messages.EMPTY)


def _check_presence(session: Session, channel: str) -> None:
    options = _options(session, channel)
    if not options.presence:
        raise ClientError(*errors.NOT_AVAILABLE)
    if not session.may("presence", channel, options):
        raise ClientError(*errors.PERMISSION_DENIED)


async def presence(session: Session, id: int, request: messages.PresenceRequest) -> None:
    _check_presence(session, request.channel)
    present = await session.node.engine.presence(request.channel)
    clients = {client: messages.info(info) for client, info in present.items()}
    session.reply(id, "presence", messages.PresenceResult(clients))


async def presence_stats(session: Session, id: int, request: messages.PresenceStatsRequest) -> None:
    _check_presence(session, request.channel)
    clients, users = await session.node.engine.presence_stats(request.channel)
    session.reply(id, "presence_stats", messages.PresenceStatsResult(clients, users))


async def history(session: Session, id: int, request: messages.HistoryRequest) -> None:
    options = _options(session, request.channel)
    if not options.retention.kept:
        raise ClientError(*errors.NOT_AVAILABLE)
    if not session.may("history", request.channel, options):
        raise ClientError(*errors.PERMISSION_DENIED)
    since = Position(request.since.offset, request.since.epoch) if request.since else None
    # -1 asks for all, as far as the limit goes; what lies below means nothing.
    if request.limit < -1 or (request.reverse and since is not None and not since.offset):
        raise ClientError(*errors.BAD_REQUEST)
    most = session.node.settings.history_max_publication_limit or math.inf
    limit = most if request.limit < 0 else min(request.limit, most)
    page = await session.node.engine.history(
        request.channel,
        retention=options.retention,
        since=since,
        limit=-1 if limit == math.inf else int(limit),
        reverse=request.reverse,
    )
    if since is not None and since.epoch and since.epoch != page.position.epoch:
        raise ClientError(*errors.UNRECOVERABLE_POSITION)
    publications = [session.encoding.pub(one) for one in page.publications]
    result = messages.HistoryResult(publications, page.position.epoch, page.position.offset)
    session.reply(id, "history", result)


# -- the application's own --------------------------------------------------------------------------------------------


async def rpc(session: Session, id: int, request: messages.RPCRequest) -> None:
    handlers = session.node.handlers
    if not handlers.has_procedures:
        raise ClientError(*errors.NOT_AVAILABLE)
    procedure = handlers.procedure(request.method)
    if procedure is None:
        raise ClientError(*errors.METHOD_NOT_FOUND)
    result = await procedure(session.handle, _value(session, request.data))
    session.reply(id, "rpc", messages.RPCResult(messages.embedded(session.encoding.made(result) or b"null")))


async def send(session: Session, id: int, request: messages.SendRequest) -> None:
    handler = session.node.handlers.message
    if handler is None:
        raise Disconnect(*errors.UNAVAILABLE)
    await handler(session.handle, _value(session, request.data))


def _value(session: Session, raw: msgspec.Raw | msgspec.UnsetType) -> Any:
    return session.encoding.value(session.encoding.payload(raw))


def _json(content: Any) -> bytes:
    return b"" if content is None else messages.one_line(msgspec.json.encode(content))


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
