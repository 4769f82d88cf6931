"""Fetches the key sets of identity providers over HTTP, for `realtime.auth.keys`.

The issuer of a token may choose among the configured addresses, so the answering server gets no influence beyond its
answer: no redirect is followed, connections go to public addresses only (to the very address that was checked, so that
a name can't change its meaning in between), and both the bytes and the seconds of an answer are limited.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any
from urllib.parse import SplitResult, urlsplit

from twisted.internet import error as errors
from twisted.internet.defer import CancelledError, Deferred, TimeoutError
from twisted.internet.endpoints import TCP4ClientEndpoint, TCP6ClientEndpoint, wrapClientTLS
from twisted.internet.interfaces import IProtocolFactory, IStreamClientEndpoint
from twisted.internet.protocol import Protocol, connectionDone
from twisted.internet.ssl import optionsForClientTLS
from twisted.logger import Logger
from twisted.protocols.policies import ProtocolWrapper, WrappingFactory
from twisted.python.failure import Failure
from twisted.web._newclient import RequestNotSent, RequestTransmissionFailed
from twisted.web.client import Agent, ResponseDone, ResponseFailed
from twisted.web.http import PotentialDataLoss
from twisted.web.http_headers import Headers
from twisted.web.iweb import IAgentEndpointFactory
from zope.interface import implementer

from realtime._version import __version__
from realtime.auth.keys import MAX_SET_BYTES, KeySets, VerificationKey, is_public, key_set
from realtime.auth.tokens import TokenVerifier
from realtime.config.settings import ClientSettings, TokenSettings
from realtime.errors import KeysUnavailable
from realtime.handlers.coroutines import start_future
from realtime.metrics import Metrics
from realtime.process.server_lock import ServerLock

# Seconds for one attempt, from the name to the last byte, and the number of attempts.
TIMEOUT = 1.0
ATTEMPTS = 2
# The most bytes that a server may send besides the key set: certificates and headers.
MAX_OVERHEAD_BYTES = 64 * 1024
# The most name lookups at a time. A name server that hangs blocks a thread for half a minute.
MAX_LOOKUPS = 4

# Failures of a request that are the server's or the network's.
_NETWORK_ERRORS = (
    *(OSError, TimeoutError, CancelledError, errors.ConnectError, errors.ConnectionClosed),
    *(RequestNotSent, RequestTransmissionFailed, ResponseFailed),
)

_log = Logger()


def make_verifier(
    settings: ClientSettings,
    reactor: Any,
    metrics: Metrics,
    wall_clock: Callable[[], float],
    lock: ServerLock | None = None,
) -> TokenVerifier:
    """Make the verifier of clients' tokens, from one token table of the configuration or from two.

    reactor: the application's, on the loop's own thread. lock: the server's.
    """

    def verifier(table: TokenSettings, subscriptions: TokenVerifier | None = None) -> TokenVerifier:
        fetcher = KeySetFetcher(
            reactor, metrics, allow_insecure=table.jwks_allow_insecure, allowed_hosts=table.jwks_allowed_hosts
        )

        async def fetch(endpoint: str) -> Mapping[str, VerificationKey]:
            if lock is not None and lock.is_relieving:
                await lock.back_on_loop()
            return await fetcher(endpoint)

        return TokenVerifier(table, wall_clock, KeySets(fetch, start_future, reactor.seconds), subscriptions, metrics)

    own = settings.subscription_token
    return verifier(settings.token, verifier(own) if own.enabled else None)


class KeySetFetcher:
    """Fetches the key set at an address: the `fetch` of a KeySets."""

    def __init__(
        self,
        reactor: Any,
        metrics: Metrics,
        *,
        allow_insecure: bool = False,
        allowed_hosts: Collection[str] = (),
        trust: Any = None,
    ) -> None:
        """allow_insecure: also fetch over http and from addresses that are not public. allowed_hosts: hosts for which
        the same holds. trust: the trusted certificates, see twisted.internet.ssl.optionsForClientTLS; None for those of
        the platform.
        """
        self._reactor = reactor
        self._allow_insecure = allow_insecure
        self._allowed_hosts = frozenset(allowed_hosts)
        self._trust = trust
        self._lookups = 0
        self._failing: set[str] = set()  # endpoints whose last fetch failed; the log names each once
        self._counters = {
            outcome: metrics.counter("realtime_key_set_fetches", "Attempts to have a key set.", outcome=outcome)
            for outcome in ("good", "failed")
        }

    async def __call__(self, endpoint: str) -> Mapping[str, VerificationKey]:
        """Return the keys at `endpoint` by their ids. Raises KeysUnavailable within ATTEMPTS times TIMEOUT."""
        url = urlsplit(endpoint)
        reason: Exception | None = None
        for attempt in range(ATTEMPTS):
            request = Deferred.fromCoroutine(self._get(endpoint, url, attempt))
            try:
                keys = key_set(await request.addTimeout(TIMEOUT, self._reactor))
            except (KeysUnavailable, *_NETWORK_ERRORS) as error:
                reason = error
            else:
                self._counters["good"].value += 1
                if endpoint in self._failing:
                    self._failing.discard(endpoint)
                    _log.info("fetched the key set from {url} again", url=_printable(url))
                return keys
        self._counters["failed"].value += 1
        if endpoint not in self._failing:
            self._failing.add(endpoint)
            _log.warn(
                "no key set from {url}: {reason}; tokens signed with keys that are not known yet are refused",
                url=_printable(url),
                reason=_describe(reason),
            )
        raise KeysUnavailable(_describe(reason))

    async def _get(self, endpoint: str, url: SplitResult, attempt: int) -> bytes:
        allowed = self._allow_insecure or url.hostname in self._allowed_hosts
        if url.scheme != "https" and not allowed:
            raise KeysUnavailable("not an https address")
        host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
        addresses = await self._look_up(host, port)
        if not allowed and not all(map(is_public, addresses)):
            raise KeysUnavailable("the address is not public")
        server = _PinnedEndpoint(self._reactor, addresses[attempt % len(addresses)], port)
        try:
            secured = wrapClientTLS(optionsForClientTLS(host, self._trust), server) if url.scheme == "https" else server
        except UnicodeError:  # name servers accept names that no certificate can carry
            raise KeysUnavailable("the name can't stand in a certificate") from None
        try:
            return await _read_body(await self._request(endpoint, secured))
        except _NETWORK_ERRORS as error:
            if server.exceeded:
                raise KeysUnavailable("the response has too many bytes") from error
            raise
        finally:
            server.abort()

    async def _request(self, endpoint: str, server: IStreamClientEndpoint) -> Any:
        agent = Agent.usingEndpointFactory(self._reactor, _FixedEndpointFactory(server))
        headers = Headers({"Accept": ["application/json"], "User-Agent": [f"realtime/{__version__}"]})
        response = await agent.request(b"GET", endpoint.encode("ascii"), headers)
        if response.code != 200:
            raise KeysUnavailable(f"status {response.code}")
        return response

    async def _look_up(self, host: str, port: int) -> list[str]:
        """Return the addresses of a host, looked up in a thread of its own: the handlers' threads may all be busy."""
        if self._lookups >= MAX_LOOKUPS:
            raise KeysUnavailable("the name servers do not answer")
        self._lookups += 1
        found: Deferred[list[str]] = Deferred()

        def returned(result: Any) -> None:
            self._lookups -= 1
            if not found.called:
                found.callback(result)

        def look_up() -> None:
            try:
                entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except (OSError, UnicodeError):
                entries = []
            unknown = Failure(KeysUnavailable("the name is not known"))
            self._reactor.callFromThread(returned, [str(entry[4][0]) for entry in entries] or unknown)

        threading.Thread(target=look_up, name="lookup", daemon=True).start()
        return await found


def _printable(url: SplitResult) -> str:
    """Return a URL for the log, without its user, password and query, which may be secret."""
    return f"{url.scheme}://{url.hostname}{url.path}"


def _describe(reason: Exception | None) -> str:
    """Describe an error in words of this module: the message of a library may repeat bytes that the server sent."""
    if isinstance(reason, KeysUnavailable):
        return str(reason)
    # twisted.web wraps the reasons that the connection reported.
    causes = [getattr(cause, "value", cause) for cause in getattr(reason, "reasons", None) or [reason]]
    if any(isinstance(cause, (TimeoutError, CancelledError, errors.TimeoutError)) for cause in causes):
        return "no response in time"
    return ", ".join(type(cause).__name__ for cause in causes)


class _BoundedProtocol(ProtocolWrapper):
    """Passes on a bounded number of received bytes, and aborts the connection at the next one."""

    remaining_bytes = MAX_SET_BYTES + MAX_OVERHEAD_BYTES

    def dataReceived(self, data: bytes) -> None:
        self.remaining_bytes -= len(data)
        if self.remaining_bytes < 0:
            self.transport.abortConnection()  # type: ignore[union-attr]
        else:
            super().dataReceived(data)


@implementer(IStreamClientEndpoint)
class _PinnedEndpoint:
    """A client endpoint for one address of a server, and its connection, which may send a bounded number of bytes."""

    def __init__(self, reactor: Any, address: str, port: int) -> None:
        endpoint = TCP6ClientEndpoint if ":" in address else TCP4ClientEndpoint
        self._endpoint = endpoint(reactor, address, port, timeout=TIMEOUT)
        self._connection: Any = None

    def connect(self, protocolFactory: IProtocolFactory) -> Any:
        wrapping = WrappingFactory(protocolFactory)
        wrapping.protocol = _BoundedProtocol

        def connected(connection: Any) -> Any:
            self._connection = connection
            return connection.wrappedProtocol

        return self._endpoint.connect(wrapping).addCallback(connected)

    @property
    def exceeded(self) -> bool:
        """Whether the server sent more bytes than allowed."""
        return self._connection is not None and self._connection.remaining_bytes < 0

    def abort(self) -> None:
        """Abort the connection, if there is one."""
        if self._connection is not None:
            self._connection.transport.abortConnection()


@implementer(IAgentEndpointFactory)
class _FixedEndpointFactory:
    """Connects an Agent to one endpoint, regardless of the URI of the request."""

    def __init__(self, server: IStreamClientEndpoint) -> None:
        self._server = server

    def endpointForURI(self, uri: Any) -> IStreamClientEndpoint:
        return self._server


class _Body(Protocol):
    """Collects the body of a response. whole: fires with the body, or fails."""

    def __init__(self) -> None:
        self.whole: Deferred[bytes] = Deferred()
        self._parts: list[bytes] = []

    def dataReceived(self, data: bytes) -> None:
        self._parts.append(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.whole.called:
            return
        # Without a length, the end of the connection is the end of the body; a body that was cut off is no JSON.
        if reason.check(ResponseDone, PotentialDataLoss):
            self.whole.callback(b"".join(self._parts))
        else:
            self.whole.errback(reason)


def _read_body(response: Any) -> Deferred[bytes]:
    body = _Body()
    response.deliverBody(body)
    return body.whole
