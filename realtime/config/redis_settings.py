"""The settings of the tables below [engine.redis]."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, field

from realtime.config import checks
from realtime.config.annotations import NonNegative, PositiveSeconds, Secret, about, restricted
from realtime.config.redis_addresses import (
    ADDRESSES,
    CLUSTERS,
    SENTINELS,
    RedisAddress,
    parse_address,
    parse_list,
)


class RedisTLSSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """TLS towards Redis. A certificate or key is PEM text, base64 of it, or the path of a file."""

    enabled: Annotated[bool, about("Connections use TLS. rediss:// in an address enables it, too.")] = False
    server_ca_pem: Annotated[
        str, about("Certificate of the authority behind the server's certificate. Empty: the system's authorities.")
    ] = ""
    server_name: Annotated[
        str, about("Name that the server's certificate must have. Empty: the host of the address.")
    ] = ""
    cert_pem: Annotated[str, about("Certificate of this server, for a Redis that asks for one. Empty: none.")] = ""
    key_pem: Annotated[Secret, about("Private key of cert_pem.")] = ""

    def __repr__(self) -> str:
        """Return no values: the key must not get into logs."""
        return f"{type(self).__name__}(...)"


class RedisSettings(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Redis or Valkey, for engine.type = "redis"."""

    prefix: Annotated[
        str,
        restricted(
            'a name of letters, digits and . _ - :, such as "realtime"',
            checks.is_key_prefix,
        ),
        about("Beginning of the names of all keys and channels in Redis. It keeps installations apart."),
    ] = "realtime"
    address: Annotated[
        tuple[str, ...],
        Meta(min_length=1, extra={"value_type": ADDRESSES, "secret": True}),
        about(
            "Address of the server: host:port, redis://user:password@host:port/database, rediss:// with TLS, or"
            " unix:///path. Several entries are shards: each has a part of the channels."
        ),
    ] = ("redis://127.0.0.1:6379",)
    cluster_address: Annotated[
        tuple[str, ...],
        Meta(extra={"value_type": CLUSTERS}),
        about('Some nodes of a Cluster, as one entry "host:port,host:port". It wins over address.'),
    ] = ()
    sentinel_address: Annotated[
        tuple[str, ...],
        Meta(extra={"value_type": SENTINELS}),
        about('Sentinels, as one entry "host:port,host:port", which name the server. It wins over address.'),
    ] = ()
    sentinel_master_name: Annotated[str, about("Name of the server at the Sentinels.")] = ""
    sentinel_user: Annotated[str, about("User at the Sentinels. Empty: the default user.")] = ""
    sentinel_password: Annotated[Secret, about("Password at the Sentinels. Empty: none.")] = ""
    sentinel_client_name: Annotated[
        str,
        restricted("a name without spaces", checks.is_without_spaces),
        about("Name of the connections to the Sentinels, for CLIENT LIST. Empty: client_name."),
    ] = ""
    user: Annotated[str, about("User of the access control list. Empty: the default user.")] = ""
    password: Annotated[Secret, about("Password of the user. Empty: none. Credentials in an address win.")] = ""
    client_name: Annotated[
        str,
        restricted("a name without spaces", checks.is_without_spaces),
        about('Name of the connections, for CLIENT LIST. Empty: "realtime".'),
    ] = ""
    db: Annotated[
        NonNegative,
        about("Number of the database. Messages have no database, so only the prefix keeps installations apart."),
    ] = 0
    connect_timeout: Annotated[PositiveSeconds, about("Time limit for a connection to a server.")] = 1.0
    io_timeout: Annotated[
        PositiveSeconds, about("Time limit for a server's answer. A late answer ends the connection.")
    ] = 4.0
    presence_ttl: Annotated[
        PositiveSeconds, about("Time after which the presence of a node that does not renew it ends.")
    ] = 60.0
    strict_epoch: Annotated[
        bool,
        about(
            "Each channel starts a new epoch when the server may have lost publications: after its restart or a"
            " failover. false: only for one server without replicas, with appendfsync always."
        ),
    ] = True
    tls: RedisTLSSettings = field(default_factory=RedisTLSSettings)
    sentinel_tls: RedisTLSSettings = field(default_factory=RedisTLSSettings)

    def __repr__(self) -> str:
        """Return no values: credentials must not get into logs."""
        return f"{type(self).__name__}(...)"


def addresses_in_use(redis: RedisSettings) -> tuple[RedisAddress, ...]:
    """Return the addresses of the shards, in the order of their entries."""
    if redis.cluster_address:
        return tuple(parse_list(text, "cluster") for text in redis.cluster_address)
    if redis.sentinel_address:
        return tuple(parse_list(text, "sentinel") for text in redis.sentinel_address)
    return tuple(parse_address(text) for text in redis.address)
