"""The connect and refresh commands: the client's identity, and the subscriptions that come with the connect reply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress

import msgspec
from msgspec import Struct

from realtime import errors
from realtime.auth.tokens import Claims, TokenExpired, TokenInvalid
from realtime.errors import ClientError, Disconnect, EngineUnavailable, RealtimeError
from realtime.protocol import messages
from realtime.protocol.client import encode_content, new_client_id, subscribe_options
from realtime.protocol.session import Session, detail_of
from realtime.protocol.session_state import CONNECTED, OPENED
from realtime.protocol.subscription import JoinResult, ReplyRoom, Subscription, SubscriptionSource
from realtime.pubsub.engine import AddClient, AdmitClient, RemoveClient, SendOrder
from realtime.types import ClientInfo, ConnectRequest, Credentials, SubscribeOptions

# Subscriptions of one connect that join side by side: more would fill the engine's queue when all clients reconnect.
JOINS_AT_ONCE = 32


class _Identity(Struct, frozen=True):
    """An accepted client. meta: see `ConnectedClient.meta`.

    info, data: JSON text, or b"". expire_at: Unix seconds, 0.0 for never. subs: the channels to subscribe the client to
    at once. source: of these subscriptions.
    """

    user: str = ""
    info: bytes = b""
    data: bytes = b""
    expire_at: float = 0.0
    subs: dict[str, SubscribeOptions] = {}
    source: SubscriptionSource = SubscriptionSource.SERVER
    meta: bytes = b""


async def connect(session: Session, id: int, request: messages.ConnectRequest) -> None:
    identity = await _authenticate(session, request)
    session.info = ClientInfo(identity.user, new_client_id(), identity.info)
    sessions = session.services.sessions
    sessions.begin_connecting(session)
    try:
        await _enter(session, id, request, identity)
    finally:
        sessions.end_connecting(session)
    personal = session.settings.client.subscribe_to_user_personal_channel
    if personal.single_connection and session.user and session.state is CONNECTED:
        await _supersede(session)
    connected = session.services.handlers.connected
    if connected is not None and session.state is CONNECTED:
        with suppress(ClientError):  # it has its reply already
            await connected(session.handle)


async def _enter(session: Session, id: int, request: messages.ConnectRequest, identity: _Identity) -> None:
    """Admit the client, join its first subscriptions, and reply."""
    initial = _initial_subscriptions(session, request, identity)
    ttl = session.ttl(identity.expire_at)
    if session.state is not OPENED:
        return
    await _admit(session)
    try:
        joined = await _join_all(session, initial) if initial else []
        subs = {
            subscription.channel: _with_data(session, outcome.result, identity.subs.get(subscription.channel))
            for subscription, outcome in joined
        }
        session.reply(id, "connect", _connect_result(session, identity, ttl, subs))
    except BaseException:
        _cancel_admission(session)
        raise
    if session.state is not OPENED:
        _cancel_admission(session)
        return
    session.complete_connect(request.name, request.version, identity.meta)
    if identity.expire_at:
        session.set_expiry(identity.expire_at)
    for subscription, outcome in joined:
        session.activate(subscription, outcome)


async def _admit(session: Session) -> None:
    """Count the client as connected.

    The caller then calls `complete_connect`, or `_cancel_admission` in every other case. Raises Disconnect when the
    user has reached its limit of connections, and EngineUnavailable.
    """
    engine, limit = session.services.engine, session.settings.client.user_connection_limit
    if not (limit and session.user):
        engine.tell(AddClient(session.info))
    elif not await engine.ask(AdmitClient(session.info, limit)):
        raise Disconnect(*errors.USER_CONNECTIONS, kind="user_connections")


def _cancel_admission(session: Session) -> None:
    """Undo `_admit`, and end the subscriptions made since."""
    session.services.engine.tell(RemoveClient(session.client))
    for subscription in list(session.subscriptions.values()):
        session.remove_subscription(subscription)


async def refresh(session: Session, id: int, request: messages.RefreshRequest) -> None:
    if not request.token or not session.is_refreshable:
        raise Disconnect(*errors.BAD_PROTOCOL)
    try:
        claims = await _connection_claims(session, request.token)
    except ClientError:
        # Error 109 would be final. A client that is disconnected comes back, and fetches a new token first.
        raise Disconnect(*errors.CONNECTION_EXPIRED) from None
    if claims.user != session.user:
        raise Disconnect(*errors.INVALID_TOKEN) from TokenInvalid("it names another user than the client's first token")
    named = _token_subs(claims).keys()
    for channel in named:
        session.services.rules.options(channel)  # raises ClientError 102
    # The origin of a subscription does not matter, unless it is a former token that had a channel which this one lacks.
    from_token = {
        subscription.channel
        for subscription in session.subscriptions.values()
        if subscription.source is SubscriptionSource.TOKEN
    }
    if not from_token <= named <= session.subscriptions.keys():
        raise Disconnect(*errors.INSUFFICIENT_STATE)
    ttl = session.ttl(claims.expire_at)
    if claims.info:
        session.update_conn_info(claims.info)
    session.set_expiry(claims.expire_at)
    session.reply(id, "refresh", messages.RefreshResult(expires=bool(ttl), ttl=ttl))


async def verified_claims(verify: Callable[[str], Awaitable[Claims]], token: str, invalid: Exception) -> Claims:
    """Return the claims of `token`. Raises ClientError 109 for an expired token, `invalid` for any other failure."""
    try:
        return await verify(token)
    except TokenExpired:
        raise ClientError(*errors.TOKEN_EXPIRED) from None
    except TokenInvalid as error:
        raise invalid from error


# -- identity ---------------------------------------------------------------------------------------------------------


async def _authenticate(session: Session, request: messages.ConnectRequest) -> _Identity:
    """Determine the client's identity by the application's handler, its token, or the proxy; else it is anonymous."""
    handlers, settings = session.services.handlers, session.settings.client
    if handlers.connecting is not None:
        credentials = await handlers.connecting(_connect_request(session, request))
        if credentials is not None:
            return _from_credentials(credentials)
    if request.token:
        claims = await _connection_claims(session, request.token)
        if not claims.user and settings.disallow_anonymous_connection_tokens:
            raise Disconnect(*errors.DENIED, kind="no_user")
        session.is_refreshable = True
        return _Identity(
            claims.user, claims.info, b"", claims.expire_at, _token_subs(claims), SubscriptionSource.TOKEN, claims.meta
        )
    header = settings.user_id_http_header.lower()
    if header and (user := session.request.headers.get(header)):
        return _Identity(user)
    if not (settings.insecure or settings.allow_anonymous_connect_without_token):
        raise Disconnect(*errors.BAD_PROTOCOL, kind="no_token")
    return _Identity()


def _connect_request(session: Session, request: messages.ConnectRequest) -> ConnectRequest:
    return ConnectRequest(
        token=request.token,
        data=session.decode_request_data(request.data),
        headers=session.request.headers,
        query=session.request.query,
        remote_address=session.request.remote_address,
        name=request.name,
        version=request.version,
    )


def _from_credentials(credentials: Credentials) -> _Identity:
    if isinstance(credentials.channels, str):
        raise TypeError("Credentials.channels is a list of channels, not a text")
    return _Identity(
        credentials.user,
        encode_content(credentials.info),
        encode_content(credentials.data),
        credentials.expire_at or 0.0,
        {channel: SubscribeOptions() for channel in credentials.channels}
        | {channel: subscribe_options(grant) for channel, grant in credentials.subs.items()},
        meta=encode_content(credentials.meta),
    )


async def _connection_claims(session: Session, token: str) -> Claims:
    claims = await verified_claims(session.services.tokens.connection, token, Disconnect(*errors.INVALID_TOKEN))
    # An insecure server verifies tokens too, but no connection to it expires.
    return msgspec.structs.replace(claims, expire_at=0.0) if session.settings.client.insecure else claims


def _token_subs(claims: Claims) -> dict[str, SubscribeOptions]:
    return {channel: SubscribeOptions() for channel in claims.channels} | {
        channel: SubscribeOptions(sub.info, sub.data, 0.0, sub.override) for channel, sub in claims.subs.items()
    }


# -- initial subscriptions --------------------------------------------------------------------------------------------


def _initial_subscriptions(
    session: Session, request: messages.ConnectRequest, identity: _Identity
) -> list[tuple[messages.SubscribeRequest, Subscription]]:
    """Make the subscriptions of the connect reply, each with a request that holds the client's last position.

    They are the channels of the client's credentials, its personal channel, and those in its connect request to which
    the channel options alone let it subscribe. Raises ClientError 102, Disconnect 3501 and 3505.
    """
    rules, settings = session.services.rules, session.settings.client
    if not (identity.subs or request.subs or settings.subscribe_to_user_personal_channel.enabled):
        return []
    requested = request.subs or {}
    subs = {channel: (options, identity.source) for channel, options in identity.subs.items()}
    personal = settings.subscribe_to_user_personal_channel
    if personal.enabled and session.user:
        channel = rules.personal_channel(personal.personal_channel_namespace, session.user)
        if channel:
            subs.setdefault(channel, (SubscribeOptions(), SubscriptionSource.SERVER))
        else:
            session.services.client_log.refuse("personal_channel", session.describe)
    for channel in requested:
        if channel in subs:
            continue
        if _is_open_to(session, channel):
            subs[channel] = (SubscribeOptions(), SubscriptionSource.SERVER)
        else:
            session.services.client_log.refuse("connect_subs", session.describe, channel=repr(channel))
    if 0 < settings.channel_limit < len(subs):
        raise Disconnect(*errors.CHANNEL_LIMIT)
    initial = []
    for channel, (options, source) in subs.items():
        # The client can't refuse a subscription of the server, so its `flag` has no meaning here.
        requested_sub = requested.get(channel, messages.SubscribeRequest())
        sub_request = msgspec.structs.replace(requested_sub, channel=channel, flag=0)
        try:
            subscription = session.make_subscription(sub_request, rules.options(channel), options, source)
        except ClientError as error:
            # A bad filter is left out. An error would refuse the whole connection for good.
            session.services.client_log.refuse("filter", session.describe, detail=detail_of(error))
            sub_request = msgspec.structs.replace(sub_request, tf=None)
            subscription = session.make_subscription(sub_request, rules.options(channel), options, source)
        subscription.expire_at = options.expire_at
        initial.append((sub_request, subscription))
    return initial


def _is_open_to(session: Session, channel: str) -> bool:
    """Return whether the options alone let the client subscribe. Raises Disconnect 3501 for an unknown namespace."""
    services = session.services
    try:
        channel_options = services.rules.checked_options(channel)
    except ClientError as error:
        if error.code == errors.UNKNOWN_CHANNEL[0]:
            raise Disconnect(*errors.BAD_PROTOCOL) from RealtimeError(f"no namespace for {channel!r} of connect.subs")
        return False
    if not channel or services.rules.is_private(channel) or services.handlers.subscribing(channel) is not None:
        return False
    return services.rules.allows_subscribe(channel, channel_options, session.user) or session.settings.client.insecure


async def _join_all(
    session: Session, initial: list[tuple[messages.SubscribeRequest, Subscription]]
) -> list[tuple[Subscription, JoinResult]]:
    """Join groups of subscriptions side by side, so that many of them cost few round trips to the engine.

    Subscriptions that have ended by then are left out. Raises as `Session.join`, after the whole group has finished.
    """
    joined: list[tuple[Subscription, JoinResult]] = []
    room = ReplyRoom(session.settings.client.recovery_reply_size)
    for first in range(0, len(initial), JOINS_AT_ONCE):
        if session.state is not OPENED:
            break
        group = initial[first : first + JOINS_AT_ONCE]
        outcomes = await session.services.gather(
            [session.join(subscription, sub_request, room) for sub_request, subscription in group]
        )
        joined += [
            (subscription, outcome) for (_, subscription), outcome in zip(group, outcomes, strict=True) if outcome
        ]
    return joined


def _with_data(
    session: Session, result: messages.SubscribeResult, options: SubscribeOptions | None
) -> messages.SubscribeResult:
    """Add the `data` for the client, if its credentials name this channel."""
    if options is None:
        return result
    return msgspec.structs.replace(result, data=session.encoding.embed(options.data))


def _connect_result(
    session: Session, identity: _Identity, ttl: int, subs: dict[str, messages.SubscribeResult]
) -> messages.ConnectResult:
    settings = session.settings
    ping, pong = session.ping_parameters
    return messages.ConnectResult(
        client=session.client,
        version=settings.version,
        # The client can refresh a token only; other credentials expire without a warning.
        expires=bool(ttl and session.is_refreshable),
        ttl=ttl if session.is_refreshable else 0,
        data=session.encoding.embed(identity.data),
        subs=subs or None,
        ping=ping,
        pong=pong,
        session=session.secret,
        node=settings.uid if session.secret and not session.encoding.unidirectional else "",
        time=int(session.services.wall_clock() * 1000) if settings.client.connect_include_server_time else 0,
    )


async def _supersede(session: Session) -> None:
    """End the older connections of the client's user, which may have only one."""
    try:
        await session.services.engine.ask(SendOrder(session.services.sessions.supersede(session)))
    except EngineUnavailable:
        session.disconnect(*errors.SERVER_ERROR)  # the client reconnects, and the order is sent again
