"""The settings of the transports: WebSocket, streams, emulation."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from realtime.config.annotations import NonNegative, Positive, PositiveSeconds, Seconds, URLPath, about


class MessageSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options that both WebSocket transports have."""

    message_size_limit: Annotated[
        Positive, about("Maximum size of one command of a client, in bytes, also after decompression.")
    ] = 65536
    decompressed_message_size_limit: Annotated[
        NonNegative,
        about(
            "Maximum size of a client's compressed message after decompression, in bytes. 0: ten times"
            " message_size_limit."
        ),
    ] = 0
    max_fragments: Annotated[NonNegative, about("Maximum number of fragments of a message. 0: no limit.")] = 1024
    control_frames_per_second: Annotated[
        Positive,
        about(
            "Maximum number of pings and pongs of a client per second; two and a half times as many may come at once."
        ),
    ] = 20
    message_timeout: Annotated[Seconds, about("Time limit for all fragments of a message to arrive. 0: no limit.")] = (
        10.0
    )
    write_timeout: Annotated[Seconds, about("Time limit for a socket to accept written data. 0: no limit.")] = 1.0
    close_timeout: Annotated[
        PositiveSeconds,
        about("Time limit for a client's answer to a close frame before the server aborts the connection."),
    ] = 5.0
    compression: Annotated[bool, about("The server compresses messages to clients that offer permessage-deflate.")] = (
        False
    )
    compression_min_size: Annotated[
        NonNegative, about("Minimum size of a message that the server compresses, in bytes.")
    ] = 0
    compression_level: Annotated[
        int, Meta(ge=1, le=9), about("Compression level, from 1 (fastest) to 9 (smallest messages).")
    ] = 1


class WebSocketSettings(MessageSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The WebSocket transport."""

    disabled: Annotated[bool, about("The server does not serve this transport.")] = False
    handler_prefix: Annotated[URLPath, about("Path at which clients connect.")] = "/connection/websocket"
    # As many subscriptions as `client.channel_limit`, with tokens of `client.token.max_length`.
    batch_size_limit: Annotated[
        NonNegative,
        about(
            "Maximum size of a client's message of many commands, in bytes, as sent. Values below message_size_limit"
            " allow one command of that size."
        ),
    ] = 1_310_720


class UniWebSocketSettings(MessageSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The unidirectional WebSocket transport: after its connect command, a client only receives."""

    enabled: Annotated[bool, about("The server serves this transport.")] = False
    handler_prefix: Annotated[URLPath, about("Path at which clients connect.")] = "/connection/uni_websocket"


class StreamSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Options that all streaming transports have."""

    enabled: Annotated[bool, about("The server serves this transport.")] = False
    max_request_body_size: Annotated[Positive, about("Maximum size of a request body, in bytes.")] = 65536


class SSESettings(StreamSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Server-sent events, for clients without access to WebSockets. Clients send their commands through [emulation]."""

    handler_prefix: Annotated[URLPath, about("Path at which clients connect.")] = "/connection/sse"


class HTTPStreamSettings(StreamSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A streamed HTTP response, for the same clients. They send their commands through [emulation]."""

    handler_prefix: Annotated[URLPath, about("Path at which clients connect.")] = "/connection/http_stream"


class UniSSESettings(StreamSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Unidirectional server-sent events, for clients without an SDK. Clients only receive."""

    handler_prefix: Annotated[URLPath, about("Path at which clients connect.")] = "/connection/uni_sse"


class UniHTTPStreamSettings(StreamSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A unidirectional streamed HTTP response, for clients without an SDK. Clients only receive."""

    handler_prefix: Annotated[URLPath, about("Path at which clients connect.")] = "/connection/uni_http_stream"


class EmulationSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Requests with the commands of [sse] and [http_stream] clients. Served when either transport is enabled."""

    handler_prefix: Annotated[URLPath, about("Path to which clients post their commands.")] = "/emulation"
    max_request_body_size: Annotated[
        Positive,
        about(
            "Maximum size of a request body, which may hold many commands, in bytes. One command may have"
            " websocket.message_size_limit."
        ),
    ] = 1_310_720
    hold_time: Annotated[
        Seconds, about("Time for which commands that overtook earlier ones of the same client wait for these.")
    ] = 0.1
    max_held_bytes: Annotated[
        NonNegative,
        about("Maximum number of bytes of one client's commands that wait for earlier ones. Beyond it, none waits."),
    ] = 256 * 1024
    max_queued_bytes: Annotated[
        Positive,
        about(
            "Maximum number of bytes of commands that wait while their client's session is busy. Beyond it, the server"
            " closes the stream. A batch of max_request_body_size should fit."
        ),
    ] = 1_572_864


class InitSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """A short response with which a load balancer can set its cookie before a client connects."""

    enabled: Annotated[bool, about("The server serves this response.")] = False
    handler_prefix: Annotated[URLPath, about("Path of the response.")] = "/connection/init"
