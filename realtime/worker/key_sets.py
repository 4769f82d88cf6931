"""Fetches the key sets of identity providers over HTTP, for `realtime.auth.keys`.

A token's issuer may pick which of the configured addresses is asked, so the server that answers gets no further than
its answer: no redirect is followed, only public addresses are connected to (the one that was checked, so that a name
can't change its meaning in between), and so much is read for so long, and no more.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
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
from twisted.web.client import (
    Agent,
    RequestNotSent,
    RequestTransmissionFailed,
    ResponseDone,
    ResponseFailed,
)
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

# Seconds for one attempt, from the name to the last byte, and the number of attempts.
TIMEOUT = 1.0
TRIES = 2
# Bytes that may come besides the key set: certificates and headers.
MAX_OTHER_BYTES = 64 * 1024
# Names that are looked up at a time. A name server that hangs keeps a thread for half a minute.
LOOKUPS = 4

# What a peer, or the way to it, can do to a request.
_FAULTS = (
    *(OSError, TimeoutError, CancelledError, errors.ConnectError, errors.ConnectionClosed),
    *(RequestNotSent, RequestTransmissionFailed, ResponseFailed),
)

_log = Logger()


def make_verifier(
    settings: ClientSettings, reactor: Any, metrics: Metrics, wall_clock: Callable[[], float]
) -> TokenVerifier:
    """What judges the tokens of a worker's clients, by one table of the configuration or by two."""

    def judge(table: TokenSettings, subscriptions: TokenVerifier | None = None) -> TokenVerifier:
        fetch = KeySetFetcher(reactor, metrics, allow_insecure=table.jwks_allow_insecure)
        return TokenVerifier(table, wall_clock, KeySets(fetch, start_future, reactor.seconds), subscriptions, metrics)

    own = settings.subscription_token
    return judge(settings.token, judge(own) if own.enabled else None)


class KeySetFetcher:
    """Called with an address, has the keys there. The `fetch` of a KeySets."""

    def __init__(self, reactor: Any, metrics: Metrics, *, allow_insecure: bool = False, trust: Any = None) -> None:
        """allow_insecure: take http, too, and addresses that are not public. trust: whose certificates are believed,
        as twisted.internet.ssl.optionsForClientTLS has it; None: those of the platform."""
        self._reactor = reactor
        self._allow_insecure = allow_insecure
        self._trust = trust
        self._looking_up = 0
        self._away: set[str] = set()
        self._counters = {
            outcome: metrics.counter("realtime_key_set_fetches", "Attempts to have a key set.", outcome=outcome)
            for outcome in ("good", "failed")
        }

    async def __call__(self, endpoint: str) -> Mapping[str, VerificationKey]:
        """The keys at `endpoint`, by id. Raises KeysUnavailable, after TRIES times TIMEOUT at the latest."""
        url = urlsplit(endpoint)
        reason: Exception | None = None
        for attempt in range(TRIES):
            asking = Deferred.fromCoroutine(self._get(endpoint, url, attempt))
            try:
                keys = key_set(await asking.addTimeout(TIMEOUT, self._reactor))
            except (KeysUnavailable, *_FAULTS) as error:
                reason = error
            else:
                self._counters["good"].value += 1
                if endpoint in self._away:
                    self._away.discard(endpoint)
                    _log.info("the key set at {place} is back", place=_place(url))
                return keys
        self._counters["failed"].value += 1
        if endpoint not in self._away:
            self._away.add(endpoint)
            _log.warn("no key set from {place}: {reason}", place=_place(url), reason=_told(reason))
        raise KeysUnavailable(_told(reason))

    async def _get(self, endpoint: str, url: SplitResult, attempt: int) -> bytes:
        if url.scheme != "https" and not self._allow_insecure:
            raise KeysUnavailable("not an https address")
        host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
        addresses = await self._look_up(host, port)
        if not self._allow_insecure and not all(map(is_public, addresses)):
            raise KeysUnavailable("the address is not public")
        server = _Server(self._reactor, addresses[attempt % len(addresses)], port)
        try:
            secured = wrapClientTLS(optionsForClientTLS(host, self._trust), server) if url.scheme == "https" else server
        except UnicodeError:  # name servers take more names than certificates can have
            raise KeysUnavailable("the name can't stand in a certificate") from None
        try:
            return await _body(await self._request(endpoint, secured))
        except _FAULTS as error:
            if server.exceeded:
                raise KeysUnavailable("the answer has too many bytes") from error
            raise
        finally:
            server.abort()

    async def _request(self, endpoint: str, server: IStreamClientEndpoint) -> Any:
        agent = Agent.usingEndpointFactory(self._reactor, _Only(server))
        headers = Headers({"Accept": ["application/json"], "User-Agent": [f"realtime/{__version__}"]})
        response = await agent.request(b"GET", endpoint.encode("ascii"), headers)
        if response.code != 200:
            raise KeysUnavailable(f"status {response.code}")
        return response

    async def _look_up(self, host: str, port: int) -> list[str]:
        """The addresses of a host, looked up in a thread of its own: those of the handlers may all be busy."""
        if self._looking_up >= LOOKUPS:
            raise KeysUnavailable("the name servers do not answer")
        self._looking_up += 1
        found: Deferred[list[str]] = Deferred()

        def returned(result: Any) -> None:
            self._looking_up -= 1
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


def _place(url: SplitResult) -> str:
    """An address for the log. The rest of it may be a password."""
    return f"{url.scheme}://{url.hostname}{url.path}"


def _told(reason: Exception | None) -> str:
    """What went wrong, in words of ours: those of libraries may repeat what the server sent."""
    if isinstance(reason, KeysUnavailable):
        return str(reason)
    # twisted.web wraps what it was told by the connection.
    causes = [getattr(cause, "value", cause) for cause in getattr(reason, "reasons", None) or [reason]]
    if any(isinstance(cause, (TimeoutError, CancelledError, errors.TimeoutError)) for cause in causes):
        return "no answer in time"
    return ", ".join(type(cause).__name__ for cause in causes)


class _Bounded(ProtocolWrapper):
    """Reads so many bytes of what a server sends, and cuts the connection at the next."""

    left = MAX_SET_BYTES + MAX_OTHER_BYTES

    def dataReceived(self, data: bytes) -> None:
        self.left -= len(data)
        if self.left < 0:
            self.transport.abortConnection()  # type: ignore[union-attr]
        else:
            super().dataReceived(data)


@implementer(IStreamClientEndpoint)
class _Server:
    """One address of a server, and the connection to it."""

    def __init__(self, reactor: Any, address: str, port: int) -> None:
        endpoint = TCP6ClientEndpoint if ":" in address else TCP4ClientEndpoint
        self._endpoint = endpoint(reactor, address, port, timeout=TIMEOUT)
        self._connection: Any = None

    def connect(self, protocolFactory: IProtocolFactory) -> Any:
        wrapping = WrappingFactory(protocolFactory)
        wrapping.protocol = _Bounded

        def connected(connection: Any) -> Any:
            self._connection = connection
            return connection.wrappedProtocol

        return self._endpoint.connect(wrapping).addCallback(connected)

    @property
    def exceeded(self) -> bool:
        """Whether it sent more than may be read."""
        return self._connection is not None and self._connection.left < 0

    def abort(self) -> None:
        """Cut the connection, if it is there."""
        if self._connection is not None:
            self._connection.transport.abortConnection()


@implementer(IAgentEndpointFactory)
class _Only:
    """Connects an Agent to one server, whatever its request says."""

    def __init__(self, server: IStreamClientEndpoint) -> None:
        self._server = server

    def endpointForURI(self, uri: Any) -> IStreamClientEndpoint:
        return self._server


class _Body(Protocol):
    """Collects the body of an answer."""

    def __init__(self) -> None:
        self.whole: Deferred[bytes] = Deferred()
        self._parts: list[bytes] = []

    def dataReceived(self, data: bytes) -> None:
        self._parts.append(data)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        if self.whole.called:
            return
        # Without a length, the end of the connection is the end of the body; what was cut off will not be JSON.
        if reason.check(ResponseDone, PotentialDataLoss):
            self.whole.callback(b"".join(self._parts))
        else:
            self.whole.errback(reason)


def _body(response: Any) -> Deferred[bytes]:
    body = _Body()
    response.deliverBody(body)
    return body.whole
