"""What each command of the client protocol does: a function or coroutine each, and the table of them.

What need not wait is done by a plain function, which may leave the rest to a coroutine that it returns.

A command either replies, or raises ClientError (an error reply), Disconnect (the connection is closed) or
EngineUnavailable (a temporary error). The order of the checks is the protocol's: the first that fails answers.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
from msgspec import Struct

from realtime import errors
from realtime.auth.tokens import Claims, TokenExpired, TokenInvalid
from realtime.errors import ClientError, Disconnect, EngineUnavailable
from realtime.protocol import messages
from realtime.protocol.channel_rules import ResolvedChannel
from realtime.protocol.client import encoded, terms
from realtime.protocol.session import CommandFunction, Session, SessionState
from realtime.protocol.subscription import JoinResult, Subscription, SubscriptionSource
from realtime.pubsub.engine import GetHistory, GetPresence, GetPresenceStats, Publish, SendOrder
from realtime.types import ClientInfo, ConnectRequest, Credentials, Position, SubscribeOptions

# The share of a client's queue that one page of history may fill.
HISTORY_SHARE = 0.5
# Subscriptions of one connect that join side by side: more would fill the engine's queue when all clients come back.
JOINS_AT_ONCE = 32

# -- connect, refresh -------------------------------------------------------------------------------------------------


class _Admitted(Struct, frozen=True):
    """Who a client is, and to which channels it is subscribed from the start. meta: see `Client.meta`.

    info, data: JSON text, or b"". expire_at: Unix seconds, 0.0 for never.
    """

    user: str = ""
    info: bytes = b""
    data: bytes = b""
    expire_at: float = 0.0
    subs: dict[str, SubscribeOptions] = {}
    origin: SubscriptionSource = SubscriptionSource.SERVER
    meta: bytes = b""


async def connect(session: Session, id: int, request: messages.ConnectRequest) -> None:
    admitted = await _admit(session, request)
    session.info = info = ClientInfo(admitted.user, str(uuid.uuid4()), admitted.info)
    wanted = _from_the_start(session, request, admitted)
    ttl = session.ttl(admitted.expire_at)
    if session.state is not SessionState.OPENED:
        return
    await session.admit(info)
    try:
        joined = await _joined(session, wanted)
        subs = {subscription.channel: _told(outcome.result, admitted, subscription) for subscription, outcome in joined}
        session.reply(id, "connect", _connected(session, admitted, ttl, subs))
    except BaseException:
        session.dismiss()
        raise
    if session.state is not SessionState.OPENED:
        session.dismiss()
        return
    session.begin(request.name, request.version, admitted.meta)
    session.expire(admitted.expire_at)
    for subscription, outcome in joined:
        session.open(subscription, outcome)
    personal = session.settings.client.subscribe_to_user_personal_channel
    if personal.single_connection and session.user and session.state is SessionState.CONNECTED:
        await _supersede(session)


async def _joined(
    session: Session, wanted: list[tuple[messages.SubscribeRequest, Subscription]]
) -> list[tuple[Subscription, JoinResult]]:
    """Have these join, some side by side, so that many cost few round trips to the engine; what each came to.

    Those that were ended meanwhile are left out. Raises as `Session.join`, when none is under way any more.
    """
    joined: list[tuple[Subscription, JoinResult]] = []
    for first in range(0, len(wanted), JOINS_AT_ONCE):
        if session.state is not SessionState.OPENED:
            break
        group = wanted[first : first + JOINS_AT_ONCE]
        outcomes = await session.services.gather([session.join(subscription, asked) for asked, subscription in group])
        joined += [
            (subscription, outcome) for (_, subscription), outcome in zip(group, outcomes, strict=True) if outcome
        ]
    return joined


def _told(
    result: messages.SubscribeResult, admitted: _Admitted, subscription: Subscription
) -> messages.SubscribeResult:
    """The result of a subscription from the start, with what its terms have for the client."""
    each = admitted.subs.get(subscription.channel)
    return msgspec.structs.replace(result, data=messages.embedded(each.data)) if each is not None else result


def _connected(
    session: Session, admitted: _Admitted, ttl: int, subs: dict[str, messages.SubscribeResult]
) -> messages.ConnectResult:
    settings = session.settings
    ping, pong = session.pings
    return messages.ConnectResult(
        client=session.client,
        version=settings.version,
        # Only a token can be refreshed by the client; what a handler granted ends when it ends.
        expires=bool(ttl and session.refreshable),
        ttl=ttl if session.refreshable else 0,
        data=messages.embedded(admitted.data),
        subs=subs or None,
        ping=ping,
        pong=pong,
        session=session.secret,
        node=settings.uid if session.secret and not session.encoding.unidirectional else "",
        time=int(session.services.wall_clock() * 1000) if settings.client.connect_include_server_time else 0,
    )


async def _admit(session: Session, request: messages.ConnectRequest) -> _Admitted:
    """Who the client is: by the application's handler, its token, the proxy before us, or nobody's word."""
    services, settings = session.services, session.settings.client
    if services.handlers.connecting is not None:
        credentials = await services.handlers.connecting(_asks_to_connect(session, request))
        if credentials is not None:
            return _credited(credentials)
    if request.token:
        claims = await _connection_claims(session, request.token)
        if not claims.user and settings.disallow_anonymous_connection_tokens:
            raise Disconnect(*errors.DENIED)
        session.refreshable = True
        return _Admitted(
            claims.user, claims.info, b"", claims.expire_at, _token_subs(claims), SubscriptionSource.TOKEN, claims.meta
        )
    header = settings.user_id_http_header.lower()
    if header and (user := session.request.headers.get(header)):
        return _Admitted(user)
    if not (settings.insecure or settings.allow_anonymous_connect_without_token):
        raise Disconnect(*errors.BAD_PROTOCOL)
    return _Admitted()


def _credited(credentials: Credentials) -> _Admitted:
    if isinstance(credentials.channels, str):
        raise TypeError("Credentials.channels is a list of channels, not a text")
    return _Admitted(
        credentials.user,
        encoded(credentials.info),
        encoded(credentials.data),
        credentials.expire_at or 0.0,
        {channel: SubscribeOptions() for channel in credentials.channels}
        | {channel: terms(grant) for channel, grant in credentials.subs.items()},
    )


async def _connection_claims(session: Session, token: str) -> Claims:
    claims = await _verified(session.services.tokens.connection, token, Disconnect(*errors.INVALID_TOKEN))
    # An insecure server checks tokens all the same, and then lets no connection expire.
    return msgspec.structs.replace(claims, expire_at=0.0) if session.settings.client.insecure else claims


def _token_subs(claims: Claims) -> dict[str, SubscribeOptions]:
    return {channel: SubscribeOptions() for channel in claims.channels} | {
        channel: SubscribeOptions(sub.info, sub.data, 0.0, sub.override) for channel, sub in claims.subs.items()
    }


def _from_the_start(
    session: Session, request: messages.ConnectRequest, admitted: _Admitted
) -> list[tuple[messages.SubscribeRequest, Subscription]]:
    """The subscriptions that come with the connect reply, and what the client says of where it left each.

    They are those of its credentials, its personal channel, and of those that it names itself the ones to which it
    could subscribe without a word from anybody. Raises ClientError 102, Disconnect 3501 and 3505.
    """
    services, settings = session.services, session.settings.client
    positions = request.subs or {}
    subs = {channel: (each, admitted.origin) for channel, each in admitted.subs.items()}
    personal = settings.subscribe_to_user_personal_channel
    if personal.enabled and session.user:
        channel = services.rules.personal_channel(personal.personal_channel_namespace, session.user)
        subs.setdefault(channel, (SubscribeOptions(), SubscriptionSource.SERVER))
    for channel in positions:
        if channel not in subs and _may_alone(session, channel):
            subs[channel] = (SubscribeOptions(), SubscriptionSource.SERVER)
    if 0 < settings.channel_limit < len(subs):
        raise Disconnect(*errors.CHANNEL_LIMIT)
    wanted = []
    for channel, (each, origin) in subs.items():
        asked = msgspec.structs.replace(positions.get(channel, messages.SubscribeRequest()), channel=channel)
        subscription = session.subscription(asked, services.rules.options(channel), each, origin)
        subscription.end_at = each.expire_at
        wanted.append((asked, subscription))
    return wanted


def _may_alone(session: Session, channel: str) -> bool:
    """Whether the options alone let the client subscribe. Raises Disconnect 3501 for an unknown namespace."""
    services = session.services
    try:
        options = services.rules.checked(channel)
    except ClientError as error:
        if error.code == errors.UNKNOWN_CHANNEL[0]:
            raise Disconnect(*errors.BAD_PROTOCOL) from None
        return False
    if not channel or services.rules.is_private(channel) or services.handlers.subscribing(channel) is not None:
        return False
    return services.rules.admits(channel, options, session.user) or session.settings.client.insecure


async def _supersede(session: Session) -> None:
    """End the older connections of the client's user, which may have one alone."""
    try:
        await session.services.engine.ask(SendOrder(session.services.sessions.supersede(session)))
    except EngineUnavailable:
        session.disconnect(*errors.SERVER_ERROR)  # it comes back, and tries again


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


async def refresh(session: Session, id: int, request: messages.RefreshRequest) -> None:
    if not request.token or not session.refreshable:
        raise Disconnect(*errors.BAD_PROTOCOL)
    try:
        claims = await _connection_claims(session, request.token)
    except ClientError:
        # Not error 109, which would be final: the client comes back and fetches a token on the way.
        raise Disconnect(*errors.CONNECTION_EXPIRED) from None
    if claims.user != session.user:
        raise Disconnect(*errors.INVALID_TOKEN)
    held = {one.channel for one in session.subscriptions.values() if one.origin is SubscriptionSource.TOKEN}
    if held != _token_subs(claims).keys():
        raise Disconnect(*errors.INSUFFICIENT_STATE)
    ttl = session.ttl(claims.expire_at)
    session.describe(claims.info)
    session.expire(claims.expire_at)
    session.reply(id, "refresh", messages.RefreshResult(expires=bool(ttl), ttl=ttl))


# -- subscribe, unsubscribe -------------------------------------------------------------------------------------------


def _options(session: Session, channel: str) -> ResolvedChannel:
    """The rules for a channel that the client named. Raises Disconnect 3501, ClientError 102 or 107."""
    if not channel:
        raise Disconnect(*errors.BAD_PROTOCOL)
    return session.services.rules.checked(channel)


async def subscribe(session: Session, id: int, request: messages.SubscribeRequest) -> None:
    options = _check_subscribe(session, request)
    granted, grace = await _admit_to(session, request, options)
    ttl = session.ttl(granted.expire_at)
    if session.state is SessionState.CLOSED:
        return
    _check_place(session, request.channel)  # again: much may have happened meanwhile
    subscription = session.subscription(request, options, granted, SubscriptionSource.CLIENT)
    joined = await session.join(subscription, request)
    if joined is None:
        raise ClientError(*errors.PERMISSION_DENIED)
    if ttl:
        subscription.end_at = granted.expire_at + grace
        session.arm()
    # As with connect: what a handler granted ends when it ends, and is asked for anew.
    refreshable = bool(ttl and request.token)
    result = msgspec.structs.replace(
        joined.result, expires=refreshable, ttl=ttl if refreshable else 0, data=messages.embedded(granted.data)
    )
    session.reply(id, "subscribe", result)
    session.open(subscription, joined)


def _check_subscribe(session: Session, request: messages.SubscribeRequest) -> ResolvedChannel:
    """The channel's rules, if nothing speaks against the request before it is asked who may subscribe."""
    if not request.channel or request.delta not in ("", "fossil"):
        raise Disconnect(*errors.BAD_PROTOCOL)
    _check_place(session, request.channel)
    options = _options(session, request.channel)
    if request.type:  # maps and shared polls, which no channel is
        raise ClientError(*errors.PERMISSION_DENIED)
    return options


def _check_place(session: Session, channel: str) -> None:
    limit = session.settings.client.channel_limit
    if channel in session.subscriptions:
        raise ClientError(*errors.ALREADY_SUBSCRIBED)
    if 0 < limit <= len(session.subscriptions):
        raise ClientError(*errors.LIMIT_EXCEEDED)


async def _admit_to(
    session: Session, request: messages.SubscribeRequest, options: ResolvedChannel
) -> tuple[SubscribeOptions, float]:
    """On what terms the client may subscribe: by a token, a user-limited name, the handler, or the options.

    Also the seconds for which the subscription outlives its expiry, in which the client may refresh it.
    """
    services, channel = session.services, request.channel
    if request.token:
        claims = await _subscription_claims(session, request.token, channel, ClientError(*errors.PERMISSION_DENIED))
        granted = SubscribeOptions(claims.info, claims.data, claims.expire_at, claims.override)
        return granted, session.settings.client.expired_sub_close_delay
    if services.rules.is_private(channel):
        raise ClientError(*errors.PERMISSION_DENIED)
    users = services.rules.limited_to(channel, options)
    if users is not None and session.user not in users and not session.settings.client.insecure:
        raise ClientError(*errors.PERMISSION_DENIED)
    handler = services.handlers.subscribing(channel)
    if handler is not None:
        grant = await handler(session.handle, channel, _value(session, request.data))
        return terms(grant) if grant else SubscribeOptions(), 0.0
    if not (session.settings.client.insecure or services.rules.admits(channel, options, session.user)):
        raise ClientError(*errors.PERMISSION_DENIED)
    return SubscribeOptions(), 0.0


async def _subscription_claims(session: Session, token: str, channel: str, invalid: Exception) -> Claims:
    claims = await _verified(session.services.tokens.subscription, token, invalid)
    if claims.channel != channel or claims.user != session.user or claims.client not in ("", session.client):
        raise Disconnect(*errors.INVALID_TOKEN)
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
        # A final 109 would end the subscription in the SDKs; a temporary one has them try again.
        raise ClientError(*errors.TOKEN_EXPIRED[:2], temporary=True) from None
    if session.subscriptions.get(request.channel) is not subscription:
        raise ClientError(*errors.PERMISSION_DENIED)  # it was ended meanwhile
    ttl = session.ttl(claims.expire_at)
    subscription.end_at = claims.expire_at + session.settings.client.expired_sub_close_delay if ttl else 0.0
    session.describe_in(subscription, msgspec.structs.replace(subscription.info, chan_info=claims.info))
    session.reply(id, "sub_refresh", messages.SubRefreshResult(expires=bool(ttl), ttl=ttl))
    session.arm()


def unsubscribe(session: Session, id: int, request: messages.UnsubscribeRequest) -> None:
    if not request.channel:
        raise Disconnect(*errors.BAD_PROTOCOL)
    subscription = session.subscriptions.get(request.channel)
    if subscription is not None:
        # What this client asks next goes the same way as its leave, and behind it.
        session.abandon(subscription)
    session.reply(id, "unsubscribe", messages.EMPTY)


# -- publish, presence, history ---------------------------------------------------------------------------------------


async def publish(session: Session, id: int, request: messages.PublishRequest) -> None:
    services, channel = session.services, request.channel
    options = _options(session, channel)
    data = session.encoding.payload(request.data)
    is_json = session.encoding.is_json(data)
    options.check_data(data, is_json)
    if request.type:
        raise ClientError(*errors.BAD_REQUEST)
    handler = services.handlers.publishing(channel)
    if handler is not None:
        replaced = await handler(session.handle, channel, session.encoding.value(data))
        if replaced is not None:
            data = session.encoding.made(replaced)
            is_json = session.encoding.is_json(data)
    elif not session.may("publish", channel, options):
        raise ClientError(*errors.PERMISSION_DENIED)
    subscription = session.subscriptions.get(channel)
    info = subscription.info if subscription is not None else session.info
    await services.engine.ask(
        Publish(
            channel,
            data,
            options.history_options,
            info,
            delta=options.delta_publish,
            binary=not (data and is_json),
        )
    )
    session.reply(id, "publish", messages.EMPTY)


def _check_presence(session: Session, channel: str) -> None:
    options = _options(session, channel)
    if not options.presence:
        raise ClientError(*errors.NOT_AVAILABLE)
    if not session.may("presence", channel, options):
        raise ClientError(*errors.PERMISSION_DENIED)


async def presence(session: Session, id: int, request: messages.PresenceRequest) -> None:
    _check_presence(session, request.channel)
    present = await session.services.engine.ask(GetPresence(request.channel))
    infos = await session.services.slices.map_sliced(messages.info, present.values())
    session.reply(id, "presence", messages.PresenceResult(dict(zip(present, infos, strict=True))))


async def presence_stats(session: Session, id: int, request: messages.PresenceStatsRequest) -> None:
    _check_presence(session, request.channel)
    clients, users = await session.services.engine.ask(GetPresenceStats(request.channel))
    session.reply(id, "presence_stats", messages.PresenceStatsResult(clients, users))


async def history(session: Session, id: int, request: messages.HistoryRequest) -> None:
    options = _options(session, request.channel)
    if not options.history_options.enabled:
        raise ClientError(*errors.NOT_AVAILABLE)
    if not session.may("history", request.channel, options):
        raise ClientError(*errors.PERMISSION_DENIED)
    since = Position(request.since.offset, request.since.epoch) if request.since else None
    # -1 asks for all, as far as the limit goes; what lies below means nothing.
    if request.limit < -1 or (request.reverse and since is not None and not since.offset):
        raise ClientError(*errors.BAD_REQUEST)
    most = session.settings.client.history_max_publication_limit or math.inf
    limit = most if request.limit < 0 else min(request.limit, most)
    query = GetHistory(
        request.channel,
        options.history_options,
        since,
        limit=-1 if limit == math.inf else int(limit),
        reverse=request.reverse,
        max_bytes=int(session.settings.client.queue_max_size * HISTORY_SHARE),
    )
    page = await session.services.engine.ask(query)
    if since is not None and since.epoch and since.epoch != page.position.epoch:
        raise ClientError(*errors.UNRECOVERABLE_POSITION)
    publications = await session.services.slices.map_sliced(session.encoding.pub, page.publications)
    result = messages.HistoryResult(publications, page.position.epoch, page.position.offset)
    session.reply(id, "history", result)


# -- the application's own --------------------------------------------------------------------------------------------


def rpc(session: Session, id: int, request: messages.RPCRequest) -> Coroutine[Any, Any, None] | None:
    handlers, ping = session.services.handlers, session.settings.rpc_ping
    procedure = handlers.procedure(request.method)
    if procedure is None:
        if ping.enabled and request.method == ping.method:
            session.reply(id, "rpc", messages.RPCResult())
            return None
        raise ClientError(*(errors.METHOD_NOT_FOUND if handlers.has_procedures else errors.NOT_AVAILABLE))
    data = _value(session, request.data)
    if not procedure.is_immediate:
        return _answer_later(session, id, procedure(session.handle, data))
    session.answer(id, procedure.call_now(session.handle, data))
    return None


async def _answer_later(session: Session, id: int, result: Awaitable[Any]) -> None:
    session.answer(id, await result)


def send(session: Session, id: int, request: messages.SendRequest) -> Coroutine[Any, Any, None] | None:
    handler = session.services.handlers.message
    if handler is None:
        raise Disconnect(*errors.UNAVAILABLE)
    data = _value(session, request.data)
    if not handler.is_immediate:
        return _heard(handler(session.handle, data))
    handler.call_now(session.handle, data)
    return None


async def _heard(handling: Awaitable[Any]) -> None:
    await handling


def _value(session: Session, raw: msgspec.Raw | msgspec.UnsetType) -> Any:
    encoding = session.encoding
    return encoding.value(encoding.payload(raw))


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
