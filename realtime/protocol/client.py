"""A connected client, as the application's handlers see it."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from realtime.auth.tokens import OVERRIDABLE
from realtime.errors import FORCE_DISCONNECT, SERVER_UNSUBSCRIBE
from realtime.json_text import one_line, value
from realtime.types import ClientInfo, Grant, Position, SubscribeOptions


class ClientSession(Protocol):
    """What a `ConnectedClient` needs of the session behind it."""

    info: ClientInfo

    def send(self, data: Any) -> None: ...

    def disconnect(self, code: int, reason: str) -> None: ...

    def subscribe(self, channel: str, terms: SubscribeOptions, since: Position | None) -> None: ...

    def end_subscription(self, channel: str, code: int, reason: str) -> None: ...

    def refresh(self, expire_at: float, info: bytes) -> None: ...

    def channels(self) -> list[str]: ...


class _Gone:
    """What is left of a session that has ended. Nothing of it leads back to the session, whose memory is free then."""

    __slots__ = ("info",)

    def __init__(self, info: ClientInfo) -> None:
        self.info = info

    def send(self, data: Any) -> None: ...

    def disconnect(self, code: int, reason: str) -> None: ...

    def subscribe(self, channel: str, terms: SubscribeOptions, since: Position | None) -> None: ...

    def end_subscription(self, channel: str, code: int, reason: str) -> None: ...

    def refresh(self, expire_at: float, info: bytes) -> None: ...

    def channels(self) -> list[str]:
        return []


class ConnectedClient:
    """Valid until the client disconnects, and harmless after.

    name, version: what the client says of its software. headers: of the handshake, names in lower case.
    """

    __slots__ = ("_meta", "_session", "headers", "name", "remote_address", "version")

    def __init__(
        self,
        session: ClientSession,
        name: str,
        version: str,
        headers: dict[str, str],
        remote_address: str,
        meta: bytes = b"",
    ) -> None:
        """meta: JSON text, see the property; b"" for none."""
        self._session = session
        self._meta = meta
        self.name = name
        self.version = version
        self.headers = headers
        self.remote_address = remote_address

    @property
    def id(self) -> str:
        """The id of this connection."""
        return self._session.info.client

    @property
    def user(self) -> str:
        """The application's user id; "" for an anonymous client."""
        return self._session.info.user

    @property
    def info(self) -> Any:
        """What the credentials said of the client, decoded; None for nothing."""
        return value(self._session.info.conn_info)

    @property
    def meta(self) -> Any:
        """What its connection token says for the server's eyes only (`meta`), decoded; None for nothing."""
        return value(self._meta)

    @property
    def channels(self) -> list[str]:
        """The channels to which it is subscribed now."""
        return self._session.channels()

    def send(self, data: Any) -> None:
        """A message to this client alone; the JavaScript SDK hands it to `client.on("message")`."""
        self._session.send(data)

    def disconnect(self, code: int = FORCE_DISCONNECT[0], reason: str = FORCE_DISCONNECT[1]) -> None:
        """Close the connection. See `realtime.Disconnect` for the codes."""
        self._session.disconnect(code, reason)

    def subscribe(self, channel: str, grant: Grant | None = None) -> None:
        """Begin a subscription from the server's side, whatever the channel's options permit; the client is told.

        Nothing happens if it is subscribed already. Raises ValueError for what a Grant can't say.
        """
        self._session.subscribe(channel, terms(grant) if grant else SubscribeOptions(), None)

    def refresh(self, expire_at: int | None = None, info: Any = None) -> None:
        """Have the connection expire at `expire_at` (Unix seconds; None for never), at once if that has passed.

        info: takes the place of what the credentials said of the client; None leaves it.
        """
        self._session.refresh(expire_at or 0.0, encoded(info))

    def unsubscribe(self, channel: str) -> None:
        """End its subscription to `channel`, if it has one."""
        self._session.end_subscription(channel, *SERVER_UNSUBSCRIBE)


def release(client: ConnectedClient) -> None:
    """The client's session has ended: without the cycle that they make, both are freed with their last reference."""
    client._session = _Gone(client._session.info)


def encoded(content: Any) -> bytes:
    """What a handler gave, as JSON text; b"" for None. Raises what msgspec raises for what JSON can't carry."""
    return b"" if content is None else one_line(msgspec.json.encode(content))


def terms(grant: Grant) -> SubscribeOptions:
    """A handler's answer as the terms of a subscription. Raises as `encoded`; ValueError for an unknown override.

    Also msgspec.ValidationError, a ValueError, for a value of another type: everything behind this counts on them.
    """
    if not grant.override.keys() <= set(OVERRIDABLE):
        raise ValueError(f"of a channel's options, only {', '.join(OVERRIDABLE)} can be overridden")
    return msgspec.convert(
        (encoded(grant.info), encoded(grant.data), grant.expire_at or 0.0, grant.override), SubscribeOptions
    )
