"""Addresses of Redis servers, in all forms of Centrifugo's `engine.redis` table.

* `host:port`, `redis://`, `tcp://` and with TLS `rediss://[user[:password]@]host:port[/database]`: one server
* `unix://[user:password@]/path`: one server on this machine
* `redis+sentinel://` and `rediss+sentinel://host:port?sentinel_master_name=name`: the master that Sentinels name
* `redis+cluster://` and `rediss+cluster://host:port`: a Cluster, of which some nodes are named

A query has further settings, such as `?addr=host:port` for each further Sentinel or node. In `cluster_address` and
`sentinel_address` an entry is a list, `host:port,host:port`. This module does no I/O.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote

from msgspec import Struct

from realtime.config import values
from realtime.config.values import ValueRefused, ValueType, quote

Topology = Literal["server", "sentinel", "cluster"]

_SCHEMES: dict[str, tuple[Topology, bool]] = {  # and whether it means TLS
    "redis": ("server", False),
    "tcp": ("server", False),
    "rediss": ("server", True),
    "unix": ("server", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_SENTINEL_ONLY = ("sentinel_master_name", "sentinel_user", "sentinel_password", "sentinel_tls_enabled")
_UNSUPPORTED = ("force_resp2", "replica_client_enabled")
_HOST = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?")


class RedisAddress(Struct, frozen=True, kw_only=True):
    """One address: of a server, of a set of Sentinels, or of a Cluster.

    hosts: (host, port) of the server, of Sentinels, or of nodes; empty with the `path` of a unix socket. Each other
    field that is None or "" has the value of the key of its name in engine.redis. Times are seconds.
    """

    topology: Topology
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    tls: bool = False
    user: str = ""
    password: str = ""
    db: int | None = None
    connect_timeout: float | None = None
    io_timeout: float | None = None
    sentinel_master_name: str = ""
    sentinel_user: str = ""
    sentinel_password: str = ""
    sentinel_tls: bool = False

    def __repr__(self) -> str:
        """Return no credentials."""
        return f"RedisAddress({self.name})"

    @property
    def name(self) -> str:
        """The address without credentials, for log lines."""
        return self.path or ",".join(
            f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts
        )


def parse_address(text: str) -> RedisAddress:
    """Parse an entry of `address`. Raises ValueRefused with the problem and its remedy, without credentials."""
    scheme, separator, _ = text.partition("://")
    if not separator:
        return RedisAddress(topology="server", hosts=(_host_and_port(text),))
    if scheme not in _SCHEMES:
        raise ValueRefused(f"no address begins with {quote(scheme + '://')}; use {', '.join(_SCHEMES)}, or host:port")
    topology, tls = _SCHEMES[scheme]
    if not text.isprintable() or " " in text:
        raise ValueRefused("a space or a control character in an address; write it as %20 and the like")
    place, _, query = text[len(scheme) + 3 :].partition("?")
    credentials, _, location = place.rpartition("@")
    user, _, password = credentials.partition(":")
    fields: dict[str, Any] = {"tls": tls, "user": unquote(user), "password": unquote(password)}
    if scheme == "unix":
        if not location.startswith("/"):
            raise ValueRefused("the path of a unix socket begins with /; write unix:///run/redis/redis.sock")
        fields["path"] = unquote(location)
    else:
        host, slash, db = location.partition("/")
        fields["hosts"] = (_host_and_port(host),)
        if slash:
            fields["db"] = _database(db, topology)
    fields |= _query_fields(query, topology, fields.get("hosts", ()))
    return RedisAddress(topology=topology, **fields)


def parse_list(text: str, topology: Topology) -> RedisAddress:
    """Parse an entry of `cluster_address` or `sentinel_address`, host:port,host:port. Raises ValueRefused."""
    return RedisAddress(topology=topology, hosts=tuple(_host_and_port(part) for part in text.split(",")))


def _host_and_port(text: str) -> tuple[str, int]:
    host, separator, port = text.rpartition(":")
    if not separator or "]" in port:
        raise ValueRefused("an address without a port; write host:6379")
    if not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
        raise ValueRefused("the port of an address is not a number from 1 to 65535; write host:6379")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if not re.fullmatch(r"[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(%[A-Za-z0-9]+)?", host):
            raise ValueRefused("brackets around something other than an IPv6 address; write [::1]:6379")
    elif ":" in host:
        raise ValueRefused("more than one colon in an address; write an IPv6 address in brackets, [::1]:6379")
    elif not _HOST.fullmatch(host):
        raise ValueRefused("no host name or IP address before the port; write host:6379")
    return host, int(port)


def _database(text: str, topology: Topology) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 6):
        raise ValueRefused("no number of a database behind the / of an address; write it, or remove the /")
    if topology == "cluster" and int(text):
        raise ValueRefused("a Cluster has the database 0 only; remove the / and the number")
    return int(text)


def _query_fields(query: str, topology: Topology, hosts: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    """Return the fields that a query sets."""
    fields: dict[str, Any] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        if name == "addr":
            if topology == "server":
                raise ValueRefused("addr in the address of one server; use redis+sentinel:// or redis+cluster://")
            hosts = (*hosts, _host_and_port(text))
            fields["hosts"] = hosts
        elif name in _UNSUPPORTED:
            raise ValueRefused(f"{name}: a parameter of Centrifugo that realtime does not support; remove it")
        elif name not in _PARAMETERS:
            [closest] = difflib.get_close_matches(name, _PARAMETERS, 1) or [""]
            remedy = f"did you mean {closest}? Correct or remove it" if closest else "remove it"
            raise ValueRefused(f"unknown parameter {quote(name)} of an address; {remedy}")
        elif name in _SENTINEL_ONLY and topology != "sentinel":
            raise ValueRefused(f"{name} in an address without Sentinels; use redis+sentinel://, or remove it")
        else:
            field, read, expected = _PARAMETERS[name]
            try:
                fields[field] = read(text)
            except ValueError:
                raise ValueRefused(f"{name} of an address: expected {expected}; correct it") from None
    if fields.get("tls") is False:
        del fields["tls"]  # rediss:// stands
    return fields


def _positive_seconds(text: str) -> float:
    seconds = values.parse_duration(text)
    if seconds <= 0:
        raise ValueError("not above 0")
    return seconds


# Each parameter of a query: its field, how its value is read, and the values that it takes.
_PARAMETERS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "connect_timeout": ("connect_timeout", _positive_seconds, 'a duration above 0, such as "1s"'),
    "io_timeout": ("io_timeout", _positive_seconds, 'a duration above 0, such as "4s"'),
    "tls_enabled": ("tls", values.BOOLEAN.from_text, values.BOOLEAN.expected),
    "sentinel_master_name": ("sentinel_master_name", str, "a name"),
    "sentinel_user": ("sentinel_user", str, "a name"),
    "sentinel_password": ("sentinel_password", str, "a password"),
    "sentinel_tls_enabled": ("sentinel_tls", values.BOOLEAN.from_text, values.BOOLEAN.expected),
}


def _checked(expected: str, parse: Callable[[str], RedisAddress]) -> ValueType:
    """Return the type of a list of addresses that `parse` reads."""

    def check(texts: Iterable[str]) -> tuple[str, ...]:
        found = tuple(texts)
        for text in found:
            parse(text)
        return found

    return ValueType(
        expected,
        lambda text: check(values.STRING_LIST.from_text(text)),
        lambda value: check(values.STRING_LIST.from_file(value)),
    )


ADDRESSES = _checked('a list of addresses, such as ["redis://127.0.0.1:6379"]', parse_address)
CLUSTERS = _checked(
    'a list of Clusters, such as ["10.0.0.1:6379,10.0.0.2:6379"]', lambda text: parse_list(text, "cluster")
)
SENTINELS = _checked(
    'a list of sets of Sentinels, such as ["10.0.0.1:26379,10.0.0.2:26379"]', lambda text: parse_list(text, "sentinel")
)
