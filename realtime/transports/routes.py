"""Routes of the clients' port: paths of the server's own, the server API, the application's routes and its files.

`Router` finds the handler of a request by its head; the functions `serve_…` are the handlers. `make_site` builds the
site of a worker.
"""

from __future__ import annotations

import hmac
import random
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http_headers import Headers

from realtime.app import App, Request
from realtime.config.settings import HTTPAPISettings, Settings
from realtime.errors import INTERNAL_ERROR, ClientError, Disconnect, HandlerTimeout, Overloaded, PoolFull
from realtime.handlers.call import HandlerCall
from realtime.handlers.coroutines import drive
from realtime.handlers.dispatch import Dispatcher
from realtime.handlers.results import JSON, PreparedResponse, json_response, status_response
from realtime.http import cors
from realtime.http.forwarded import TrustedProxies
from realtime.http.handshake import origin_policy
from realtime.http.request import RequestHead
from realtime.metrics import Metrics
from realtime.server_api.http_api import (
    HTTPAPI,
    APIResponse,
    BadBody,
    BatchResult,
    ErrorBody,
    PipelineResult,
    UnknownMethod,
)
from realtime.transports.http_server import HTTPRequest, HTTPSite, RequestHandler, fault_response, first_header
from realtime.transports.static_files import locate, serve_file

# Limit of the number of parameters in one query.
MAX_PARAMETERS = 100

# Range in seconds of Retry-After, random so that refused clients do not all come back at the same time.
RETRY_AFTER = (3, 10)

# HTTP status by client error code, for the server API's transport error mode and for the application's routes.
STATUSES = {100: 500, 102: 404, 103: 403, 104: 404, 107: 400, 108: 400, 109: 401, 111: 429, 112: 416, 113: 409}

_log = Logger()

_is_same_origin = origin_policy(())

APICall = Callable[[bytes], Coroutine[Any, Any, msgspec.Struct]]
"""A method of the server API: takes a request body, returns its result."""


def make_site(
    app: App,
    dispatcher: Dispatcher,
    api: HTTPAPI,
    settings: Settings,
    metrics: Metrics,
    reactor: Any = None,
    another_worker_available: Callable[[], bool] = lambda: False,
    cors_routes: Mapping[str, CORSRoute] | None = None,
    proxies: TrustedProxies | None = None,
) -> HTTPSite:
    """Build the site of one worker.

    reactor: for deadlines; None for the process's own. another_worker_available: whether another worker accepts new
    clients, so that a refused client should reconnect. cors_routes: by path. proxies: the trusted proxies.
    """
    router = Router(
        app,
        dispatcher,
        api,
        settings.http_api,
        cors_routes or {},
        another_worker_available,
        proxies or TrustedProxies(()),
    )
    return HTTPSite(router, settings.http_api, metrics, partial(drive, ledger=dispatcher.ledger), reactor)


class CORSRoute:
    """A path of the server's own, for pages of allowed origins."""

    def __init__(
        self,
        methods: tuple[str, ...],
        origin_allowed: Callable[[RequestHead], bool],
        serve: Callable[[cors.Headers, HTTPRequest], None] | None = None,
        max_body_size: int = 1024,
    ) -> None:
        """serve: called with the CORS headers of the response, and a request.

        None for a path on which a `ConnectionEndpoint` serves all methods but OPTIONS.
        """
        self.max_body_size = max_body_size
        self._methods = methods
        self._origin_allowed = origin_allowed
        self._serve = serve

    def resolve(self, head: RequestHead) -> RequestHandler | PreparedResponse:
        """Return the handler of a request, or the response if there is none, like `Router.resolve`."""
        if not self._origin_allowed(head):
            return fault_response("origin")
        if head.method == "OPTIONS":
            return PreparedResponse(204, headers=cors.preflight_headers(head, self._methods))
        if head.method not in self._methods:
            return status_response(405, ("Allow", ", ".join((*self._methods, "OPTIONS"))))
        return partial(self._serve, cors.response_headers(head)) if self._serve else status_response(404)


def serve_init(cors_headers: cors.Headers, request: HTTPRequest) -> None:
    """Send an empty JSON object: a small response, to which a load balancer can add its cookie."""
    request.respond(msgspec.structs.replace(json_response(200, {}), headers=cors_headers))


class Router:
    """Finds the handler of each request: CORS routes, then the server API, the application's routes, and its files."""

    def __init__(
        self,
        app: App,
        dispatcher: Dispatcher,
        api: HTTPAPI,
        settings: HTTPAPISettings,
        cors_routes: Mapping[str, CORSRoute],
        another_worker_available: Callable[[], bool],
        proxies: TrustedProxies,
    ) -> None:
        self._cors_routes = cors_routes
        self._dispatcher = dispatcher
        self._api = api
        self._settings = settings
        self._another_worker_available = another_worker_available
        self._proxies = proxies
        self._prefix = settings.handler_prefix.rstrip("/") + "/"
        self._key = settings.key.encode()
        self._statics = sorted(app.http.statics, key=lambda static: len(static.prefix), reverse=True)

    def resolve(self, method: str, uri: str, headers: Headers) -> RequestHandler | PreparedResponse:
        """Return the handler of a request, judged by its head, or the response if there is none."""
        path, _, query = uri.partition("?")
        cors_route = self._cors_routes.get(path)
        if cors_route is not None:
            return cors_route.resolve(_request_head(method, uri, headers))
        if path.startswith(self._prefix) and not self._settings.disabled:
            return self._resolve_api(method, partial(self._api.call, path.removeprefix(self._prefix)), uri, headers)
        if method == "POST" and path + "/" == self._prefix and not self._settings.disabled:
            return self._resolve_api(method, self._api.call_named, uri, headers)
        route = self._dispatcher.route("GET" if method == "HEAD" else method, path)
        if route is not None:
            return partial(serve_route, route, path, query, self._proxies, self._another_worker_available)
        allowed = [verb for verb in ("GET", "POST") if self._dispatcher.route(verb, path) is not None]
        if allowed:
            return status_response(405, ("Allow", ", ".join(allowed)))
        return self._resolve_file(method, path)

    def max_body_size(self, uri: str) -> int:
        """Return the largest allowed size of a request's body in bytes; 0 for no limit."""
        cors_route = self._cors_routes.get(uri.partition("?")[0])
        return self._settings.max_body_size if cors_route is None else cors_route.max_body_size

    def cors_headers(self, uri: str, headers: Headers) -> cors.Headers:
        """Return the CORS headers for every response of a CORS route; none for other paths."""
        if uri.partition("?")[0] not in self._cors_routes:
            return ()
        return cors.response_headers(_request_head("POST", uri, headers))

    def _resolve_api(self, method: str, call: APICall, uri: str, headers: Headers) -> RequestHandler | PreparedResponse:
        if method != "POST":
            return status_response(405, ("Allow", "POST"))
        if self._settings.insecure:
            # Without a key, only the browser's headers tell a page of another origin, which can post any plain text.
            site = first_header(headers, "Sec-Fetch-Site").lower()
            if site not in ("", "none", "same-origin") or not _is_same_origin(_request_head(method, uri, headers)):
                return fault_response("origin")
        elif not self._has_key(uri.partition("?")[2], headers):
            return PreparedResponse(401, fault="api_key")  # the API's contract requires an empty body
        return partial(serve_api, call, self._settings.error_mode)

    def _has_key(self, query: str, headers: Headers) -> bool:
        """Return whether the request has the configured API key; always False if none is configured."""
        key = first_header(headers, "X-API-Key")
        if not key and headers.hasHeader("Authorization"):
            scheme, _, key = first_header(headers, "Authorization").partition(" ")
            key = key.strip() if scheme.lower() == "apikey" else ""
        elif not key:
            key = (_parse_query(query) or {}).get("api_key", "")
        # Compares the bytes as sent, in constant time: the time reveals nothing about a correct prefix.
        return bool(self._key) and hmac.compare_digest(key.encode("latin-1", "replace"), self._key)

    def _resolve_file(self, method: str, path: str) -> RequestHandler | PreparedResponse:
        for static in self._statics:
            if path + "/" == static.prefix:
                return status_response(308, ("Location", static.prefix))
            if path.startswith(static.prefix):
                file = locate(static, path.removeprefix(static.prefix))
                if file is None:
                    break
                if method not in ("GET", "HEAD"):
                    return status_response(405, ("Allow", "GET, HEAD"))
                return partial(serve_file, file)
        return status_response(404)


# -- the server API ---------------------------------------------------------------------------------------------------


def serve_api(call: APICall, default_error_mode: str, request: HTTPRequest) -> None:
    """Call a method of the server API. The call is not cancelled if the peer disconnects: its effects are complete."""
    error_mode = request.getHeader("X-Centrifugo-Error-Mode") or default_error_mode
    uses_status = error_mode == "transport"
    request.respond_with(call(request.body()), partial(_api_response, uses_status), cancels=False)


def _api_response(uses_status: bool, result: Any, error: BaseException | None) -> PreparedResponse:
    """Build the response to a call of the server API. uses_status: report errors by the HTTP status."""
    match error:
        case None:
            if isinstance(result, PipelineResult):
                return PreparedResponse(200, b"\n".join(result.lines), JSON)
            # A batch is the only result without a wrapper.
            return json_response(200, result if isinstance(result, BatchResult) else APIResponse(result=result))
        case UnknownMethod():
            return status_response(404)
        case BadBody():
            return status_response(400)
        case ClientError():
            client_error = error
        case _:
            _log.failure("a server API call raised an exception; responding with internal server error", Failure(error))
            client_error = ClientError(*INTERNAL_ERROR)
    body = ErrorBody.of(client_error)
    if uses_status:
        return json_response(STATUSES.get(client_error.code, 400), body)
    return json_response(200, APIResponse(error=body))


# -- the application's routes -----------------------------------------------------------------------------------------


def serve_route(
    route: HandlerCall,
    path: str,
    query: str,
    proxies: TrustedProxies,
    another_worker_available: Callable[[], bool],
    request: HTTPRequest,
) -> None:
    """Call the application's handler; it is cancelled if the peer disconnects."""
    parameters = _parse_query(query)
    if parameters is None:
        request.respond(fault_response("parameters"))
        return
    headers = {
        name.decode("latin-1").lower(): b", ".join(values).decode("latin-1")
        for name, values in request.requestHeaders.getAllRawHeaders()
    }
    app_request = Request(
        method=request.method.decode("ascii"),
        path=path,
        query=parameters,
        headers=headers,
        body=request.body(),
        remote_address=proxies.client_address(
            getattr(request.client, "host", ""), [headers.get("x-forwarded-for", "")]
        ),
    )
    request.respond_with(route.call(app_request), partial(_route_response, another_worker_available), cancels=True)


def _route_response(
    another_worker_available: Callable[[], bool], result: Any, error: BaseException | None
) -> PreparedResponse:
    match error:
        case None:
            response: PreparedResponse = result
            return response
        case Overloaded() if another_worker_available():
            # The connection is closed: another worker serves the client when it reconnects.
            return msgspec.structs.replace(status_response(503, ("Retry-After", "1")), close=True)
        case HandlerTimeout() | PoolFull() | Overloaded():
            return status_response(503, ("Retry-After", str(random.randint(*RETRY_AFTER))))
        case ClientError():
            return json_response(STATUSES.get(error.code, 400), ErrorBody.of(error))
        case Disconnect():
            return status_response(403)
        case _:
            # The dispatcher logged the exception, or the handler was cancelled and the peer has gone.
            return status_response(500)


def _request_head(method: str, uri: str, headers: Headers) -> RequestHead:
    """Build a `RequestHead` from twisted.web's headers."""
    fields = [
        (name.decode("ascii").lower(), value.decode("latin-1"))
        for name, values in headers.getAllRawHeaders()
        for value in values
    ]
    return RequestHead(method, uri, "1.1", tuple(fields), 0)


def _parse_query(query: str) -> dict[str, str] | None:
    """Return the last value of each parameter; None if there are more than MAX_PARAMETERS."""
    try:
        return dict(parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_PARAMETERS))
    except ValueError:
        return None
