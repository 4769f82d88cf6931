"""A connected client, as the application's handlers see it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Protocol

import msgspec

from realtime.auth.tokens import OVERRIDABLE
from realtime.errors import FORCE_DISCONNECT, SERVER_UNSUBSCRIBE
from realtime.json_text import one_line, value, value_or_bytes
from realtime.protocol import client_state
from realtime.types import ClientInfo, Grant, Position, SubscribeOptions


class ClientSession(Protocol):
    """What a `ConnectedClient` needs of the session behind it."""

    info: ClientInfo

    def send(self, data: Any) -> None: ...

    def disconnect(self, code: int, reason: str) -> None: ...

    def subscribe(self, channel: str, options: SubscribeOptions, since: Position | None) -> None: ...

    def unsubscribe(self, channel: str, code: int, reason: str) -> None: ...

    def refresh(self, expire_at: float, info: bytes) -> None: ...

    def channels(self) -> list[str]: ...


class _EndedSession:
    """Takes the place of a session after its end, so that the session's memory is free."""

    __slots__ = ("info",)

    def __init__(self, info: ClientInfo) -> None:
        self.info = info

    def send(self, data: Any) -> None: ...

    def disconnect(self, code: int, reason: str) -> None: ...

    def subscribe(self, channel: str, options: SubscribeOptions, since: Position | None) -> None: ...

    def unsubscribe(self, channel: str, code: int, reason: str) -> None: ...

    def refresh(self, expire_at: float, info: bytes) -> None: ...

    def channels(self) -> list[str]:
        return []


class ConnectedClient:
    """A handler's view of a client. After the client has disconnected, its methods do nothing.

    name, version: of the client's software, as the client states them. headers: of the handshake, names in lower case.
    """

    __slots__ = ("_meta", "_session", "_state", "headers", "name", "remote_address", "version")

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
        self._state: dict[Any, Any] | None = None  # there may be many clients, and most have none
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
        """The client's `info` from its credentials, decoded; None if there is none, bytes if it is not JSON."""
        return value_or_bytes(self._session.info.conn_info)

    @property
    def meta(self) -> Any:
        """The `meta` claim of its connection token, which only the server sees, decoded; None if there is none."""
        return value(self._meta)

    @property
    def state(self) -> dict[Any, Any]:
        """A dict of the application's own, for this connection. It lives as long as the connection."""
        if self._state is None:
            self._state = {}
        return self._state

    @property
    def channels(self) -> list[str]:
        """The channels to which the client is subscribed now."""
        return self._session.channels()

    def send(self, data: Any) -> None:
        """Send a message to this client alone; the JavaScript SDK passes it to `client.on("message")`."""
        self._session.send(data)

    def disconnect(self, code: int = FORCE_DISCONNECT[0], reason: str = FORCE_DISCONNECT[1]) -> None:
        """Close the connection. See `realtime.Disconnect` for the codes."""
        self._session.disconnect(code, reason)

    def subscribe(self, channel: str, grant: Grant | None = None) -> None:
        """Subscribe the client to `channel`, regardless of the channel's permissions, and notify it.

        A client that is subscribed already gets the terms of this grant. Raises ValueError for an invalid grant.
        """
        self._session.subscribe(channel, subscribe_options(grant) if grant else SubscribeOptions(), None)

    def refresh(self, expire_at: int | None = None, info: Any = None) -> None:
        """Let the connection expire at `expire_at` (Unix seconds; None for never), at once if that time has passed.

        info: replaces the `info` of the credentials; None leaves it.
        """
        self._session.refresh(expire_at or 0.0, encode_content(info))

    def unsubscribe(self, channel: str) -> None:
        """End the client's subscription to `channel`, if there is one."""
        self._session.unsubscribe(channel, *SERVER_UNSUBSCRIBE)


# RFC 9562 section 4.1: two bits of this digit are fixed.
_VARIANT = dict(zip("0123456789abcdef", 4 * "89ab", strict=True))


def _client_ids() -> Iterator[str]:
    """Yield random UUIDs (RFC 9562 section 5.4). The system is asked for randomness once in 256 of them."""
    while True:
        block = os.urandom(256 * 16)
        for start in range(0, len(block), 16):
            text = block[start : start + 16].hex()
            yield f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{_VARIANT[text[16]]}{text[17:20]}-{text[20:]}"


new_client_id = _client_ids().__next__
"""Returns a random id for a new client."""


def lost_client(info: ClientInfo) -> ConnectedClient:
    """Return a client whose connection has ended with its worker. info: without its JSON texts."""
    return ConnectedClient(_EndedSession(info), "", "", {}, "")


def release(client: ConnectedClient) -> None:
    """Detach the client from its ended session.

    Client and session refer to each other: without the cycle, both are freed with their last reference.
    """
    client._session = _EndedSession(client._session.info)


def meta_of(client: ConnectedClient) -> bytes:
    """Return the `meta` claim as JSON text, b"" for none."""
    return client._meta


def state_of(client: ConnectedClient) -> bytes | None:
    """Return the application's state of the client as bytes, None for none. Raises client_state.StateError."""
    return client_state.dump(client._state) if client._state else None


def restore_state(client: ConnectedClient, data: bytes | None) -> None:
    """Give the client the state that `state_of` returned. Raises client_state.StateError."""
    if data is not None:
        client._state = client_state.load(data)


def encode_content(content: Any) -> bytes:
    """Encode a handler's value as JSON text; b"" for None. Raises as msgspec for a value that JSON can't hold."""
    return b"" if content is None else one_line(msgspec.json.encode(content))


def subscribe_options(grant: Grant) -> SubscribeOptions:
    """Convert a handler's grant.

    Raises as `encode_content`, ValueError for an unknown override, and msgspec.ValidationError, a ValueError, for a
    value of another type: the code behind this relies on the types.
    """
    if not grant.override.keys() <= set(OVERRIDABLE):
        raise ValueError(f"Grant.override: only these channel options can be overridden: {', '.join(OVERRIDABLE)}")
    return msgspec.convert(
        (encode_content(grant.info), encode_content(grant.data), grant.expire_at or 0.0, grant.override),
        SubscribeOptions,
    )
