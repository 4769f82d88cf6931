"""How one server is reached and entered: TCP or a unix socket, TLS, credentials, time limits."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from OpenSSL import crypto
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.endpoints import HostnameEndpoint, UNIXClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IStreamClientEndpoint
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.ssl import (
    Certificate,
    KeyPair,
    PrivateCertificate,
    optionsForClientTLS,
    platformTrust,
    trustRootFromCertificates,
)

from realtime.config.pem import read_pem
from realtime.config.redis_addresses import RedisAddress
from realtime.config.redis_settings import RedisSettings, RedisTLSSettings
from realtime.errors import SettingsError

CLIENT_NAME = "realtime"

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_KEY = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.+?-----END [A-Z ]*PRIVATE KEY-----", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAccess:
    """How to enter a server. tls: None without. tls_key: of the table, for messages. Times are seconds."""

    user: str
    password: str
    db: int
    client_name: str
    connect_timeout: float
    io_timeout: float
    tls: RedisTLSSettings | None
    tls_key: str = "engine.redis.tls"

    @classmethod
    def to_server(cls, address: RedisAddress, settings: RedisSettings) -> RedisAccess:
        """Return the access to a server of an address, whose own values win over those of the settings."""
        has_credentials = bool(address.user or address.password)
        return cls(
            user=address.user if has_credentials else settings.user,
            password=address.password if has_credentials else settings.password,
            db=settings.db if address.db is None else address.db,
            client_name=settings.client_name or CLIENT_NAME,
            connect_timeout=address.connect_timeout or settings.connect_timeout,
            io_timeout=address.io_timeout or settings.io_timeout,
            tls=settings.tls if address.tls or settings.tls.enabled else None,
        )

    @classmethod
    def to_sentinel(cls, address: RedisAddress, settings: RedisSettings) -> RedisAccess:
        """Return the access to the Sentinels of an address."""
        return cls(
            user=address.sentinel_user or settings.sentinel_user,
            password=address.sentinel_password or settings.sentinel_password,
            db=0,
            client_name=settings.sentinel_client_name or settings.client_name or CLIENT_NAME,
            connect_timeout=address.connect_timeout or settings.connect_timeout,
            io_timeout=address.io_timeout or settings.io_timeout,
            tls=settings.sentinel_tls if address.sentinel_tls or settings.sentinel_tls.enabled else None,
            tls_key="engine.redis.sentinel_tls",
        )

    def __repr__(self) -> str:
        """Return no credentials."""
        return "RedisAccess(...)"

    @property
    def greeting(self) -> list[str | int]:
        """The command that selects RESP3 and enters the server."""
        words: list[str | int] = ["HELLO", 3]
        if self.user or self.password:
            words += ["AUTH", self.user or "default", self.password]
        return [*words, "SETNAME", self.client_name]


def format_host(host: str, port: int) -> str:
    """Return host and port as an address has them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class ConnectionFactory(Factory):
    """Makes one connection, and writes no log line about itself."""

    noisy = False

    def __init__(self, connection: Protocol) -> None:
        self._connection = connection

    def buildProtocol(self, address: object) -> Protocol:
        return self._connection


class FixedPlace:
    """The place of a server with an address of its own. See `ServerPlace`."""

    def __init__(self, reactor: Any, access: RedisAccess, host: str, port: int = 0) -> None:
        """host: or the path of a unix socket, which begins with /."""
        self.name = host if host.startswith("/") else format_host(host, port)
        self._reactor = reactor
        self._access = access
        self._host = host
        self._port = port

    def connect(self, factory: Factory) -> Deferred[Any]:
        """Connect within the time limit. Fails with SettingsError for unreadable certificates."""
        # The endpoint has the same limit; this one is for exceptions while the connection is made.
        return maybeDeferred(self._connect, factory).addTimeout(2 * self._access.connect_timeout, self._reactor)

    def _connect(self, factory: Factory) -> Deferred[Any]:
        access = self._access
        plain: IStreamClientEndpoint
        if self._host.startswith("/"):
            plain, host = UNIXClientEndpoint(self._reactor, self._host, timeout=access.connect_timeout), "localhost"
        else:
            host = self._host
            plain = HostnameEndpoint(self._reactor, host, self._port, timeout=access.connect_timeout)
        # The files of certificates are read now, so a renewed one counts from the next connection on.
        endpoint = plain if access.tls is None else _encrypted(plain, host, access.tls, access.tls_key)
        return endpoint.connect(factory)


def _encrypted(plain: IStreamClientEndpoint, host: str, tls: RedisTLSSettings, table: str) -> IStreamClientEndpoint:
    """Return an endpoint with TLS that checks the server's certificate."""
    trust = platformTrust()
    if tls.server_ca_pem:
        found = _CERTIFICATE.findall(read_pem(f"{table}.server_ca_pem", tls.server_ca_pem))
        trust = trustRootFromCertificates([_certificate(f"{table}.server_ca_pem", pem) for pem in found])
    own: PrivateCertificate | None = None
    chain: list[Any] = []
    if tls.cert_pem:
        own, chain = _own_certificate(tls, table)
    options = optionsForClientTLS(
        tls.server_name or host, trust, own, extraCertificateOptions={"extraCertChain": chain} if chain else None
    )
    return wrapClientTLS(options, plain)


def _certificate(key: str, pem: bytes) -> Certificate:
    try:
        return Certificate.loadPEM(pem)
    except crypto.Error:
        raise SettingsError([f"{key}: not a certificate; correct it"]) from None


def _own_certificate(tls: RedisTLSSettings, table: str) -> tuple[PrivateCertificate, list[Any]]:
    """Return our certificate with its key, and the certificates between it and the authority's."""
    pems = _CERTIFICATE.findall(read_pem(f"{table}.cert_pem", tls.cert_pem))
    if not pems:
        raise SettingsError([f"{table}.cert_pem: no certificate in it; correct it"])
    own, *chain = [_certificate(f"{table}.cert_pem", pem) for pem in pems]
    key = _KEY.search(read_pem(f"{table}.key_pem", tls.key_pem))
    try:
        pair = KeyPair.load((key[0] if key else b""), crypto.FILETYPE_PEM)
        return PrivateCertificate.fromCertificateAndKeyPair(own, pair), [each.original for each in chain]
    except Exception:  # of several kinds, by the fault
        raise SettingsError([f"{table}.key_pem: not the private key of cert_pem; correct it"]) from None
