"""The settings tree: one frozen Struct for each table of the configuration, `Settings` at the root.

Key names are those of a Centrifugo v6 file wherever the concept is the same. Durations are seconds (float) and sizes
are bytes (int). Other classes receive the branch of the tree that they need, never the whole, and never change it.

A setting is one field: its annotation has the type, the limits and the help text, which generated files contain too.
Checks of values are in `realtime.config.checks`, rules between several settings in `realtime.config.rules`, warnings
about risky values in `realtime.config.warnings`, the tables below [channel] in `realtime.config.channel_settings`,
those of the APIs in `realtime.config.api_settings`, of workers and loops in `realtime.config.process_settings`, and of
the transports in `realtime.config.transport_settings`. `realtime.config.sources` reads a tree.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct, field

from realtime.config import checks
from realtime.config.annotations import (
    NonNegative,
    Port,
    Positive,
    PositiveSeconds,
    Seconds,
    Secret,
    about,
    restricted,
)

# `as` re-exports a name, so that every Struct of the tree can be imported from this module.
from realtime.config.api_settings import HTTPAPISettings as HTTPAPISettings
from realtime.config.api_settings import RPCPingSettings as RPCPingSettings
from realtime.config.api_settings import RPCSettings as RPCSettings
from realtime.config.channel_settings import ChannelOptions as ChannelOptions
from realtime.config.channel_settings import ChannelSettings as ChannelSettings
from realtime.config.channel_settings import Namespace as Namespace
from realtime.config.process_settings import LoopSettings as LoopSettings
from realtime.config.process_settings import WorkersSettings as WorkersSettings
from realtime.config.redis_settings import RedisSettings as RedisSettings
from realtime.config.redis_settings import RedisTLSSettings as RedisTLSSettings
from realtime.config.transport_settings import EmulationSettings as EmulationSettings
from realtime.config.transport_settings import HTTPStreamSettings as HTTPStreamSettings
from realtime.config.transport_settings import InitSettings as InitSettings
from realtime.config.transport_settings import MessageSettings as MessageSettings
from realtime.config.transport_settings import SSESettings as SSESettings
from realtime.config.transport_settings import StreamSettings as StreamSettings
from realtime.config.transport_settings import UniHTTPStreamSettings as UniHTTPStreamSettings
from realtime.config.transport_settings import UniSSESettings as UniSSESettings
from realtime.config.transport_settings import UniWebSocketSettings as UniWebSocketSettings
from realtime.config.transport_settings import WebSocketSettings as WebSocketSettings


class HTTPServerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The two listeners: a public port for clients, and an internal port for operators."""

    address: Annotated[
        str,
        restricted('an IP address, or "" for all interfaces', checks.is_address_or_empty),
        about("IP address for clients. Empty: all interfaces."),
    ] = ""
    port: Annotated[Port, about("TCP port for clients. 0: the system chooses a free port.")] = 8000
    internal_address: Annotated[
        str,
        restricted(
            'a loopback address such as "127.0.0.1" (this port has no password yet)', checks.is_loopback_address
        ),
        about("IP address for operators (health, readiness, metrics). It must be a loopback address."),
    ] = "127.0.0.1"
    internal_port: Annotated[Port, about("TCP port for operators. 0: the system chooses a free port.")] = 8001
    max_header_bytes: Annotated[int, Meta(ge=1024), about("Maximum size of a request head, in bytes.")] = 16384
    max_headers: Annotated[Positive, about("Maximum number of header lines in a request.")] = 100
    max_query_parameters: Annotated[
        int, Meta(ge=100), about("Maximum number of parameters in the query of a request's target.")
    ] = 100
    header_timeout: Annotated[PositiveSeconds, about("Time limit for a request head to arrive completely.")] = 5.0
    keepalive_timeout: Annotated[
        PositiveSeconds,
        about(
            "Time that a connection may stay open between two HTTP requests. Keep it longer than the timeout of a proxy"
            " or load balancer in front of the server, often 60 s; otherwise the proxy reports errors (502)."
        ),
    ] = 75.0
    max_queued_body_bytes: Annotated[
        Positive,
        about(
            "Maximum number of bytes of incomplete request bodies in one worker. Beyond it, a request whose body is"
            " longer than 64 KiB receives 503."
        ),
    ] = 64 * 1024 * 1024
    host_names: Annotated[
        tuple[str, ...],
        restricted('a list of host names in lower case, such as ["chat.example.com"]', checks.are_host_names),
        about(
            "Further names of this server, besides localhost, its host name and IP addresses. Where clients need no"
            " token or callers no key, the server refuses requests of web pages that name another host."
        ),
    ] = ()
    # The kernel caps it at net.core.somaxconn, 4096 since Linux 5.4.
    backlog: Annotated[
        int,
        Meta(ge=1, le=65535),
        about("Maximum number of connections that wait in a worker's accept queue."),
    ] = 4096


class LogSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Logging."""

    level: Annotated[
        Literal["none", "trace", "debug", "info", "warn", "error"],
        about("Lowest severity that the server logs. none: the server logs nothing."),
    ] = "info"
    loggers: Annotated[
        dict[str, str],
        restricted(
            'a table of loggers with a level (none, trace, debug, info, warn, error), such as { sqlalchemy = "warn" }',
            checks.are_levels,
        ),
        about(
            "Lowest severity of the application's own loggers (Python's logging), by their names, where it is not"
            " log.level; root: of all others."
        ),
    ] = field(default_factory=dict)
    max_queued_bytes: Annotated[
        Positive,
        about(
            "Most bytes of log lines that a process keeps while the reader of its output does not keep up. "
            "Further lines are dropped and counted."
        ),
    ] = 1024 * 1024


class NodeSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The identity of this server."""

    name: Annotated[str, about("Name of this server, for operators. Empty: host name and port.")] = ""


class ShutdownSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Graceful shutdown."""

    timeout: Annotated[Seconds, about("Time from SIGTERM until the server kills its remaining processes.")] = 30.0
    spread: Annotated[
        Seconds,
        about(
            "Period over which the server spreads its requests to reconnect, so that clients do not return all at once."
        ),
    ] = 1.0
    reconnect_rate: Annotated[
        NonNegative,
        about(
            "Maximum number of clients per second that a worker requests to reconnect when it stops. With many clients"
            " the period is longer than shutdown.spread, but at most half of shutdown.timeout. 0: no limit."
        ),
    ] = 2000


class MemorySettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The embedded engine: a file that keeps its channels over restarts."""

    path: Annotated[
        str,
        about(
            "File that keeps history, offsets and epochs over restarts, an SQLite database. A relative path starts at"
            " this file's folder. Empty: a restart of the broker forgets all channels."
        ),
    ] = ""
    fsync: Annotated[
        Literal["always", "interval", "never"],
        about(
            "When the disk has to have changes. always: before anyone learns of them, so that a loss of power loses"
            " nothing, but everything waits for the disk. interval: within fsync_interval. never: when the system"
            " writes them; a loss of power may damage the file. With interval and never, channels have new epochs after"
            " a loss of power."
        ),
    ] = "interval"
    fsync_interval: Annotated[
        PositiveSeconds, about("Time after which the disk has to have changes, with fsync = interval.")
    ] = 1.0
    queue_size: Annotated[
        int,
        Meta(ge=1024 * 1024),
        about(
            "Bytes of shared memory for changes on their way to the file. A publication with history must not be longer"
            " than a quarter of it."
        ),
    ] = 8 * 1024 * 1024
    max_file_size: Annotated[
        int,
        Meta(ge=1024 * 1024),
        about(
            "Maximum size of the file in bytes. It needs up to three times the size of the history. Beyond it, channels"
            " are in memory alone, until their history fits again."
        ),
    ] = 1024 * 1024 * 1024


class EngineSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The engine, which numbers, stores and routes publications."""

    type: Annotated[
        Literal["memory", "redis"],
        about(
            "Storage of channels. memory: the memory of this server's broker process. redis: Redis or Valkey, for"
            " several servers with the same channels."
        ),
    ] = "memory"
    publish_timeout: Annotated[PositiveSeconds, about("Time limit for the engine's answer before a request fails.")] = (
        5.0
    )
    queue_max_size: Annotated[
        Positive,
        about(
            "Maximum number of bytes that the broker queues for one worker. Beyond it, the broker disconnects the"
            " worker, and the worker's clients recover."
        ),
    ] = 64 * 1024 * 1024
    max_channels: Annotated[
        Positive, about("Maximum number of channels that have history or presence at the same time.")
    ] = 1_000_000
    memory: MemorySettings = field(default_factory=MemorySettings)
    redis: RedisSettings = field(default_factory=RedisSettings)


class TokenSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Verification of connection tokens (JSON Web Tokens)."""

    hmac_secret_key: Annotated[
        Secret,
        about("Secret of HS256, HS384 and HS512 tokens, 32 bytes or longer. Empty: the server refuses such tokens."),
    ] = ""
    hmac_previous_secret_key: Annotated[
        Secret,
        about("Previous secret, which the server tries second while you change secrets. Empty: no previous secret."),
    ] = ""
    hmac_previous_secret_key_valid_until: Annotated[
        NonNegative,
        about("Unix time, in seconds, from which the server refuses the previous secret. 0: it never expires."),
    ] = 0
    rsa_public_key: Annotated[
        Secret,  # a public key is no secret, but an operator may have put the private key here
        restricted(
            "the PEM text of an RSA public key of 2048 bits or more (-----BEGIN PUBLIC KEY-----)",
            checks.is_rsa_key_or_empty,
        ),
        about("Public key of RS256, RS384 and RS512 tokens, as PEM text. Empty: the server refuses such tokens."),
    ] = ""
    ecdsa_public_key: Annotated[
        Secret,
        restricted(
            "the PEM text of a public key on P-256, P-384 or P-521 (-----BEGIN PUBLIC KEY-----)",
            checks.is_elliptic_key_or_empty,
        ),
        about(
            "Public key of ES256, ES384 or ES512 tokens (its curve decides which), as PEM text. Empty: the server"
            " refuses such tokens."
        ),
    ] = ""
    jwks_public_endpoint: Annotated[
        Secret,  # some URLs contain a password
        restricted('an https address such as "https://id.example.com/jwks.json"', checks.is_key_set_url_or_empty),
        about(
            "URL of a JSON Web Key Set. The server then accepts tokens signed by keys of this set, and ignores the"
            " keys above. Empty: no key set."
        ),
    ] = ""
    jwks_allowed_hosts: Annotated[
        tuple[str, ...],
        restricted(
            'a list of host names or addresses in lower case, without ports, such as ["keys.auth.svc"]',
            checks.are_hosts,
        ),
        about(
            "Hosts in your own network from which the server also fetches the key set over http and from private"
            " addresses."
        ),
    ] = ()
    jwks_allow_insecure: Annotated[
        bool,
        about(
            "The server also fetches the key set over http and from private addresses, from any host. For development"
            " only; name the hosts in jwks_allowed_hosts otherwise."
        ),
    ] = False
    audience: Annotated[str, about("Required value of the `aud` claim. Empty: any value.")] = ""
    audience_regex: Annotated[
        str,
        restricted("a regular expression that Python compiles", checks.is_regular_expression),
        about(
            "Regular expression that must match an `aud` claim. jwks_public_endpoint may contain its named groups as"
            " {{group}}. Empty: any value."
        ),
    ] = ""
    issuer: Annotated[str, about("Required value of the `iss` claim. Empty: any value.")] = ""
    issuer_regex: Annotated[
        str,
        restricted("a regular expression that Python compiles", checks.is_regular_expression),
        about(
            "Regular expression that must match the `iss` claim. jwks_public_endpoint may contain its named groups as"
            " {{group}}. Empty: any value."
        ),
    ] = ""
    user_id_claim: Annotated[
        str,
        restricted("a name of letters and _", checks.is_claim_name_or_empty),
        about("Name of the claim that contains the user ID. Empty: `sub`."),
    ] = ""
    leeway: Annotated[
        Seconds,
        about("Time by which an issuer's clock may be ahead: the server accepts a token so long before its `nbf`."),
    ] = 5.0
    max_length: Annotated[NonNegative, about("Maximum length of a token, in bytes. 0: no limit.")] = 8192

    def __repr__(self) -> str:
        """Return no values: keys must not get into logs."""
        return f"{type(self).__name__}(...)"


class SubscriptionTokenSettings(TokenSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Verification of subscription tokens. This table inherits nothing from [client.token]."""

    enabled: Annotated[
        bool,
        about("The server verifies subscription tokens by this table. false: it verifies them by [client.token]."),
    ] = False


class PersonalChannelSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Personal channels: the server subscribes all connections of a user to the user's own channel."""

    enabled: Annotated[bool, about("The server subscribes every user to the channel #USER.")] = False
    personal_channel_namespace: Annotated[
        str, about("Namespace of personal channels, which are then NAMESPACE:#USER. Empty: no namespace.")
    ] = ""
    single_connection: Annotated[
        bool,
        about("A new connection of a user closes the user's older ones. The namespace needs presence for this."),
    ] = False


class ClientSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Client connections: authentication, and the limits of each connection."""

    allowed_origins: Annotated[
        tuple[str, ...],
        restricted(
            'a list of origin patterns in lower case, such as ["https://*.example.com"], or ["*"]',
            checks.are_origin_patterns,
        ),
        about("Origins of the web pages that may connect, with * as wildcard. Empty: only pages of the same origin."),
    ] = ()
    insecure: Annotated[bool, about("Clients need no token and have every permission. For development only.")] = False
    allow_anonymous_connect_without_token: Annotated[
        bool, about("A client without a token connects as the anonymous user.")
    ] = False
    disallow_anonymous_connection_tokens: Annotated[
        bool, about("The server refuses connection tokens without a user.")
    ] = False
    token: TokenSettings = field(default_factory=TokenSettings)
    subscription_token: SubscriptionTokenSettings = field(default_factory=SubscriptionTokenSettings)
    subscribe_to_user_personal_channel: PersonalChannelSettings = field(default_factory=PersonalChannelSettings)
    user_id_http_header: Annotated[
        str,
        about(
            "Name of the request header that contains the user ID. Use it only behind a proxy that authenticates users"
            " and always sets this header. Empty: no such header."
        ),
    ] = ""
    trusted_proxies: Annotated[
        tuple[str, ...],
        restricted('a list of addresses or networks, such as ["10.0.0.0/8"]', checks.are_networks),
        about(
            "Addresses and networks of the proxies whose X-Forwarded-For header the server believes. Empty: a client's"
            " address is the peer address of its connection."
        ),
    ] = ()
    ping_interval: Annotated[Seconds, about("Interval between pings to a client. 0: the server sends no pings.")] = 25.0
    pong_timeout: Annotated[Seconds, about("Time limit for a client's answer to a ping. 0: no answer is required.")] = (
        8.0
    )
    stale_close_delay: Annotated[
        Seconds,
        about("Time limit for a new connection to send a valid connect command. 0: no limit."),
    ] = 10.0
    expired_close_delay: Annotated[Seconds, about("Time that a client has to refresh an expired connection.")] = 25.0
    expired_sub_close_delay: Annotated[
        Seconds,
        about("Time in which an expired subscription may be refreshed by its client, or prolonged by the server API."),
    ] = 25.0
    channel_limit: Annotated[NonNegative, about("Maximum number of subscriptions of one connection. 0: no limit.")] = (
        128
    )
    queue_max_size: Annotated[
        Positive,
        about("Maximum number of bytes that the server queues for a slow client before it disconnects the client."),
    ] = 1_048_576
    connection_limit: Annotated[
        NonNegative, about("Maximum number of connections to all workers together. 0: no limit.")
    ] = 0
    connection_limit_per_address: Annotated[
        NonNegative,
        about(
            "Maximum number of connections of one IP address to one worker. Behind proxies, set client.trusted_proxies"
            " too; otherwise all clients share the address of the proxy. 0: no limit."
        ),
    ] = 0
    connection_rate_limit: Annotated[
        NonNegative, about("Maximum number of new connections per second to all workers together. 0: no limit.")
    ] = 0
    user_connection_limit: Annotated[
        NonNegative,
        about(
            "Maximum number of connections of one user to all workers together. Connections of the anonymous user do"
            " not count. 0: no limit."
        ),
    ] = 0
    commands_per_second: Annotated[
        NonNegative,
        about("Maximum number of commands per second of one connection, averaged over two seconds. 0: no limit."),
    ] = 1000
    error_limit: Annotated[
        NonNegative,
        about(
            "Maximum number of failed commands of one connection within five seconds before the server closes it."
            " Refused subscriptions count only beyond client.channel_limit. 0: no limit."
        ),
    ] = 100
    concurrency: Annotated[
        NonNegative,
        about("Maximum number of commands of one connection that run at the same time. 0 and 1: one after another."),
    ] = 0
    channel_position_check_delay: Annotated[
        Seconds,
        about(
            "Time without a publication after which the server checks a subscriber's position in a channel. 0: never."
        ),
    ] = 40.0
    command_queue: Annotated[
        Positive,
        about("Maximum number of queued commands of one connection. Beyond it, the server stops reading its socket."),
    ] = 64
    # The default recovers 1,000 subscriptions in one connect command; decoding it takes some milliseconds.
    max_command_fields: Annotated[
        int,
        Meta(ge=2048),
        about(
            "Maximum number of fields in one command in Protobuf, and half as many objects outside the data in JSON."
            " A connect command has less: 16 for each subscription of channel_limit, and 2048 at least."
        ),
    ] = 8192
    max_filter_nodes: Annotated[
        Positive,
        about("Maximum number of nodes in a tags filter. The server evaluates each filter for each publication."),
    ] = 256
    max_filter_depth: Annotated[
        int, Meta(ge=1, le=64), about("Maximum number of levels of conditions in a tags filter.")
    ] = 32
    history_max_publication_limit: Annotated[
        NonNegative, about("Maximum number of publications in a history reply. 0: no limit.")
    ] = 300
    recovery_max_publication_limit: Annotated[
        NonNegative,
        about(
            "Maximum number of publications that a returning client recovers. A client that missed more must reload."
            " 0: no limit."
        ),
    ] = 300
    recovery_reply_size: Annotated[
        Positive,
        about(
            "Maximum number of bytes of missed publications in a connect reply, over all its channels, or in a"
            " subscribe reply. The rest follows as pushes, in pages of this size, as fast as the client's network takes"
            " them. A client that waits 5 seconds for a reply needs a link of a fifth of this size per second."
        ),
    ] = 32_768
    connect_include_server_time: Annotated[bool, about("The connect reply contains the server's time.")] = False


class AppSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The application, which defines the handlers."""

    module: Annotated[
        str,
        restricted('the place of an App, such as "chat:app"', checks.is_reference_or_empty),
        about('Place of the App object, as "package.module:attribute". Empty: no handlers.'),
    ] = ""
    path: Annotated[
        str,
        about("Folder that the server searches first for the module. A relative path starts at this file's folder."),
    ] = ""
    options: Annotated[
        dict[str, object], about("The application's own settings, which the server passes to it unchanged.")
    ] = field(default_factory=dict)


class Settings(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole tree. Field names are the keys of the file."""

    http_server: HTTPServerSettings = field(default_factory=HTTPServerSettings)
    log: LogSettings = field(default_factory=LogSettings)
    node: NodeSettings = field(default_factory=NodeSettings)
    shutdown: ShutdownSettings = field(default_factory=ShutdownSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    client: ClientSettings = field(default_factory=ClientSettings)
    channel: ChannelSettings = field(default_factory=ChannelSettings)
    http_api: HTTPAPISettings = field(default_factory=HTTPAPISettings)
    rpc: RPCSettings = field(default_factory=RPCSettings)
    websocket: WebSocketSettings = field(default_factory=WebSocketSettings)
    sse: SSESettings = field(default_factory=SSESettings)
    http_stream: HTTPStreamSettings = field(default_factory=HTTPStreamSettings)
    emulation: EmulationSettings = field(default_factory=EmulationSettings)
    uni_websocket: UniWebSocketSettings = field(default_factory=UniWebSocketSettings)
    uni_sse: UniSSESettings = field(default_factory=UniSSESettings)
    uni_http_stream: UniHTTPStreamSettings = field(default_factory=UniHTTPStreamSettings)
    init: InitSettings = field(default_factory=InitSettings)
    workers: WorkersSettings = field(default_factory=WorkersSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)
    app: AppSettings = field(default_factory=AppSettings)


def dump(settings: Settings) -> bytes:
    """Serialize a tree for a child process, secrets included."""
    return msgspec.msgpack.encode(settings)


def load(data: bytes) -> Settings:
    """Deserialize a tree from `dump`. Raises msgspec.ValidationError or DecodeError for other data: a bug of ours."""
    return msgspec.msgpack.decode(data, type=Settings)
