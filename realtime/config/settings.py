"""The settings tree: one frozen Struct for each table of the configuration, `Settings` at the root.

Key names are those of a Centrifugo v6 file wherever the concept is the same. Durations are seconds (float) and sizes
are bytes (int). Other classes receive the branch of the tree that they need, never the whole, and never change it.

A setting is one field: its annotation has the type, the limits and the help text, which generated files contain too.
Checks of values are in `realtime.config.checks`, rules between several settings in `realtime.config.rules`, warnings
about risky values in `realtime.config.warnings`, the tables below [channel] in `realtime.config.channel_settings`,
those of tokens in `realtime.config.token_settings`, and those of the transports in
`realtime.config.transport_settings`.
`realtime.config.sources` reads a tree.
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
    PositiveShare,
    Seconds,
    Secret,
    Share,
    URLPath,
    about,
    restricted,
)

# `as` re-exports a name, so that every Struct of the tree can be imported from this module.
from realtime.config.channel_settings import ChannelOptions as ChannelOptions
from realtime.config.channel_settings import ChannelSettings as ChannelSettings
from realtime.config.channel_settings import Namespace as Namespace
from realtime.config.token_settings import SubscriptionTokenSettings as SubscriptionTokenSettings
from realtime.config.token_settings import TokenSettings as TokenSettings
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


class EngineSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The engine, which numbers, stores and routes publications."""

    type: Annotated[
        Literal["memory"], about("Storage of channels. memory: the memory of this server's broker process.")
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


class WorkersSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The worker processes. Each has an event loop of its own."""

    count: Annotated[
        int, Meta(ge=0, le=1024), about("Number of worker processes. 0: one for each CPU core that the server may use.")
    ] = 0
    threads: Annotated[
        int, Meta(ge=1, le=1024), about("Maximum number of threads of each worker for plain (not async) handlers.")
    ] = 16
    thread_queue: Annotated[NonNegative, about("Maximum number of calls in each worker that wait for a thread.")] = 1000
    processes: Annotated[
        int,
        Meta(ge=0, le=1024),
        about(
            'Number of processes of each worker for handlers with run="process". 0: the worker\'s share of the cores.'
        ),
    ] = 0
    process_queue: Annotated[
        NonNegative, about("Maximum number of calls in each worker that wait for such a process.")
    ] = 100
    io_uring: Annotated[
        bool,
        about(
            "Fan-out submits many sends in one system call, through io_uring, where the kernel has it and permits it."
        ),
    ] = True
    handler_timeout: Annotated[Seconds, about("Time limit of a handler's call. 0: no limit.")] = 10.0
    max_error_series: Annotated[
        Positive,
        about(
            "Maximum number of pairs of a handler and a type of exception that each worker counts on their own in"
            ' realtime_handler_errors_total. Further types count as exception="other".'
        ),
    ] = 200
    sample_calls: Annotated[
        Positive,
        about(
            "Number of first calls of a handler that may run on a worker's loop together, before the worker knows how"
            " long one blocks the loop. Further calls wait for the end of these. Handlers that never shed load do not"
            " wait."
        ),
    ] = 5
    sample_timeout: Annotated[Seconds, about("Time limit of this wait, which each handler has once in a worker.")] = 0.4
    restart_delay: Annotated[
        Seconds,
        about("Delay before the supervisor replaces a dead worker. It doubles with each death."),
    ] = 0.1
    restart_delay_max: Annotated[Seconds, about("Maximum of this delay.")] = 30.0
    restart_reset: Annotated[
        Seconds,
        about("Lifetime of a worker after which restart_delay starts again from its first value."),
    ] = 60.0
    start_timeout: Annotated[
        PositiveSeconds, about("Time limit for a worker to load the application and become ready.")
    ] = 30.0
    max_age: Annotated[
        Seconds,
        about(
            "Age at which a new process takes the place of a worker, and its clients. The workers are replaced at"
            " different times, from half of this age on. 0: never."
        ),
    ] = 0.0
    max_rss: Annotated[
        NonNegative,
        about(
            "Resident memory of a worker, in bytes, at which a new process takes its place, and its clients. 0: never."
        ),
    ] = 0


class LoopSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The health of the workers' event loops, and the limits of a worker's load."""

    interval: Annotated[float, Meta(ge=0.001), about("Interval between two heartbeats of a worker's loop.")] = 0.04
    lagging: Annotated[
        Seconds,
        about(
            "A worker whose loop lags by this much is lagging: the supervisor finds out what blocks the loop. 0: never."
        ),
    ] = 0.05
    steering: Annotated[
        bool,
        about(
            "The supervisor steers new clients to workers by their health and load. false: the kernel spreads clients"
            " evenly."
        ),
    ] = True
    rescue: Annotated[
        bool,
        about("The supervisor hands new clients that wait for an unavailable worker to another worker."),
    ] = True
    rebalance: Annotated[
        bool,
        about(
            "The supervisor moves clients from a worker that is much busier than another one for long, a few at a time."
        ),
    ] = True
    rebalance_difference: Annotated[
        PositiveShare,
        about("Difference between the busy shares of two loops, from 0 to 1, from which clients move."),
    ] = 0.4
    rebalance_delay: Annotated[
        PositiveSeconds,
        about("Time for which a worker must be so much busier before clients move, and before more of them move."),
    ] = 30.0
    relief: Annotated[
        bool, about("While a handler blocks a worker's loop, a second thread of the worker serves its other clients.")
    ] = True
    relief_after: Annotated[
        float, Meta(ge=0.005), about("Relief begins when a turn of a worker's loop has taken this long.")
    ] = 0.03
    slice: Annotated[
        float,
        Meta(ge=0.0005),
        about("Time for which the server's own work occupies a loop before other work gets its turn."),
    ] = 0.005
    stuck: Annotated[
        Seconds,
        about("The supervisor kills and replaces a worker without a heartbeat for this long. 0: never."),
    ] = 10.0
    max_lag: Annotated[
        Seconds,
        about(
            "A worker whose loop lags by this much is under pressure: other workers take its new clients, and it sheds"
            " load. 0: never."
        ),
    ] = 0.2
    max_utilization: Annotated[
        Share,
        about(
            "A worker whose loop is busy for this share of the time, from 0 to 1, logs a warning and sheds no load."
            " 0: never."
        ),
    ] = 0.0
    max_rss: Annotated[
        NonNegative,
        about(
            "A worker with this much resident memory, in bytes, sheds load, and a new process takes its place, and its"
            " clients. 0: never."
        ),
    ] = 0
    # A quarter of a gigabyte of frames is a thousand slow clients with a quarter of client.queue_max_size each.
    max_queued_bytes: Annotated[
        NonNegative,
        about(
            "A worker that queues this many bytes for its slow clients, together, sheds load and disconnects those with"
            " the longest queues. 0: never."
        ),
    ] = 256 * 1024 * 1024
    # Half of workers.thread_queue: calls at the end of such a queue hardly finish in time, and more would be refused.
    max_threads_waiting: Annotated[
        NonNegative, about("A worker with this many calls that wait for a thread sheds load. 0: never.")
    ] = 500


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
