"""A connected client, as the application's handlers see it."""

from __future__ import annotations

from typing import Any, Protocol

from realtime.errors import FORCE_DISCONNECT, SERVER_UNSUBSCRIBE
from realtime.protocol.messages import value
from realtime.records import ClientInfo


class Session(Protocol):
    """What a `Client` needs of the session behind it."""

    info: ClientInfo

    def send(self, data: Any) -> None: ...

    def disconnect(self, code: int, reason: str) -> None: ...

    def end_subscription(self, channel: str, code: int, reason: str) -> None: ...

    def channels(self) -> list[str]: ...


class Client:
    """Valid until the client disconnects, and harmless after.

    name, version: what the client says of its software. headers: of the handshake, names in lower case.
    """

    __slots__ = ("_session", "headers", "name", "remote_address", "version")

    def __init__(self, session: Session, name: str, version: str, headers: dict[str, str], remote_address: str) -> None:
        self._session = session
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
    def channels(self) -> list[str]:
        """The channels to which it is subscribed now."""
        return self._session.channels()

    def send(self, data: Any) -> None:
        """A message to this client alone; the JavaScript SDK hands it to `client.on("message")`."""
        self._session.send(data)

    def disconnect(self, code: int = FORCE_DISCONNECT[0], reason: str = FORCE_DISCONNECT[1]) -> None:
        """Close the connection. See `realtime.Disconnect` for the codes."""
        self._session.disconnect(code, reason)

    def unsubscribe(self, channel: str) -> None:
        """End its subscription to `channel`, if it has one."""
        self._session.end_subscription(channel, *SERVER_UNSUBSCRIBE)
