"""Limits for new connections over all transports of a worker, and the HTTP response that refuses a connection."""

from __future__ import annotations

import random
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from realtime.client_log import ClientLog
from realtime.config import settings
from realtime.http.forwarded import TrustedProxies
from realtime.http.handshake import origin_policy
from realtime.http.hosts import HostNames
from realtime.http.request import Refusal, RequestHead
from realtime.http.response import encode_response
from realtime.metrics import Metrics

# Range in seconds of Retry-After, random so that refused clients do not all come back at the same time.
_RETRY_AFTER = (3, 10)
# Descriptors that connections of clients may not use: this share of the limit, plus this number.
_RESERVED_DESCRIPTORS = 0.1, 32
# One token of the bucket, reduced by the rounding errors of repeated additions.
_ONE_TOKEN = 1 - 1e-6


class Admission:
    """The connection limits of a worker, shared by all its transports.

    origin_allowed: whether a request's origin may open connections. proxies: the trusted proxies. client_log: counts
    and logs the refusals.
    """

    def __init__(
        self,
        client: settings.ClientSettings,
        metrics: Metrics,
        clock: Callable[[], float],
        check_load: Callable[[], Refusal | None] = lambda: None,
        workers: int = 1,
        descriptors: int = 0,
        own_names: HostNames | None = None,
        client_log: ClientLog | None = None,
    ) -> None:
        """clock: monotonic, in seconds. check_load: returns a refusal while the worker accepts no connection.

        workers: number of workers that share the limits of `client`. Each gets an equal part; that of the connection
        limit is rounded up. descriptors: the worker's limit of open descriptors, 0 for none. Connections stay below it,
        because at the limit itself the worker could not accept a connection to refuse it. own_names: names of this
        server; pages must use one of them if clients need no token and no origins are configured.
        """
        is_open = client.insecure or client.allow_anonymous_connect_without_token
        self.origin_allowed = origin_policy(client.allowed_origins, own_names if is_open else None)
        self.proxies = TrustedProxies(client.trusted_proxies)
        self.client_log = client_log or ClientLog(metrics)
        self._connection_counts: list[Callable[[], int]] = []
        self._room = 0  # further connections that need no count: connections end, but none begins without `make_room`
        share, spare = _RESERVED_DESCRIPTORS
        limits = (-(-client.connection_limit // workers), max(descriptors - int(descriptors * share) - spare, 0))
        self._limit = min(filter(None, limits), default=0)
        self._descriptors = limits[1]
        self._count_others: Callable[[], int] = lambda: 0
        self._drop_idle: Callable[[], bool] = lambda: False
        self._address_limit = client.connection_limit_per_address
        self._addresses: dict[str, int] = {}  # connections by the address of their client
        self._rate = client.connection_rate_limit / workers
        self._burst = max(self._rate, 1.0)  # size of the token bucket: the connections of one second, at least one
        self._tokens = self._burst
        self._refilled_at = clock()
        self._clock = clock
        self._check_load = check_load
        metrics.gauge("realtime_connections", "Connections of clients that are open", lambda: self.connections)

    def add_transport(self, count_connections: Callable[[], int]) -> None:
        """Include the connections of a transport. count_connections: returns the number of its open connections."""
        self._connection_counts.append(count_connections)

    def add_idle(self, count: Callable[[], int], drop_oldest: Callable[[], bool]) -> None:
        """Include connections that are no client's yet, and HTTP connections, in the limit of all connections.

        They are refused to none: the longest idle one is closed instead. count: returns their number. drop_oldest:
        closes the longest idle one; returns False if none is idle.
        """
        self._count_others = count
        self._drop_idle = drop_oldest

    def make_room(self) -> None:
        """Close the longest idle HTTP connection if there are more connections than the limit."""
        self._room -= 1
        if self._room < 0 < self._limit:
            self._room = self._limit - self.connections - self._count_others()
            if self._room < 0:
                self._drop_idle()

    def take_address(self, head: RequestHead, transport: Any) -> tuple[str, Refusal | None]:
        """Count a connection of the client that sent `head`; return its address, or "" and a refusal at the limit.

        The address is "" too while there is no limit for an address.
        """
        if not self._address_limit:
            return "", None
        address = self.client_address(head, transport.getPeer().host)
        count = self._addresses.get(address, 0)
        if count >= self._address_limit:
            return "", Refusal(503, "too many connections of this address", "connection_limit_per_address")
        self._addresses[address] = count + 1
        return address, None

    def has_descriptors_for(self, connections: int) -> bool:
        """Whether the process has descriptors for so many further connections, which it takes over from another one."""
        return not self._descriptors or self.connections + self._count_others() + connections <= self._descriptors

    def take_over(self, address: str) -> Callable[[], None] | None:
        """Count a connection of this client, taken over from another process, which has admitted it.

        Returns the function that counts one less, if connections of each address are counted.
        """
        self._room = 0
        if not self._address_limit:
            return None
        self._addresses[address] = self._addresses.get(address, 0) + 1
        return lambda: self.release_address(address)

    def release_address(self, address: str) -> None:
        """Count one connection less of a client's address."""
        count = self._addresses.pop(address, 1) - 1
        if count:
            self._addresses[address] = count

    @property
    def connections(self) -> int:
        """Number of open connections over all transports."""
        return sum(count() for count in self._connection_counts)

    def check(self) -> Refusal | None:
        """Check whether one more connection may be opened; return None, and count it towards the rate, if so."""
        refusal = self._check_load()
        if refusal is not None:
            return refusal
        if self._room <= 0 < self._limit <= self.connections:
            return Refusal(503, "too many connections", "connection_limit")
        return None if self._take_token() else Refusal(503, "too many new connections", "connection_rate")

    def client_address(self, head: RequestHead, peer: str) -> str:
        """Return the client's own address. peer: address of the connection, possibly that of a proxy."""
        return self.proxies.client_address(peer, head.get_all("x-forwarded-for"))

    def _take_token(self) -> bool:
        """Take a token from the bucket, which the rate refills; return False if it is empty."""
        if not self._rate:
            return True
        now = self._clock()
        self._tokens = min(self._tokens + (now - self._refilled_at) * self._rate, self._burst)
        self._refilled_at = now
        if self._tokens < _ONE_TOKEN:
            return False
        self._tokens -= 1
        return True


def refusal_response(refusal: Refusal) -> bytes:
    """Build the complete HTTP response for a refusal."""
    headers = refusal.headers
    if refusal.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers = (*headers, ("Retry-After", str(random.randint(*_RETRY_AFTER))))
    body = refusal.reason.encode() + b"\n"
    return encode_response(refusal.status, "text/plain; charset=utf-8", headers, body, close=True)
