"""A connected client, as handlers receive it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from realtime.errors import FORCE_DISCONNECT
from realtime.types import Grant


class Client(Protocol):
    """One connected client. Handlers may call its methods from the loop and from threads alike."""

    @property
    def id(self) -> str:
        """The id of this connection. A client that reconnects gets a new one."""

    @property
    def user(self) -> str:
        """The application's user id; "" for an anonymous connection."""

    @property
    def info(self) -> Any:
        """The public information from the credentials, shown to other clients; None if there is none."""

    @property
    def meta(self) -> Any:
        """The private information from the credentials or the connection token, never sent to a client; or None."""

    @property
    def state(self) -> dict[Any, Any]:
        """A dict of the application's own, empty at first, for as long as the connection lasts.

        All handlers of the client get the same dict, also those in threads; those in processes get no client. It moves
        with the connection to another worker (`realtime reload` and others) by `pickle`. A connection whose state
        can't be pickled does not move: its client is asked to reconnect (3001).
        """

    @property
    def name(self) -> str:
        """The name of the connecting SDK or application, as the client states it."""

    @property
    def version(self) -> str:
        """The version of that software, as the client states it."""

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the opening request, with names in lower case."""

    @property
    def remote_address(self) -> str:
        """The client's IP address; behind a trusted proxy, the address that the proxy forwards."""

    @property
    def channels(self) -> Iterable[str]:
        """The channels that the client is subscribed to now."""

    @property
    def under_pressure(self) -> bool:
        """Whether this worker is overloaded, so that a cheaper answer is welcome."""

    def send(self, data: Any) -> None:
        """Send the client a message outside any channel. data: any value that JSON can represent."""

    def subscribe(self, channel: str, grant: Grant | None = None) -> None:
        """Subscribe the client to `channel`, regardless of the channel's permissions, and notify it.

        A client that is subscribed already keeps its subscription. Raises ValueError for a `Grant` whose `override`
        has an unknown name.
        """

    def refresh(self, expire_at: int | None = None, info: Any = None) -> None:
        """Let the connection expire at `expire_at`, in Unix seconds; None for never, a past time for at once.

        info: replaces the public information from the credentials; None keeps it.
        """

    def unsubscribe(self, channel: str) -> None:
        """End the client's subscription to `channel`, if there is one."""

    def disconnect(self, code: int = FORCE_DISCONNECT[0], reason: str = FORCE_DISCONNECT[1]) -> None:
        """Close the connection. `realtime.Disconnect` describes the codes."""
