"""HTTP requests on the clients' port: bodies within limits, and one response for each request.

The frontend parses heads and bodies; an `Exchange` is one request and its one response. A request that cannot succeed
is refused by its head, before its body is read, and a failed request reveals nothing but its status. A `RequestRouter`
(`realtime.transports.routes`) decides how a request is served.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol

import msgspec
from twisted.logger import Logger

from realtime.client_log import ClientLog
from realtime.config.settings import HTTPAPISettings
from realtime.handlers.coroutines import CoroutineDriver
from realtime.handlers.results import PreparedResponse, status_response
from realtime.http import cors
from realtime.http.forwarded import TrustedProxies
from realtime.http.handshake import origin_fault
from realtime.http.request import CHUNKED, RequestHead
from realtime.http.response import encode_response
from realtime.metrics import Metrics

_log = Logger()

# Faults of peers, kinds of `realtime.client_log`, with the status of the response.
FAULTS = {
    "api_key": 401,
    "body_memory": 503,
    "body_timeout": 408,
    "body_too_large": 413,
    "body_encoding": 415,
    "body_syntax": 400,
    "method": 405,
    "emulation": 400,
    "emulation_node": 404,
    "transport_disabled": 404,
    "websocket_path": 404,
    "not_found": 404,
    "api_disabled": 404,
    "origin": 403,
    "api_origin": 403,
}


def fault_response(fault: str, *headers: tuple[str, str]) -> PreparedResponse:
    """Build the response for a fault, a key of FAULTS."""
    return msgspec.structs.replace(status_response(FAULTS[fault], *headers), fault=fault)


def describe_request(head: RequestHead, peer: str, proxies: TrustedProxies) -> dict[str, object]:
    """Return the facts about a request for the log. peer: the address of its connection, possibly that of a proxy."""
    return {
        "address": proxies.client_address(peer, head.get_all("x-forwarded-for")),
        "method": head.method,
        "path": head.path,
        "origin": head.get("origin"),
        "host": head.get("host"),
    }


ResponseMaker = Callable[[Any, BaseException | None], PreparedResponse]
"""Builds a response from the result or the exception of a call."""

RequestHandler = Callable[["Exchange"], None]
"""Serves a complete request: it calls `respond` or `respond_with`."""


class RequestRouter(Protocol):
    """Finds the handler of a request."""

    def resolve(self, head: RequestHead) -> RequestHandler | PreparedResponse:
        """Return the handler of a request, judged by its head, or the response if there is none."""

    def max_body_size(self, path: str) -> int:
        """Return the largest allowed size of a request's body in bytes; 0 for no limit."""

    def cors_headers(self, head: RequestHead) -> cors.Headers:
        """Return the CORS headers for every response to this request."""


class ExchangeOwner(Protocol):
    """The connection of a request: an `HTTPFrontend`."""

    transport: Any

    @property
    def peer(self) -> str: ...
    def answered(self, response: bytes, close: bool) -> None: ...
    def go_on(self) -> None: ...
    def end_with(self, response: bytes) -> None: ...


class Exchange:
    """One request and its response.

    head, body: of the request; the body is complete when a handler gets the exchange. closes: whether the connection
    ends with the response.
    """

    __slots__ = ("_connection", "_driver", "_handler", "_is_over", "_site", "body", "closes", "head", "max_body_size")

    def __init__(self, connection: ExchangeOwner, site: HTTPSite, head: RequestHead, closes: bool) -> None:
        self.head = head
        self.body = b""
        self.closes = closes
        self.max_body_size = 0
        self._connection = connection
        self._site = site
        self._driver: CoroutineDriver | None = None
        self._handler: RequestHandler | None = None
        self._is_over = False  # answered, or the peer has disconnected

    @property
    def transport(self) -> Any:
        """The transport of the connection."""
        return self._connection.transport

    @property
    def peer(self) -> str:
        """Address of the connection's peer, possibly a proxy's."""
        return self._connection.peer

    def accepts_body(self) -> bool:
        """Refuse a request with a body by its head, and return False, if it cannot succeed."""
        head, router = self.head, self._site.router
        self.max_body_size = router.max_body_size(head.path)
        try:
            handler = router.resolve(head)
        except Exception:
            self.respond_with_error()
            return False
        if isinstance(handler, PreparedResponse):
            if handler.status == 401 and self._has_short_body():
                self._handler = partial(Exchange.respond, response=handler)
                return True
            self._refuse(handler)
        elif (coding := head.get("content-encoding")) and coding.lower() != "identity":
            self.refuse_body("body_encoding")
        elif head.body != CHUNKED and 0 < self.max_body_size < head.body:
            self.refuse_body("body_too_large")
        else:
            self._handler = handler
            return True
        return False

    def serve(self, body: bytes) -> None:
        """Serve the request, whose body is complete."""
        self.body = body
        try:
            handler = self._handler or self._site.router.resolve(self.head)
            if isinstance(handler, PreparedResponse):
                self.respond(handler)
            else:
                handler(self)
        except Exception:
            self.respond_with_error()

    def respond_with(
        self,
        coroutine: Coroutine[Any, Any, Any],
        make_response: ResponseMaker,
        cancels: bool,
    ) -> None:
        """Run `coroutine`, and send the response that `make_response` builds from its result or its exception.

        cancels: whether to cancel the coroutine if the peer disconnects.
        """
        driver = self._site.drive(coroutine, partial(self.respond_by, make_response))
        if cancels and not self._is_over:
            self._driver = driver

    def respond_by(self, make_response: ResponseMaker, result: Any, error: BaseException | None) -> None:
        """Send the response that `make_response` builds from the result or the exception of a call. Never raises."""
        self._driver = None
        try:
            response = make_response(result, error)
        except Exception:
            self.respond_with_error()
        else:
            self.respond(response)

    def respond(self, response: PreparedResponse) -> None:
        """Write the response, unless the peer has disconnected."""
        if self._is_over:
            return
        if response.fault:
            self._site.refuse(response.fault, self)
        closes = self.closes or response.close
        try:
            data = encode_response(
                response.status, response.type, response.headers, response.body, closes, self.head.method == "HEAD"
            )
        except Exception:
            self.respond_with_error()
            return
        self._is_over = True
        self._connection.answered(data, closes)

    def finish(self) -> None:
        """Go on with the next request: a handler has written the response to the transport itself."""
        if not self._is_over:
            self._is_over = True
            if self.closes:
                self._connection.end_with(b"")
            else:
                self._connection.go_on()

    def respond_with_error(self) -> None:
        """Log the current exception, and respond with status 500 and no detail."""
        _log.failure("serving an HTTP request raised an exception; responding with status 500")
        self.respond(status_response(500))

    def refuse_body(self, fault: str) -> None:
        """Refuse a request for a fault of its body, with the headers that let pages of other origins read why."""
        cors_headers = self._site.router.cors_headers(self.head)
        self._refuse(msgspec.structs.replace(fault_response(fault), headers=cors_headers))

    def abandon(self) -> None:
        """End the exchange without a response: the peer has disconnected."""
        self._is_over = True
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.cancel()

    def _refuse(self, response: PreparedResponse) -> None:
        """Send `response` before the request is complete, and read no more of it."""
        self.closes = True
        self.respond(response)

    def _has_short_body(self) -> bool:
        """Whether reading the body and dropping it is cheaper for the peer than a new connection."""
        head = self.head
        return (
            0 <= head.body <= self._site.settings.max_refused_body_size and not head.get("expect") and not self.closes
        )


class HTTPSite:
    """What the exchanges of a worker share. It writes no access log, because a URL may hold an API key."""

    def __init__(
        self,
        router: RequestRouter,
        settings: HTTPAPISettings,
        metrics: Metrics,
        drive: Callable[..., CoroutineDriver | None],
        proxies: TrustedProxies | None = None,
        client_log: ClientLog | None = None,
    ) -> None:
        """drive: starts a coroutine, as `realtime.handlers.coroutines.drive` does.

        proxies: the trusted proxies. client_log: counts and logs the refusals.
        """
        self.router = router
        self.settings = settings
        self.drive = drive
        self._proxies = proxies or TrustedProxies(())
        self._client_log = client_log or ClientLog(metrics)

    def refuse(self, fault: str, exchange: Exchange) -> None:
        """Count and log a fault, a key of FAULTS, of a request."""
        head = exchange.head
        kind = origin_fault(head) if fault == "origin" else fault
        self._client_log.refuse(kind, partial(describe_request, head, exchange.peer, self._proxies))
