"""Settings: arguments, environment and file, in falling order of weight, into one frozen tree.

Key names are those of a Centrifugo v6 file wherever the concept is the same. Inside, durations are seconds (float)
and sizes are bytes (int). A class elsewhere is handed its branch of the tree, never the whole, and never changes it.

A setting is one field: its annotation gives the form, the limits and the line that explains it, here as in a
generated file. What must hold between several fields is a Rule of their class; what is allowed but unwise is
in `realtime.config.warnings`.
"""

from __future__ import annotations

import functools
import ipaddress
import itertools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from msgspec import Meta, Struct, field

from realtime.config import centrifugo_keys, toml_lines
from realtime.config.reader import URL_PATH, Reader, Rule, one_line
from realtime.errors import SettingsError
from realtime.types import HistoryOptions

MAX_FILE_BYTES = 1024 * 1024


def about(text: str) -> Meta:
    """What a key does, in one sentence."""
    return Meta(description=text)


def only(expected: str, accepts: Callable[[Any], bool]) -> Meta:
    """A value for which the predicate holds; `expected` names it in a problem."""
    return Meta(extra={"expected": expected, "accepts": accepts})


def _is_address(text: str) -> bool:
    try:
        return text == "" or bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def _is_loopback(text: str) -> bool:
    return text != "" and _is_address(text) and ipaddress.ip_address(text).is_loopback


def _is_key_set(text: str) -> bool:
    if not re.fullmatch(r"https?://[!-~]+", text):
        return text == ""
    try:
        url = urlsplit(text)
        return bool(url.hostname and url.path) and "@" not in url.netloc and url.port != 0
    except ValueError:  # brackets without an address, a port that is none
        return False


# Stands in the address of a key set for what a named group of a pattern has found.
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
_LISTED = re.compile(r"\(\?P<(\w+)>((?:[A-Za-z0-9_-]|\\\.)+(?:\|(?:[A-Za-z0-9_-]|\\\.)+)*)\)")


def listed_groups(pattern: str) -> dict[str, tuple[str, ...]]:
    """The named groups of a pattern that do no more than list texts, such as (?P<tenant>acme|globex), with those."""
    return {name: tuple(texts.replace("\\.", ".").split("|")) for name, texts in _LISTED.findall(pattern)}


def _lists_what_it_names(token: TokenSettings) -> bool:
    """Whether only listed texts get into the key set's address: those who write tokens shall not choose whom we ask."""
    listed = listed_groups(token.audience_regex) | listed_groups(token.issuer_regex)
    left = PLACEHOLDER.sub(lambda found: "" if found[1] in listed else "{", token.jwks_public_endpoint)
    return not {"{", "}"} & set(left)


def _is_no_pem(key: str, token: TokenSettings) -> bool:
    return not getattr(token, key).lstrip().startswith("-----BEGIN")


def _is_rsa(text: str) -> bool:
    """Whether it is an RSA key that signs tokens: of 2048 bits or more (RFC 7518, section 3.3). Or nothing."""
    key = _public_key(text)
    return text == "" or (isinstance(key, RSAPublicKey) and 2048 <= key.key_size <= 16384)


def _is_elliptic(text: str) -> bool:
    """Whether it is a key on one of the curves that sign tokens (RFC 7518, section 3.4). Or nothing."""
    key = _public_key(text)
    return text == "" or (isinstance(key, EllipticCurvePublicKey) and key.curve.name in _CURVES)


_CURVES = ("secp256r1", "secp384r1", "secp521r1")


def _public_key(text: str) -> object:
    try:
        return load_pem_public_key(text.encode())
    except (ValueError, UnsupportedAlgorithm):
        return None


def _is_claim(text: str) -> bool:
    return re.fullmatch(r"[a-zA-Z_]*", text) is not None


def _are_networks(texts: tuple[str, ...]) -> bool:
    try:
        return all(bool(ipaddress.ip_network(text, strict=False)) for text in texts)
    except ValueError:
        return False


def _is_reference(text: str) -> bool:
    """package.module:attribute, or nothing."""
    return text == "" or re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", text) is not None


def _compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except (re.error, RecursionError, OverflowError):
        return False


def _are_origins(patterns: tuple[str, ...]) -> bool:
    """Globs for what a browser sends (RFC 6454, section 6.2): scheme://host[:port] in lower case, no path."""
    return all(re.fullmatch(r"\*[^\s/,A-Z]*|[a-z*?][-a-z0-9+.*?]*://[^\s/,A-Z]+", pattern) for pattern in patterns)


def _outlives(channel: ChannelSettings) -> bool:
    """Whether the numbering of every channel lives at least as long as its publications."""
    return all(
        options.history_meta_ttl or channel.history_meta_ttl >= options.history_ttl
        for options in (channel.without_namespace, *channel.namespaces)
    )


def _has_history(options: ChannelOptions) -> bool:
    return options.history_size > 0 and options.history_ttl > 0


Port = Annotated[int, Meta(ge=0, le=65535)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Deadline = Annotated[float, Meta(gt=0)]
WholeSeconds = Annotated[float, Meta(ge=0, multiple_of=1)]
Secret = Annotated[str, Meta(extra={"secret": True})]
Prefix = Annotated[str, Meta(extra={"form": URL_PATH})]


class HTTPServerSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The two listeners: clients outside, operators inside."""

    address: Annotated[
        str,
        only('an IP address, or "" for all interfaces', _is_address),
        about("IP address on which clients connect; empty: all interfaces."),
    ] = ""
    port: Annotated[Port, about("Port for clients; 0: one that is free.")] = 8000
    internal_address: Annotated[
        str,
        only('a loopback address such as "127.0.0.1" (this port has no password yet)', _is_loopback),
        about("IP address for operators: health, readiness and metrics. Loopback only."),
    ] = "127.0.0.1"
    internal_port: Annotated[Port, about("Port for operators; 0: one that is free.")] = 8001
    max_header_bytes: Annotated[int, Meta(ge=1024), about("Largest request head, in bytes.")] = 16384
    max_headers: Annotated[Positive, about("Most header lines in a request.")] = 100
    header_timeout: Annotated[Deadline, about("Time for the whole request head to arrive.")] = 5.0
    # The kernel caps it at net.core.somaxconn, 4096 since Linux 5.4.
    backlog: Annotated[int, Meta(ge=1, le=65535), about("Connections of one worker that may wait to be accepted.")] = (
        4096
    )

    RULES: ClassVar = (
        Rule(
            ("internal_port", "port"),
            lambda server: server.port == 0 or server.port != server.internal_port,
            "the port for operators must differ from http_server.port, {1}; choose another",
        ),
    )


class LogSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """What is logged."""

    level: Annotated[
        Literal["none", "trace", "debug", "info", "warn", "error"], about("Least severity that is logged.")
    ] = "info"


class NodeSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """This installation, as others see it."""

    name: Annotated[str, about("Name shown to operators; empty: host name and port.")] = ""


class ShutdownSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """How the server stops."""

    timeout: Annotated[Seconds, about("Time from SIGTERM until what still runs is killed.")] = 30.0
    spread: Annotated[
        Seconds, about("Clients are told to reconnect over this long, so that they do not all come back at once.")
    ] = 1.0


class EngineSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The engine: what numbers, keeps and routes publications."""

    type: Annotated[Literal["memory"], about("Where channels live: in the memory of a process of this server.")] = (
        "memory"
    )
    publish_timeout: Annotated[Deadline, about("Time for the engine to answer before a request has failed.")] = 5.0
    queue_max_size: Annotated[
        Positive,
        about("Bytes that may wait for one worker; a worker further behind is cut off, and its clients recover."),
    ] = 64 * 1024 * 1024
    max_channels: Annotated[Positive, about("Most channels that have history or presence at a time.")] = 1_000_000


class TokenSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How connection tokens are verified."""

    hmac_secret_key: Annotated[
        Secret, about("Key of HS256, HS384 and HS512 tokens, 32 bytes or more; empty: no such tokens.")
    ] = ""
    hmac_previous_secret_key: Annotated[Secret, about("Key tried second, while keys are changed.")] = ""
    hmac_previous_secret_key_valid_until: Annotated[
        Count, about("Unix time, in seconds, after which the previous key is refused; 0: no end.")
    ] = 0
    rsa_public_key: Annotated[
        Secret,  # it is none, but somebody may have put the private key here
        only("the PEM text of an RSA public key of 2048 bits or more (-----BEGIN PUBLIC KEY-----)", _is_rsa),
        about("Public key of RS256, RS384 and RS512 tokens, as PEM text; empty: none."),
    ] = ""
    ecdsa_public_key: Annotated[
        Secret,
        only("the PEM text of a public key on P-256, P-384 or P-521 (-----BEGIN PUBLIC KEY-----)", _is_elliptic),
        about("Public key of ES256, ES384 or ES512 tokens, by its curve, as PEM text; empty: none."),
    ] = ""
    jwks_public_endpoint: Annotated[
        Secret,  # some addresses have a password in them
        only('an https address such as "https://id.example.com/jwks.json"', _is_key_set),
        about("Address of a JSON Web Key Set; tokens signed by its keys are taken, and the static keys are not used."),
    ] = ""
    jwks_allow_insecure: Annotated[
        bool, about("Fetch the key set by http and from private addresses, too. For development.")
    ] = False
    audience: Annotated[str, about("Required `aud` claim; empty: not checked.")] = ""
    audience_regex: Annotated[
        str,
        only("a regular expression that Python compiles", _compiles),
        about("Must match an `aud` claim; its named groups may stand in jwks_public_endpoint as {{group}}."),
    ] = ""
    issuer: Annotated[str, about("Required `iss` claim; empty: not checked.")] = ""
    issuer_regex: Annotated[
        str,
        only("a regular expression that Python compiles", _compiles),
        about("Must match the `iss` claim; its named groups may stand in jwks_public_endpoint as {{group}}."),
    ] = ""
    user_id_claim: Annotated[
        str,
        only("a name of letters and _", _is_claim),
        about("Claim that holds the user id; empty: `sub`."),
    ] = ""
    max_length: Annotated[Count, about("Longest token, in bytes; 0: no limit.")] = 8192

    def __repr__(self) -> str:  # keeps the keys out of logs
        return "Token(...)"

    RULES: ClassVar = (
        Rule(
            ("hmac_previous_secret_key", "hmac_secret_key"),
            lambda token: token.hmac_secret_key or not token.hmac_previous_secret_key,
            "needs hmac_secret_key beside it; set that, or remove this",
        ),
        *(
            Rule(
                (key,),
                functools.partial(_is_no_pem, key),
                "is a PEM key, and whoever verifies tokens by it could make them; write a text that nobody else knows",
            )
            for key in ("hmac_secret_key", "hmac_previous_secret_key")
        ),
        Rule(
            ("jwks_public_endpoint", "jwks_allow_insecure"),
            lambda token: token.jwks_allow_insecure or not token.jwks_public_endpoint.startswith("http:"),
            "without encryption anybody between may put in keys; use https, or for development jwks_allow_insecure",
        ),
        Rule(
            ("jwks_public_endpoint", "audience_regex", "issuer_regex"),
            _lists_what_it_names,
            "{{{{name}}}} stands for a named group of audience_regex or issuer_regex that lists its texts, as in"
            " (?P<name>acme|globex); correct either",
        ),
        Rule(
            ("audience_regex", "audience"),
            lambda token: not (token.audience and token.audience_regex),
            "audience is set as well; remove one of the two",
        ),
        Rule(
            ("issuer_regex", "issuer"),
            lambda token: not (token.issuer and token.issuer_regex),
            "issuer is set as well; remove one of the two",
        ),
    )


class SubscriptionTokenSettings(TokenSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How subscription tokens are verified, where not as connection tokens are: nothing is inherited from those."""

    enabled: Annotated[bool, about("Verify subscription tokens by this table alone.")] = False


class PersonalChannelSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """A channel for each user, to which the server subscribes all of that user's connections."""

    enabled: Annotated[bool, about("Subscribe every user to the channel #USER.")] = False
    personal_channel_namespace: Annotated[str, about("Its namespace: the channel is NAMESPACE:#USER; empty: none.")] = (
        ""
    )
    single_connection: Annotated[
        bool, about("A user's new connection ends the older ones; needs presence in that namespace.")
    ] = False


class ClientSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Client connections: who may connect, and the limits of one connection."""

    allowed_origins: Annotated[
        tuple[str, ...],
        only('a list of origin patterns in lower case, such as ["https://*.example.com"], or ["*"]', _are_origins),
        about("Origins of web pages that may connect, with * as wildcard; empty: only the page's own server."),
    ] = ()
    insecure: Annotated[bool, about("No token needed and every client permission given. For development.")] = False
    allow_anonymous_connect_without_token: Annotated[
        bool, about("Without a token, a client connects as the anonymous user.")
    ] = False
    disallow_anonymous_connection_tokens: Annotated[bool, about("Refuse tokens without a user.")] = False
    token: TokenSettings = field(default_factory=TokenSettings)
    subscription_token: SubscriptionTokenSettings = field(default_factory=SubscriptionTokenSettings)
    subscribe_to_user_personal_channel: PersonalChannelSettings = field(default_factory=PersonalChannelSettings)
    user_id_http_header: Annotated[
        str, about("Header that holds the user id; only behind a proxy that authenticates and always sets it.")
    ] = ""
    trusted_proxies: Annotated[
        tuple[str, ...],
        only('a list of addresses or networks, such as ["10.0.0.0/8"]', _are_networks),
        about("Proxies whose X-Forwarded-For is believed; empty: a client's address is that of its connection."),
    ] = ()
    ping_interval: Annotated[Seconds, about("Time between two pings to a client; 0: no pings.")] = 25.0
    pong_timeout: Annotated[Seconds, about("Time for a client to answer a ping; 0: no answer is expected.")] = 8.0
    stale_close_delay: Annotated[
        Seconds, about("Time for a new connection to send a good connect command; 0: no limit.")
    ] = 10.0
    expired_close_delay: Annotated[Seconds, about("Time to refresh an expired connection.")] = 25.0
    expired_sub_close_delay: Annotated[Seconds, about("Time to refresh an expired subscription.")] = 25.0
    channel_limit: Annotated[Count, about("Most subscriptions of one connection; 0: no limit.")] = 128
    queue_max_size: Annotated[
        Positive, about("Bytes that may wait for one slow client; beyond them it is disconnected.")
    ] = 1_048_576
    connection_limit: Annotated[Count, about("Most connections, over all workers; 0: no limit.")] = 0
    connection_rate_limit: Annotated[
        Count, about("Most new connections in a second, over all workers; 0: no limit.")
    ] = 0
    user_connection_limit: Annotated[
        Count, about("Most connections of one user, over all workers; 0: no limit. Anonymous ones are not counted.")
    ] = 0
    commands_per_second: Annotated[
        Count, about("Commands that one connection may send, on average over two seconds; 0: no limit.")
    ] = 1000
    error_limit: Annotated[
        Count, about("Commands of one connection that may fail within five seconds before it is closed; 0: no limit.")
    ] = 100
    concurrency: Annotated[
        Count, about("Commands of one connection that run at a time; 0 and 1: one after another.")
    ] = 0
    channel_position_check_delay: Annotated[
        Seconds, about("Time without a publication after which a channel's position is checked; 0: never.")
    ] = 40.0
    command_queue: Annotated[
        Positive, about("Commands of one connection that may wait; beyond them its socket is not read.")
    ] = 64
    history_max_publication_limit: Annotated[Count, about("Most publications in one history reply; 0: no limit.")] = 300
    recovery_max_publication_limit: Annotated[
        Count, about("Most publications that a returning client recovers, or it must reload; 0: no limit.")
    ] = 300
    connect_include_server_time: Annotated[bool, about("Tell clients the server's time when they connect.")] = False

    RULES: ClassVar = (
        Rule(
            ("pong_timeout", "ping_interval"),
            lambda client: client.ping_interval == 0 or client.pong_timeout < client.ping_interval,
            "{0} must be shorter than client.ping_interval, {1}; shorten it or lengthen that",
        ),
        Rule(
            ("subscribe_to_user_personal_channel.single_connection", "subscribe_to_user_personal_channel.enabled"),
            lambda client: (
                client.subscribe_to_user_personal_channel.enabled
                or not client.subscribe_to_user_personal_channel.single_connection
            ),
            "single_connection needs enabled = true beside it; set that, or remove this",
        ),
    )


DataFormat = Annotated[
    Literal["", "json", "json_object", "binary"],
    about("What a publication's data must be; empty: anything but nothing; binary: even nothing."),
]


class ChannelOptions(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a channel keeps and who may do what in it."""

    presence: Annotated[bool, about("Keep who is subscribed.")] = False
    join_leave: Annotated[bool, about("Announce who comes and goes to subscribers that ask for it.")] = False
    force_push_join_leave: Annotated[bool, about("Announce it to all subscribers.")] = False
    history_size: Annotated[Count, about("Publications kept; needs history_ttl.")] = 0
    history_ttl: Annotated[
        WholeSeconds, about("Time after the last publication until all are dropped; needs history_size.")
    ] = 0.0
    history_meta_ttl: Annotated[
        WholeSeconds, about("Time until a channel's numbering is forgotten; 0: channel.history_meta_ttl.")
    ] = 0.0
    force_positioning: Annotated[bool, about("Watch every subscription for missed publications.")] = False
    allow_positioning: Annotated[bool, about("Watch a subscription when the client asks for it.")] = False
    force_recovery: Annotated[bool, about("Every returning subscriber recovers what it missed; needs history.")] = False
    allow_recovery: Annotated[bool, about("A returning subscriber recovers when it asks for it.")] = False
    allow_subscribe_for_client: Annotated[bool, about("Any user may subscribe.")] = False
    allow_subscribe_for_anonymous: Annotated[bool, about("... the anonymous user as well.")] = False
    allow_publish_for_client: Annotated[bool, about("Any user may publish.")] = False
    allow_publish_for_subscriber: Annotated[bool, about("Subscribers may publish.")] = False
    allow_publish_for_anonymous: Annotated[bool, about("... the anonymous user as well, where others may.")] = False
    allow_presence_for_client: Annotated[bool, about("Any user may ask who is here.")] = False
    allow_presence_for_subscriber: Annotated[bool, about("Subscribers may ask who is here.")] = False
    allow_presence_for_anonymous: Annotated[bool, about("... the anonymous user as well, where others may.")] = False
    allow_history_for_client: Annotated[bool, about("Any user may read the history.")] = False
    allow_history_for_subscriber: Annotated[bool, about("Subscribers may read the history.")] = False
    allow_history_for_anonymous: Annotated[bool, about("... the anonymous user as well, where others may.")] = False
    allow_user_limited_channels: Annotated[
        bool, about("The users named after the user boundary may subscribe, and nobody else.")
    ] = False
    channel_regex: Annotated[
        str,
        only("a regular expression that Python compiles", _compiles),
        about("Must be found in the channel's name after the namespace; empty: the name must be ASCII."),
    ] = ""
    force_recovery_mode: Annotated[
        Literal["", "stream", "cache"],
        about("What a returning subscriber gets: all that it missed (stream, or empty), or the newest alone (cache)."),
    ] = ""
    auto_cache_recover: Annotated[
        bool, about("Send the newest publication at every subscribe; needs force_recovery and the cache mode.")
    ] = False
    allowed_delta_types: Annotated[
        tuple[Literal["fossil"], ...], about('["fossil"]: clients may ask for publications as differences.')
    ] = ()
    delta_publish: Annotated[bool, about("Send differences for every publication, not only for those that ask.")] = (
        False
    )
    allow_tags_filter: Annotated[bool, about("Subscribers may filter publications by their tags.")] = False
    publication_data_format: DataFormat = ""
    priority: Annotated[
        Literal["high", "normal", "low"],
        about("Which channels' publications go first when a worker has more to deliver than fits a slice of its time."),
    ] = "normal"

    RULES: ClassVar = (
        Rule(
            ("history_size", "history_ttl"),
            lambda options: options.history_size == 0 or options.history_ttl > 0,
            'history_size without history_ttl keeps nothing; set history_ttl, such as "300s", or remove this',
        ),
        Rule(
            ("history_ttl", "history_size"),
            lambda options: options.history_ttl == 0 or options.history_size > 0,
            "history_ttl without history_size keeps nothing; set history_size, such as 100, or remove this",
        ),
        Rule(
            ("history_meta_ttl", "history_ttl"),
            lambda options: options.history_meta_ttl == 0 or options.history_meta_ttl >= options.history_ttl,
            "{0} must not be shorter than history_ttl, {1}; lengthen it or shorten that",
        ),
        Rule(
            ("force_recovery", "history_size", "history_ttl"),
            lambda options: not options.force_recovery or _has_history(options),
            "force_recovery needs history; set history_size and history_ttl, or remove this",
        ),
        Rule(
            ("auto_cache_recover", "force_recovery", "force_recovery_mode"),
            lambda options: (
                not options.auto_cache_recover or (options.force_recovery and options.force_recovery_mode == "cache")
            ),
            'needs force_recovery = true and force_recovery_mode = "cache" beside it; set both, or remove this',
        ),
    )


class Namespace(ChannelOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The options of the channels whose names start with `name` and the namespace boundary. None are inherited."""

    name: Annotated[
        str,
        Meta(pattern=r"^[-a-zA-Z0-9_.]{2,}\Z", examples=["chat"]),
        Meta(extra={"expected": 'a name of two or more of A-Z a-z 0-9 - _ ., such as "chat"'}),
        about("What stands before the namespace boundary in a channel's name."),
    ]


class ChannelSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Channels: how names are read, and the options of each namespace."""

    without_namespace: ChannelOptions = field(default_factory=ChannelOptions)
    namespaces: Annotated[
        tuple[Namespace, ...],
        about(
            "One such table for each namespace, with the options of [channel.without_namespace]; none are inherited."
        ),
    ] = ()
    max_length: Annotated[Positive, about("Longest channel name, in bytes.")] = 255
    namespace_boundary: Annotated[str, Meta(min_length=1), about("Stands between the namespace and the rest.")] = ":"
    private_prefix: Annotated[str, about("Starts a channel that always needs a token; empty: there are none.")] = "$"
    user_boundary: Annotated[str, about("Stands before the users of a user-limited channel.")] = "#"
    user_separator: Annotated[str, about("Stands between those users.")] = ","
    history_meta_ttl: Annotated[
        WholeSeconds, about("Time after the last use until a channel's numbering is forgotten.")
    ] = 2_592_000.0
    publication_data_format: Annotated[
        Literal["", "json", "json_object", "binary"], about("The same option, for namespaces that set none.")
    ] = ""

    RULES: ClassVar = (
        Rule(
            ("history_meta_ttl",),
            _outlives,
            "{0} must not be shorter than the history_ttl of any namespace; lengthen it",
        ),
    )


class HTTPAPISettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The HTTP API for other programs."""

    disabled: Annotated[bool, about("Do not serve the API.")] = False
    insecure: Annotated[bool, about("No key wanted. For development.")] = False
    handler_prefix: Annotated[Prefix, about("Start of the API's paths.")] = "/api"
    key: Annotated[Secret, about("Key that callers send as X-API-Key; empty: every call is refused.")] = ""
    max_body_size: Annotated[Positive, about("Largest request body, in bytes.")] = 1_048_576
    body_timeout: Annotated[Deadline, about("Time for the whole request body to arrive.")] = 10.0
    error_mode: Annotated[
        Literal["", "transport"], about("How errors are told: inside a 200 (empty), or as HTTP statuses (transport).")
    ] = ""

    def __repr__(self) -> str:  # keeps the key out of logs
        return "HTTPAPI(...)"


class RPCPingSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """A procedure that does nothing, for measuring the way there and back."""

    enabled: Annotated[bool, about("Answer it.")] = False
    method: Annotated[str, Meta(min_length=1), about("Its name.")] = "ping"


class RPCSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """Remote procedures of the server itself; the application's own need no configuration."""

    ping: RPCPingSettings = field(default_factory=RPCPingSettings)


class MessageSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the two WebSocket transports have in common."""

    message_size_limit: Annotated[Positive, about("Largest message from a client, in bytes.")] = 65536
    decompressed_message_size_limit: Annotated[
        Count, about("Largest such message after decompression, in bytes; 0: ten times message_size_limit.")
    ] = 0
    max_fragments: Annotated[Count, about("Most fragments of one message; 0: no limit.")] = 1024
    message_timeout: Annotated[Seconds, about("Time for all fragments of a message to arrive; 0: no limit.")] = 10.0
    write_timeout: Annotated[Seconds, about("Time for a socket to take what is written to it; 0: no limit.")] = 1.0
    close_timeout: Annotated[Deadline, about("Time for a client to answer a close before the socket is cut.")] = 5.0
    compression: Annotated[bool, about("Compress messages to clients that offer permessage-deflate.")] = False
    compression_min_size: Annotated[Count, about("Messages under this many bytes are not compressed.")] = 0
    compression_level: Annotated[int, Meta(ge=1, le=9), about("From 1, the fastest, to 9, the smallest.")] = 1


class WebSocketSettings(MessageSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The WebSocket transport."""

    disabled: Annotated[bool, about("Do not serve WebSockets.")] = False
    handler_prefix: Annotated[Prefix, about("Path at which clients connect.")] = "/connection/websocket"


class UniWebSocketSettings(MessageSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """WebSockets on which only the server talks, once the client has said who it is."""

    enabled: Annotated[bool, about("Serve them.")] = False
    handler_prefix: Annotated[Prefix, about("Path at which clients connect.")] = "/connection/uni_websocket"


class StreamSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the streaming transports have in common."""

    enabled: Annotated[bool, about("Serve it.")] = False
    max_request_body_size: Annotated[Positive, about("Largest request body, in bytes.")] = 65536


class SSESettings(StreamSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Server-sent events: for clients whose WebSockets do not get through. Their commands come by [emulation]."""

    handler_prefix: Annotated[Prefix, about("Path at which clients connect.")] = "/connection/sse"


class HTTPStreamSettings(StreamSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A streamed HTTP response, for the same clients."""

    handler_prefix: Annotated[Prefix, about("Path at which clients connect.")] = "/connection/http_stream"


class UniSSESettings(StreamSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Server-sent events for clients without an SDK, on which only the server talks."""

    handler_prefix: Annotated[Prefix, about("Path at which clients connect.")] = "/connection/uni_sse"


class UniHTTPStreamSettings(StreamSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A streamed HTTP response for clients without an SDK, on which only the server talks."""

    handler_prefix: Annotated[Prefix, about("Path at which clients connect.")] = "/connection/uni_http_stream"


class EmulationSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The way from the client to the server for [sse] and [http_stream]; served when either is."""

    handler_prefix: Annotated[Prefix, about("Path to which clients post their commands.")] = "/emulation"
    max_request_body_size: Annotated[Positive, about("Largest request body, in bytes.")] = 65536


class InitSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """A small answer by which a load balancer sets its cookie before a client connects."""

    enabled: Annotated[bool, about("Serve it.")] = False
    handler_prefix: Annotated[Prefix, about("Path of the answer.")] = "/connection/init"


class WorkersSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The worker processes, each with its own reactor."""

    count: Annotated[
        int, Meta(ge=0, le=1024), about("Worker processes; 0: one for each core that this server may use.")
    ] = 0
    threads: Annotated[
        int, Meta(ge=1, le=1024), about("Threads of each worker that run plain functions of the app.")
    ] = 16
    thread_queue: Annotated[Count, about("Calls of one worker that may wait for a thread.")] = 1000
    processes: Annotated[
        int,
        Meta(ge=0, le=1024),
        about('Processes of each worker for handlers with run="process"; 0: its share of cores.'),
    ] = 0
    process_queue: Annotated[Count, about("Calls of one worker that may wait for such a process.")] = 100
    io_uring: Annotated[
        bool, about("Fan-out sends many deliveries in one system call, where the kernel has io_uring and allows it.")
    ] = True
    handler_timeout: Annotated[Seconds, about("Time for a handler to finish; 0: no limit.")] = 10.0
    restart_delay: Annotated[Seconds, about("Delay before a dead worker is replaced; doubles with each death.")] = 0.1
    restart_delay_max: Annotated[Seconds, about("Longest such delay.")] = 30.0
    restart_reset: Annotated[Seconds, about("A worker that lived this long is replaced without a long delay.")] = 60.0
    start_timeout: Annotated[Deadline, about("Time for a worker to load the app and be ready.")] = 30.0

    RULES: ClassVar = (
        Rule(
            ("restart_delay", "restart_delay_max"),
            lambda workers: workers.restart_delay <= workers.restart_delay_max,
            "{0} must not be longer than workers.restart_delay_max, {1}; shorten it or lengthen that",
        ),
    )


class LoopSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The health of the workers' event loops."""

    interval: Annotated[float, Meta(ge=0.001), about("Time between two beats of a worker's loop.")] = 0.04
    lagging: Annotated[
        Seconds, about("A worker whose loop is this late is lagging: what blocks it is found out; 0: never.")
    ] = 0.05
    steering: Annotated[
        bool, about("Workers get new clients by health and load; false: the kernel spreads them evenly.")
    ] = True
    rescue: Annotated[bool, about("New clients that wait for a worker that can't take them are handed to another.")] = (
        True
    )
    slice: Annotated[
        float, Meta(ge=0.0005), about("Time for which work of the server itself keeps a loop before others get a turn.")
    ] = 0.005
    stuck: Annotated[
        Seconds, about("A worker whose loop has not beaten for this long is killed and replaced; 0: never.")
    ] = 10.0
    max_lag: Annotated[
        Seconds,
        about(
            "A worker whose loop is this late is under pressure: other workers take its new clients, and it sheds"
            " load; 0: never."
        ),
    ] = 0.2
    max_utilization: Annotated[
        float,
        Meta(ge=0, le=1),
        about("Share of time at work from which a loop is warned of, and nothing refused; 0: off."),
    ] = 0.0
    max_rss: Annotated[
        Count, about("Resident bytes at which a worker refuses likewise, and is drained and replaced; 0: off.")
    ] = 0
    # A quarter of a gigabyte of frames is a thousand slow clients with a quarter of client.queue_max_size each.
    max_queued_bytes: Annotated[
        Count, about("Bytes waiting for slow clients, together, at which a worker refuses likewise; 0: off.")
    ] = 256 * 1024 * 1024
    # Half of workers.thread_queue: calls at the end of such a queue hardly finish in time, and more would be refused.
    max_threads_waiting: Annotated[
        Count, about("Calls waiting for a thread at which a worker refuses likewise; 0: off.")
    ] = 500

    RULES: ClassVar = (
        Rule(
            ("stuck", "interval"),
            lambda loop: loop.stuck == 0 or loop.stuck > loop.interval,
            "{0} must be longer than loop.interval, {1}; lengthen it or shorten that",
        ),
        Rule(
            ("max_lag", "lagging"),
            lambda loop: loop.max_lag == 0 or loop.max_lag >= loop.lagging,
            "{0} must not be shorter than loop.lagging, {1}; lengthen it or shorten that",
        ),
    )


class AppSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The application: your handlers."""

    module: Annotated[
        str,
        only('the place of an App, such as "chat:app"', _is_reference),
        about('Where the App is, as "package.module:attribute"; empty: no handlers.'),
    ] = ""
    path: Annotated[str, about("Folder that the module is looked for in first, relative to this file's folder.")] = ""
    options: Annotated[dict[str, object], about("The app's own settings, handed to it as they are.")] = field(
        default_factory=dict
    )


_PATHS = (
    *("http_api", "websocket", "sse", "http_stream", "emulation"),
    *("uni_websocket", "uni_sse", "uni_http_stream", "init"),
)


def _differ(one: str, other: str, tree: Settings) -> bool:
    return bool(getattr(tree, one).handler_prefix != getattr(tree, other).handler_prefix)


def _personal_namespace_exists(tree: Settings) -> bool:
    name = tree.client.subscribe_to_user_personal_channel.personal_channel_namespace
    return not name or any(namespace.name == name for namespace in tree.channel.namespaces)


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

    RULES: ClassVar = (
        Rule(
            ("client.queue_max_size", "websocket.message_size_limit"),
            lambda tree: tree.client.queue_max_size >= tree.websocket.message_size_limit,
            "{0} can't hold one message of websocket.message_size_limit, {1}; raise it or lower that",
        ),
        Rule(
            ("engine.queue_max_size", "websocket.message_size_limit"),
            lambda tree: tree.engine.queue_max_size >= tree.websocket.message_size_limit,
            "{0} can't hold one message of websocket.message_size_limit, {1}; raise it or lower that",
        ),
        *(
            Rule(
                (f"{one}.handler_prefix", f"{other}.handler_prefix"),
                functools.partial(_differ, one, other),
                f"is the path of {other}.handler_prefix, {{1}}, too; choose another",
            )
            for one, other in itertools.combinations(_PATHS, 2)
        ),
        Rule(
            ("client.subscribe_to_user_personal_channel.personal_channel_namespace",),
            _personal_namespace_exists,
            "no such namespace in channel.namespaces; add it there, or correct this",
        ),
    )


def history_options(options: ChannelOptions, default_meta_ttl: float) -> HistoryOptions:
    """The history that a channel with these options keeps."""
    return HistoryOptions(options.history_size, options.history_ttl, options.history_meta_ttl or default_meta_ttl)


def parse(arguments: Mapping[str, str], file: tuple[str, str] | None, environ: Mapping[str, str]) -> Settings:
    """The settings of three sources: no I/O, no clock.

    arguments: command-line values by dotted key. file: its name, for messages, and its text, or None. environ: all
    variables, of which only known ones are read; an empty one counts as unset.
    Raises SettingsError with every problem in it, one line each.
    """
    return _parse(arguments, file, environ, [])


def _parse(
    arguments: Mapping[str, str], file: tuple[str, str] | None, environ: Mapping[str, str], problems: list[str]
) -> Settings:
    reader = Reader(Settings, centrifugo_keys.explain)
    if file is not None:
        try:
            reader.take(*toml_lines.tables(*file))
        except SettingsError as error:
            problems = error.problems
    reader.take_environment(environ)
    reader.take_options(arguments)
    if problems:  # without the whole file, a contradiction could be only apparent
        raise SettingsError(problems + reader.problems)
    settings: Settings = reader.build()
    if reader.problems:
        raise SettingsError(reader.problems)
    return settings


def read(config: str | None, arguments: Mapping[str, str], environ: Mapping[str, str]) -> Settings:
    """The settings, with the file at `config` (None: no file) read, and `app.path` made absolute.

    Relative to the file's folder, or to the working directory where there is no file. Raises SettingsError.
    """
    file, problems = None, []
    if config is not None:
        try:
            file = one_line(config), _text(config)
        except SettingsError as error:
            problems = error.problems
    settings = _parse(arguments, file, environ, problems)
    if not settings.app.module:
        return settings
    folder = Path(config).parent if config is not None else Path()
    path = Path(os.path.abspath(folder / settings.app.path))
    if not path.is_dir():
        raise SettingsError([f"app.path: no folder at {path}; correct it, or make the folder"])
    return msgspec.structs.replace(settings, app=msgspec.structs.replace(settings.app, path=str(path)))


def _text(config: str) -> str:
    name = one_line(config)
    try:
        with open(config, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        remedy = {
            FileNotFoundError: "name a file that exists; realtime gen-config makes one",
            IsADirectoryError: "name the file in it",
            PermissionError: "let the user that runs the server read it",
        }.get(type(error), "name a readable file")
        raise SettingsError([f"{name}: can't be read: {error.strerror}; {remedy}"]) from None
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError([f"{name}: larger than 1 MiB; a configuration is smaller, so check the name"])
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise SettingsError([f"{name}:{line}: not UTF-8; save it as UTF-8"]) from None


def dump(settings: Settings) -> bytes:
    """The tree as bytes, secrets included, for a child process."""
    return msgspec.msgpack.encode(settings)


def load(data: bytes) -> Settings:
    """The tree that `dump` was given. Raises msgspec.ValidationError or DecodeError for anything else: our own bug."""
    return msgspec.msgpack.decode(data, type=Settings)
