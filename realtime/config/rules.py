"""Rules between several settings: `RULES` has those of each table. A violation ends the start with its message.

Checks of single values are annotations of the keys (`realtime.config.settings`, `realtime.config.checks`); values that
are allowed but risky are in `realtime.config.warnings`.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Sequence
from urllib.parse import urlsplit

from realtime.config.checks import PLACEHOLDER, listed_groups
from realtime.config.reader import Rule, Rules
from realtime.config.redis_addresses import RedisAddress
from realtime.config.redis_settings import addresses_in_use
from realtime.config.settings import (
    ChannelOptions,
    ChannelSettings,
    ClientSettings,
    EngineSettings,
    HTTPServerSettings,
    LoopSettings,
    RedisSettings,
    RedisTLSSettings,
    Settings,
    TokenSettings,
    WorkersSettings,
)

_HTTP_SERVER: tuple[Rule[HTTPServerSettings], ...] = (
    Rule(
        ("internal_port", "port"),
        lambda server: server.port == 0 or server.port != server.internal_port,
        "the port for operators must differ from http_server.port, {1}; choose another port",
    ),
)


def _uses_listed_groups(token: TokenSettings) -> bool:
    """Whether only listed texts get into the key set's address, so that authors of tokens can't choose the server."""
    listed = listed_groups(token.audience_regex) | listed_groups(token.issuer_regex)
    unresolved = PLACEHOLDER.sub(lambda found: "" if found[1] in listed else "{", token.jwks_public_endpoint)
    return not {"{", "}"} & set(unresolved)


def _is_encrypted_or_allowed(token: TokenSettings) -> bool:
    """Whether the key set's address is https, or its host may be asked over http."""
    url = urlsplit(token.jwks_public_endpoint)
    return url.scheme != "http" or token.jwks_allow_insecure or url.hostname in token.jwks_allowed_hosts


def _is_not_pem(key: str, token: TokenSettings) -> bool:
    return not str(getattr(token, key)).lstrip().startswith("-----BEGIN")


_TOKEN: tuple[Rule[TokenSettings], ...] = (
    Rule(
        ("hmac_previous_secret_key", "hmac_secret_key"),
        lambda token: token.hmac_secret_key or not token.hmac_previous_secret_key,
        "needs hmac_secret_key in the same table; set hmac_secret_key, or remove this key",
    ),
    *(
        Rule(
            (key,),
            functools.partial(_is_not_pem, key),
            "is a PEM key: anyone who has this public key could forge tokens; use a random secret",
        )
        for key in ("hmac_secret_key", "hmac_previous_secret_key")
    ),
    Rule(
        ("jwks_public_endpoint", "jwks_allow_insecure", "jwks_allowed_hosts"),
        _is_encrypted_or_allowed,
        "without encryption, anyone on the network path can insert keys; use https, or add the host to"
        " jwks_allowed_hosts if the path is your own network",
    ),
    Rule(
        ("jwks_public_endpoint", "audience_regex", "issuer_regex"),
        _uses_listed_groups,
        "{{{{name}}}} must be a named group of audience_regex or issuer_regex that lists its texts, such as"
        " (?P<name>acme|globex); correct the address or the pattern",
    ),
    Rule(
        ("audience_regex", "audience"),
        lambda token: not (token.audience and token.audience_regex),
        "audience is set too; remove one of the two",
    ),
    Rule(
        ("issuer_regex", "issuer"),
        lambda token: not (token.issuer and token.issuer_regex),
        "issuer is set too; remove one of the two",
    ),
)

_CLIENT: tuple[Rule[ClientSettings], ...] = (
    Rule(
        ("pong_timeout", "ping_interval"),
        lambda client: client.ping_interval == 0 or client.pong_timeout < client.ping_interval,
        "{0} must be shorter than client.ping_interval, {1}; shorten the timeout or lengthen the interval",
    ),
    Rule(
        ("subscribe_to_user_personal_channel.single_connection", "subscribe_to_user_personal_channel.enabled"),
        lambda client: (
            client.subscribe_to_user_personal_channel.enabled
            or not client.subscribe_to_user_personal_channel.single_connection
        ),
        "single_connection needs enabled = true in the same table; set enabled, or remove this key",
    ),
)


def _has_history(options: ChannelOptions) -> bool:
    return options.history_size > 0 and options.history_ttl > 0


_CHANNEL_OPTIONS: tuple[Rule[ChannelOptions], ...] = (
    Rule(
        ("history_size", "history_ttl"),
        lambda options: options.history_size == 0 or options.history_ttl > 0,
        'history_size without history_ttl keeps nothing; set history_ttl, such as "300s", or remove this key',
    ),
    Rule(
        ("history_ttl", "history_size"),
        lambda options: options.history_ttl == 0 or options.history_size > 0,
        "history_ttl without history_size keeps nothing; set history_size, such as 100, or remove this key",
    ),
    Rule(
        ("history_meta_ttl", "history_ttl"),
        lambda options: options.history_meta_ttl == 0 or options.history_meta_ttl >= options.history_ttl,
        "{0} must not be shorter than history_ttl, {1}; lengthen history_meta_ttl or shorten history_ttl",
    ),
    Rule(
        ("force_recovery", "history_size", "history_ttl"),
        lambda options: not options.force_recovery or _has_history(options),
        "force_recovery needs history; set history_size and history_ttl, or remove this key",
    ),
    Rule(
        ("auto_cache_recover", "force_recovery", "force_recovery_mode"),
        lambda options: (
            not options.auto_cache_recover or (options.force_recovery and options.force_recovery_mode == "cache")
        ),
        'needs force_recovery = true and force_recovery_mode = "cache" in the same table; set both, or remove this key',
    ),
)


def _numbering_outlives_history(channel: ChannelSettings) -> bool:
    """Whether every channel's offsets are remembered at least as long as its publications."""
    return all(
        options.history_meta_ttl or channel.history_meta_ttl >= options.history_ttl
        for options in (channel.without_namespace, *channel.namespaces)
    )


_CHANNEL: tuple[Rule[ChannelSettings], ...] = (
    Rule(
        ("history_meta_ttl",),
        _numbering_outlives_history,
        "{0} must not be shorter than the history_ttl of any namespace; lengthen it",
    ),
)

_WORKERS: tuple[Rule[WorkersSettings], ...] = (
    Rule(
        ("restart_delay", "restart_delay_max"),
        lambda workers: workers.restart_delay <= workers.restart_delay_max,
        "{0} must not be longer than workers.restart_delay_max, {1}; shorten the delay or lengthen its maximum",
    ),
)

_LOOP: tuple[Rule[LoopSettings], ...] = (
    Rule(
        ("stuck", "interval"),
        lambda loop: loop.stuck == 0 or loop.stuck > loop.interval,
        "{0} must be longer than loop.interval, {1}; lengthen loop.stuck or shorten loop.interval",
    ),
    Rule(
        ("max_lag", "lagging"),
        lambda loop: loop.max_lag == 0 or loop.max_lag >= loop.lagging,
        "{0} must not be shorter than loop.lagging, {1}; lengthen loop.max_lag or shorten loop.lagging",
    ),
)

_ENGINE: tuple[Rule[EngineSettings], ...] = (
    Rule(
        ("type",),
        lambda engine: engine.type != "redis" or importlib.util.find_spec("hiredis") is not None,
        "{0} needs the library hiredis; install it with: pip install 'twisted-realtime[redis]'",
    ),
)


def _name_masters(redis: RedisSettings) -> bool:
    return all(
        address.sentinel_master_name or redis.sentinel_master_name
        for address in addresses_in_use(redis)
        if address.topology == "sentinel"
    )


def _name_different_servers(addresses: Sequence[RedisAddress]) -> bool:
    return len({(address.name, address.sentinel_master_name) for address in addresses}) == len(addresses)


_REDIS: tuple[Rule[RedisSettings], ...] = (
    Rule(
        ("sentinel_master_name", "address", "sentinel_address", "cluster_address"),
        _name_masters,
        "Sentinels need the name of the server that they watch; set it as in their `sentinel monitor NAME ...`",
    ),
    Rule(
        ("address", "sentinel_address", "cluster_address"),
        lambda redis: _name_different_servers(addresses_in_use(redis)),
        "two entries name the same server; remove one, or name another server",
    ),
    Rule(
        ("db", "address", "sentinel_address", "cluster_address"),
        lambda redis: redis.db == 0 or all(address.topology != "cluster" for address in addresses_in_use(redis)),
        "a Cluster has the database 0 only; remove this key, and choose another prefix instead",
    ),
)

_REDIS_TLS: tuple[Rule[RedisTLSSettings], ...] = (
    Rule(
        ("cert_pem", "key_pem"),
        lambda tls: bool(tls.cert_pem) == bool(tls.key_pem),
        "cert_pem and key_pem belong together; set both, or remove both",
    ),
)

# The tables with a path of their own, below the one port for clients.
TABLES_WITH_PATHS = (
    *("http_api", "websocket", "sse", "http_stream", "emulation"),
    *("uni_websocket", "uni_sse", "uni_http_stream", "init"),
)


def _have_different_paths(table: str, other: str, tree: Settings) -> bool:
    return bool(getattr(tree, table).handler_prefix != getattr(tree, other).handler_prefix)


def _personal_namespace_exists(tree: Settings) -> bool:
    name = tree.client.subscribe_to_user_personal_channel.personal_channel_namespace
    return not name or any(namespace.name == name for namespace in tree.channel.namespaces)


_ROOT: tuple[Rule[Settings], ...] = (
    Rule(
        ("client.queue_max_size", "websocket.message_size_limit"),
        lambda tree: tree.client.queue_max_size >= tree.websocket.message_size_limit,
        "{0} is too small for one message of websocket.message_size_limit, {1}; raise the queue size or lower the"
        " message size",
    ),
    Rule(
        ("engine.queue_max_size", "websocket.message_size_limit"),
        lambda tree: tree.engine.queue_max_size >= tree.websocket.message_size_limit,
        "{0} is too small for one message of websocket.message_size_limit, {1}; raise the queue size or lower the"
        " message size",
    ),
    Rule(
        ("engine.memory.queue_size", "websocket.message_size_limit"),
        lambda tree: (
            not tree.engine.memory.path or tree.engine.memory.queue_size >= 4 * tree.websocket.message_size_limit
        ),
        "{0} is too small for a publication of websocket.message_size_limit, {1}, which may fill a quarter of it; raise"
        " the queue size or lower the message size",
    ),
    *(
        Rule(
            (f"{table}.handler_prefix", f"{other}.handler_prefix"),
            functools.partial(_have_different_paths, table, other),
            f"{other}.handler_prefix has the same path, {{1}}; choose another",
        )
        for table, other in itertools.combinations(TABLES_WITH_PATHS, 2)
    ),
    Rule(
        ("client.subscribe_to_user_personal_channel.personal_channel_namespace",),
        _personal_namespace_exists,
        "channel.namespaces has no namespace {0}; add it there, or correct this key",
    ),
)

RULES: Rules = {
    HTTPServerSettings: _HTTP_SERVER,
    TokenSettings: _TOKEN,
    ClientSettings: _CLIENT,
    ChannelOptions: _CHANNEL_OPTIONS,
    ChannelSettings: _CHANNEL,
    WorkersSettings: _WORKERS,
    LoopSettings: _LOOP,
    EngineSettings: _ENGINE,
    RedisSettings: _REDIS,
    RedisTLSSettings: _REDIS_TLS,
    Settings: _ROOT,
}
