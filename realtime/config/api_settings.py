"""The settings of the HTTP API, and of RPC methods that the server itself answers. See `realtime.config.settings`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from realtime.config.annotations import NonNegative, Positive, PositiveSeconds, Secret, URLPath, about


class HTTPAPISettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The HTTP API for other programs."""

    disabled: Annotated[bool, about("The server does not serve the HTTP API.")] = False
    insecure: Annotated[bool, about("Callers need no key. For development only.")] = False
    handler_prefix: Annotated[URLPath, about("Prefix of the paths of the HTTP API.")] = "/api"
    key: Annotated[
        Secret, about("Key that callers send in the X-API-Key header. Empty: the server refuses every call.")
    ] = ""
    max_body_size: Annotated[Positive, about("Maximum size of a request body, in bytes.")] = 1_048_576
    max_refused_body_size: Annotated[
        NonNegative,
        about(
            "Maximum size of the body of a call with a wrong key, in bytes. The server closes the connection of a"
            " longer one, and reads a shorter one, so that the connection stays open."
        ),
    ] = 65536
    body_timeout: Annotated[PositiveSeconds, about("Time limit for a request body to arrive completely.")] = 10.0
    max_batch_commands: Annotated[
        Positive,
        about(
            "Maximum number of commands in one batch or pipeline, of channels in one broadcast, and of clients in a"
            " whitelist. A publication may have half as many tags."
        ),
    ] = 50_000
    error_mode: Annotated[
        Literal["", "transport"],
        about("Form of errors. transport: an HTTP status. Empty: an error object in a response with status 200."),
    ] = ""

    def __repr__(self) -> str:
        """Return no values: the key must not get into logs."""
        return f"{type(self).__name__}(...)"


class RPCPingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """An RPC method that does nothing, by which clients measure the round-trip time."""

    enabled: Annotated[bool, about("The server answers this method.")] = False
    method: Annotated[str, Meta(min_length=1), about("Name of the method.")] = "ping"


class RPCSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """RPC methods of the server itself. The application's methods need no configuration."""

    ping: RPCPingSettings = field(default_factory=RPCPingSettings)
