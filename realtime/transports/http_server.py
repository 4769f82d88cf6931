"""HTTP requests on the clients' port, with twisted.web: bodies within limits, and one response for each request.

twisted.web parses requests and writes responses; the frontend has checked their heads. This module closes the gaps of
twisted.web: a body has a size limit and an absolute deadline and is never written to disk; a request that cannot
succeed is refused by its head, before its body is read; and a failed request reveals nothing but its status.

`HTTPSite` makes an `HTTPConnection` for each connection and an `HTTPRequest` for each request. A `RequestRouter`
(`realtime.transports.routes`) decides how a request is served.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from io import BytesIO
from typing import Any, Protocol

import msgspec
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger, LogPublisher
from twisted.python.failure import Failure
from twisted.web import http
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import Site

from realtime.config.settings import HTTPAPISettings
from realtime.errors import RealtimeError
from realtime.handlers.coroutines import CoroutineDriver
from realtime.handlers.results import PreparedResponse, status_response
from realtime.http import cors
from realtime.http.body import has_too_many_chunks
from realtime.metrics import Metrics, bad_input_counter

# Seconds for a refused peer to read the response; data received meanwhile is discarded. A TCP reset, which closing at
# once would cause, would destroy the response.
LINGER = 2.0
# The most bytes of the body of a request without permission (401) that are read and dropped, to keep the connection.
MAX_DROPPED_BODY = 64 * 1024
# Seconds that a kept-alive connection may be idle.
IDLE_TIMEOUT = 60.0

_log = Logger()

# Faults of peers, counted as bad input, with the status of the response.
FAULTS = {
    "api_key": 401,
    "body_timeout": 408,
    "body_too_large": 413,
    "body_encoding": 415,
    "body_syntax": 400,
    "parameters": 400,
    "emulation": 400,
    "origin": 403,
}


def fault_response(fault: str) -> PreparedResponse:
    """Build the response for a fault, a key of FAULTS."""
    return msgspec.structs.replace(status_response(FAULTS[fault]), fault=fault)


RequestHandler = Callable[["HTTPRequest"], None]
"""Serves a complete request: it calls `respond` or `respond_with`."""


class RequestRouter(Protocol):
    """Finds the handler of a request. uri: path and query as sent."""

    def resolve(self, method: str, uri: str, headers: Headers) -> RequestHandler | PreparedResponse:
        """Return the handler of a request, judged by its head, or the response if there is none."""

    def max_body_size(self, uri: str) -> int:
        """Return the largest allowed size of a request's body in bytes; 0 for no limit."""

    def cors_headers(self, uri: str, headers: Headers) -> cors.Headers:
        """Return the CORS headers for every response to this request."""


class BodyRefused(RealtimeError):
    """A request was refused before its body was complete."""


class HTTPRequest(http.Request):
    """One request: its body, in memory and limited in size, and its one response."""

    channel: Any
    content: BytesIO
    _driver: CoroutineDriver | None = None
    _size = 0
    _chunks = 0

    def gotLength(self, length: int | None) -> None:
        self.content = BytesIO()  # twisted.web would write bodies of 100,000 bytes and more to disk

    def parseCookies(self) -> None:
        """Do nothing: cookies are not used."""

    def handleContentChunk(self, data: bytes) -> None:
        self._size += len(data)
        self._chunks += 1
        self.channel.check_body_size(self._size, self._chunks)
        self.content.write(data)

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        # Replaces twisted.web's method, which parses queries and forms without a limit.
        self.method, self.uri, self.clientproto = command, path, version
        self.path = path.partition(b"?")[0]
        self.site = self.channel.site
        try:
            handler = self.site.router.resolve(command.decode("ascii"), path.decode("ascii"), self.requestHeaders)
            if isinstance(handler, PreparedResponse):
                self.respond(handler)
            else:
                handler(self)
        except Exception:
            self.respond_with_error()

    def body(self) -> bytes:
        """Return the complete body."""
        return self.content.getvalue()

    def respond_with(
        self,
        coroutine: Coroutine[Any, Any, Any],
        make_response: Callable[[Any, BaseException | None], PreparedResponse],
        cancels: bool,
    ) -> None:
        """Run `coroutine`, and send the response that `make_response` builds from its result or its exception.

        cancels: whether to cancel the coroutine if the peer disconnects.
        """

        def done(result: Any, error: BaseException | None) -> None:
            self._driver = None
            try:
                response = make_response(result, error)
            except Exception:
                self.respond_with_error()
            else:
                self.respond(response)

        driver = self.site.drive(coroutine, done)
        if cancels and not self.finished:
            self._driver = driver

    def respond(self, response: PreparedResponse) -> None:
        """Write the response, unless the peer has disconnected."""
        if self._disconnected or self.finished:
            return
        self.site.count_fault(response.fault)
        self.setResponseCode(response.status)
        if response.close:
            self.channel.persistent = 0
            self.responseHeaders.addRawHeader("Connection", "close")
        for name, value in response.all_headers():
            self.responseHeaders.addRawHeader(name.encode("latin-1", "replace"), value.encode("latin-1", "replace"))
        self.write(response.body)
        self.finish()

    def respond_with_error(self) -> None:
        """Log the current exception, and respond with status 500 and no detail."""
        _log.failure("serving an HTTP request raised an exception; responding with status 500")
        if self.startedWriting:
            self.loseConnection()
        else:
            self.responseHeaders = Headers()
            self.respond(status_response(500))

    def connectionLost(self, reason: Failure) -> None:
        driver, self._driver = self._driver, None
        super().connectionLost(reason)
        if driver is not None:
            driver.cancel()


class HTTPConnection(http.HTTPChannel):
    """One connection: bodies limited in size and time, and refusals that reach the peer."""

    site: HTTPSite
    transport: Any
    _networkProducer: Any
    requestFactory = HTTPRequest
    # The frontend has checked the head, by the limits of the settings.
    maxHeaders = totalHeadersSize = sys.maxsize
    # Drops Twisted's log lines: it writes one, with the peer's address, for each connection that times out idle.
    _log = Logger(observer=LogPublisher())
    _deadline: IDelayedCall | None = None
    _is_refused = False
    _max_body_size = 0  # of the current request

    def dataReceived(self, data: bytes) -> None:
        if not self._is_refused:
            super().dataReceived(data)

    def rawDataReceived(self, data: bytes) -> None:
        if not self._is_refused:
            with suppress(BodyRefused):
                super().rawDataReceived(data)

    def allHeadersReceived(self) -> None:
        if self.length == 0:
            super().allHeadersReceived()
            return
        self._check_head()
        if not self._is_refused:
            super().allHeadersReceived()  # sends "100 Continue" if the peer expects it
            self._set_deadline(self.site.settings.body_timeout, partial(self._refuse_body, "body_timeout"))

    def allContentReceived(self) -> None:
        if not self._is_refused:
            self._set_deadline(0)
            super().allContentReceived()

    def check_body_size(self, size: int, chunks: int) -> None:
        """Check a body received in part: `size` bytes in `chunks` chunks.

        Raises BodyRefused after refusing the request, so that Twisted stops reading the body.
        """
        if 0 < self._max_body_size < size:
            self._refuse_body("body_too_large")
        elif self.length is None and has_too_many_chunks(chunks, size):
            self._refuse_body("body_syntax")
        if self._is_refused:
            raise BodyRefused

    def refuse(self, response: PreparedResponse) -> None:
        """Send `response` before the request is complete, and read no more of it."""
        if self._is_refused:
            return
        self._is_refused = True
        self.site.count_fault(response.fault)
        self.setTimeout(None)
        self._networkProducer.unregisterProducer()
        lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in response.all_headers()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + response.body)
        self.transport.loseWriteConnection()
        self._set_deadline(LINGER, self.transport.abortConnection)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._set_deadline(0)
        super().connectionLost(reason)

    def detach(self) -> bool:
        """Give up the transport for good; return False, and keep it, while a request is being answered."""
        if self.requests or self._is_refused or not self.persistent:
            return False
        self.setTimeout(None)
        self._networkProducer.unregisterProducer()
        self._networkProducer.resumeProducing()  # it is paused if the last response is still buffered
        return True

    def _check_head(self) -> None:
        """Refuse a request with a body by its head, if it cannot succeed."""
        headers, router = self.requests[-1].requestHeaders, self.site.router
        method, uri = self._command.decode("ascii"), self._path.decode("ascii")
        self._max_body_size = router.max_body_size(uri)
        handler = router.resolve(method, uri, headers)
        if isinstance(handler, PreparedResponse):
            if not (handler.status == 401 and self._has_short_body(headers)):
                self.refuse(handler)
        elif first_header(headers, "Content-Encoding").lower() not in ("", "identity"):
            self._refuse_body("body_encoding")
        elif self.length is not None and 0 < self._max_body_size < self.length:
            self._refuse_body("body_too_large")

    def _has_short_body(self, headers: Headers) -> bool:
        """Whether reading the body and dropping it is cheaper for the peer than a new connection."""
        short = self.length is not None and self.length <= MAX_DROPPED_BODY
        return short and not headers.hasHeader("Expect") and first_header(headers, "Connection").lower() != "close"

    def _refuse_body(self, fault: str) -> None:
        """Refuse a request for a fault of its body, with the headers that let pages of other origins read why."""
        uri, headers = self._path.decode("ascii"), self.requests[-1].requestHeaders
        cors_headers = self.site.router.cors_headers(uri, headers)
        self.refuse(msgspec.structs.replace(fault_response(fault), headers=cors_headers))

    def _set_deadline(self, seconds: float, act: Callable[[], None] | None = None) -> None:
        """Set the connection's one deadline in place of its earlier one; 0 clears it."""
        if self._deadline is not None and self._deadline.active():
            self._deadline.cancel()
        self._deadline = self.site.reactor.callLater(seconds, act) if seconds and act else None


class HTTPSite(Site):
    """Factory of `HTTPConnection`. It writes no access log, because a URL may hold an API key."""

    protocol = HTTPConnection  # type: ignore[assignment]
    noisy = False

    def __init__(
        self,
        router: RequestRouter,
        settings: HTTPAPISettings,
        metrics: Metrics,
        drive: Callable[..., CoroutineDriver | None],
        reactor: Any = None,
    ) -> None:
        """drive: starts a coroutine, as `realtime.handlers.coroutines.drive` does.

        reactor: for deadlines; None for the process's own.
        """
        super().__init__(Resource(), requestFactory=HTTPRequest, timeout=IDLE_TIMEOUT, reactor=reactor)
        self.router = router
        self.settings = settings
        self.drive = drive
        self._faults = {fault: bad_input_counter(metrics, fault) for fault in FAULTS}

    def count_fault(self, fault: str) -> None:
        """Count a fault, a key of FAULTS; "" is none."""
        if fault:
            self._faults[fault].value += 1

    def startFactory(self) -> None:
        """Do nothing: there is no log file to open."""

    def stopFactory(self) -> None:
        """Do nothing: there is no log file to close."""

    def log(self, request: http.Request) -> None:
        """Write nothing."""


def first_header(headers: Headers, name: str) -> str:
    """Return the first value of a header; "" if there is none."""
    values = headers.getRawHeaders(name.encode())
    return values[0].decode("latin-1") if values else ""
