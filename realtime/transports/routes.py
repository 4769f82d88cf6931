"""Routes of the clients' port: paths of the server's own, the server API, the application's routes and its files.

`Router` finds the handler of a request by its head; the functions `serve_…` are the handlers. `make_site` builds the
site of a worker.
"""

from __future__ import annotations

import hmac
import random
from collections.abc import Callable, Collection, Coroutine, Mapping
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from twisted.logger import Logger
from twisted.python.failure import Failure

from realtime.app import App, PathTree, Request, parse_pattern
from realtime.client_log import ClientLog
from realtime.config.settings import HTTPAPISettings, Settings
from realtime.errors import INTERNAL_ERROR, ClientError, Disconnect, HandlerTimeout, Overloaded, PoolFull
from realtime.handlers.call import HandlerCall
from realtime.handlers.coroutines import DoneCallback, drive
from realtime.handlers.dispatch import Dispatcher
from realtime.handlers.error_answers import ErrorAnswer
from realtime.handlers.results import JSON, PreparedResponse, json_response, status_response
from realtime.http import cors
from realtime.http.forwarded import TrustedProxies
from realtime.http.handshake import origin_policy
from realtime.http.hosts import HostNames
from realtime.http.request import RequestHead
from realtime.metrics import Metrics
from realtime.server_api.http_api import (
    HTTPAPI,
    LONG_BODY,
    METHODS,
    APIResponse,
    BadBody,
    BatchResult,
    ErrorBody,
    PipelineResult,
    UnknownMethod,
)
from realtime.transports.http_server import Exchange, HTTPSite, RequestHandler, ResponseMaker, fault_response
from realtime.transports.static_files import locate, serve_file

# Range in seconds of Retry-After, random so that refused clients do not all come back at the same time.
RETRY_AFTER = (3, 10)

# HTTP status by client error code, for the server API's transport error mode and for the application's routes.
STATUSES = {100: 500, 102: 404, 103: 403, 104: 404, 107: 400, 108: 400, 109: 401, 111: 429, 112: 416, 113: 409}

# Methods of the application's routes, as a response lists them. A route for GET answers HEAD.
ROUTE_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")

_log = Logger()

APICall = Callable[[bytes], Coroutine[Any, Any, msgspec.Struct]]
"""A method of the server API: takes a request body, returns its result."""


def make_site(
    app: App,
    dispatcher: Dispatcher,
    api: HTTPAPI,
    settings: Settings,
    metrics: Metrics,
    another_worker_available: Callable[[], bool] = lambda: False,
    cors_routes: Mapping[str, CORSRoute] | None = None,
    proxies: TrustedProxies | None = None,
    own_names: HostNames | None = None,
    client_log: ClientLog | None = None,
) -> HTTPSite:
    """Build the site of one worker.

    another_worker_available: whether another worker accepts new
    clients, so that a refused client should reconnect. cors_routes: by path. proxies: the trusted proxies.
    own_names: names of this server, which pages must use to call an API without key. client_log: counts and logs
    refusals.
    """
    proxies = proxies or TrustedProxies(())
    router = Router(
        app,
        dispatcher,
        api,
        settings.http_api,
        cors_routes or {},
        another_worker_available,
        proxies,
        origin_policy(settings.client.allowed_origins) if settings.client.allowed_origins else None,
        origin_policy((), own_names),
        _disabled_paths(settings),
    )
    run = partial(drive, ledger=dispatcher.ledger)
    return HTTPSite(router, settings.http_api, metrics, run, proxies, client_log)


def _disabled_paths(settings: Settings) -> frozenset[str]:
    """Return the paths of the transports that are off, where a client is refused and not just lost."""
    optional = (settings.uni_websocket, settings.sse, settings.http_stream, settings.uni_sse, settings.uni_http_stream)
    paths = {transport.handler_prefix for transport in optional if not transport.enabled}
    if settings.websocket.disabled:
        paths.add(settings.websocket.handler_prefix)
    if not (settings.sse.enabled or settings.http_stream.enabled):
        paths.add(settings.emulation.handler_prefix)
    return frozenset(paths)


class CORSRoute:
    """A path of the server's own, for pages of allowed origins."""

    def __init__(
        self,
        methods: tuple[str, ...],
        origin_allowed: Callable[[RequestHead], bool],
        serve: Callable[[cors.Headers, Exchange], None] | None = None,
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
            return fault_response("method", ("Allow", ", ".join((*self._methods, "OPTIONS"))))
        return partial(self._serve, cors.response_headers(head)) if self._serve else status_response(404)


def serve_init(cors_headers: cors.Headers, request: Exchange) -> None:
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
        origin_allowed: Callable[[RequestHead], bool] | None,
        may_call: Callable[[RequestHead], bool],
        disabled_paths: Collection[str] = (),
    ) -> None:
        """origin_allowed: whether pages of a request's origin may read the routes; None for no page of another.

        may_call: whether a page that sent a request may call the API without a key. disabled_paths: of transports that
        are off.
        """
        self._disabled_paths = disabled_paths
        self._may_call = may_call
        self._origin_allowed = origin_allowed
        self._cors_routes = cors_routes
        cors_headers = self.cors_headers if origin_allowed is not None else _no_headers
        self._routes: dict[str, RequestHandler] = {}  # without parameters in their paths
        self._methods_of: dict[str, set[str]] = {}  # of these routes, by path
        self._patterns: dict[str, PathTree[Callable[..., None]]] = {}  # the other routes, by method
        for route, call in dispatcher.routes.items():
            serve = partial(serve_route, call, proxies, another_worker_available, cors_headers)
            method, _, path = route.partition(" ")
            pattern = parse_pattern(path)
            if pattern.has_parameters:
                self._patterns.setdefault(method, PathTree()).add(pattern, serve)
            else:
                self._routes[route] = serve
                self._methods_of.setdefault(path, set()).add(method)
        self._dispatcher = dispatcher
        self._api = api
        self._settings = settings
        self._prefix = settings.handler_prefix.rstrip("/") + "/"
        self._methods: dict[str, RequestHandler] = {}  # of the server API, by path, once they were called
        self._key = settings.key.encode()
        self._statics = sorted(app.http.statics, key=lambda static: len(static.prefix), reverse=True)

    def resolve(self, head: RequestHead) -> RequestHandler | PreparedResponse:
        """Return the handler of a request, judged by its head, or the response if there is none."""
        method, path = head.method, head.path
        api_method = self._methods.get(path)
        if api_method is not None:
            return self._refuse_call(head) or api_method
        cors_route = self._cors_routes.get(path)
        if cors_route is not None:
            return cors_route.resolve(head)
        if path.startswith(self._prefix) and not self._settings.disabled:
            return self._refuse_call(head) or self._api_method(path)
        if method == "POST" and path + "/" == self._prefix and not self._settings.disabled:
            return self._refuse_call(head) or partial(serve_api, self._api.call_named, self._settings.error_mode)
        route = self._routes.get(f"{'GET' if method == 'HEAD' else method} {path}")
        if route is not None:
            return route
        return self._resolve_pattern(head) or self._resolve_method(head) or self._resolve_file(head)

    def _resolve_pattern(self, head: RequestHead) -> RequestHandler | None:
        """Return the handler of a route with parameters in its path."""
        tree = self._patterns.get("GET" if head.method == "HEAD" else head.method)
        found = None if tree is None else tree.find(head.path)
        return None if found is None else partial(found[0], path_parameters=found[1])

    def _resolve_method(self, head: RequestHead) -> PreparedResponse | None:
        """Return the response to a method that no route takes, if the path has routes of other methods."""
        method, path = head.method, head.path
        known = {verb for verb, tree in self._patterns.items() if tree.find(path) is not None}
        known |= self._methods_of.get(path, set())
        if not known:
            return None
        allowed = [verb for verb in ROUTE_METHODS if ("GET" if verb == "HEAD" else verb) in known]
        allow = "Allow", ", ".join((*allowed, "OPTIONS"))
        if method != "OPTIONS":
            return fault_response("method", allow)
        if self._is_of_allowed_origin(head):
            return PreparedResponse(204, headers=(*cors.preflight_headers(head, allowed), allow))
        if head.get("access-control-request-method"):
            return msgspec.structs.replace(fault_response("method", allow), fault="origin")
        return PreparedResponse(204, headers=(allow,))

    def max_body_size(self, path: str) -> int:
        """Return the largest allowed size of a request's body in bytes; 0 for no limit."""
        cors_route = self._cors_routes.get(path)
        return self._settings.max_body_size if cors_route is None else cors_route.max_body_size

    def cors_headers(self, head: RequestHead) -> cors.Headers:
        """Return the CORS headers for every response of a CORS route, or of a route to a page of an allowed origin."""
        if head.path in self._cors_routes or self._is_of_allowed_origin(head):
            return cors.response_headers(head)
        return ()

    def _is_of_allowed_origin(self, head: RequestHead) -> bool:
        """Return whether a page of another origin, which the settings allow, has sent the request."""
        return self._origin_allowed is not None and bool(head.get("origin")) and self._origin_allowed(head)

    def _api_method(self, path: str) -> RequestHandler:
        """Make the handler of a method of the server API, also of one that does not exist."""
        name, error_mode = path.removeprefix(self._prefix), self._settings.error_mode
        serve: RequestHandler = partial(serve_api, partial(self._api.call, name), error_mode)
        if name == "publish":
            serve = partial(serve_publish, self._api.publish, error_mode, serve)
        if name in METHODS:
            self._methods[path] = serve
        return serve

    def _refuse_call(self, head: RequestHead) -> PreparedResponse | None:
        """Return the response to a call of the server API that is not allowed."""
        if head.method != "POST":
            return fault_response("method", ("Allow", "POST"))
        if self._settings.insecure:
            # Without a key, only the browser's headers tell a page of another origin, which can post any plain text.
            site = head.get("sec-fetch-site").lower()
            if site not in ("", "none", "same-origin") or not self._may_call(head):
                return fault_response("api_origin")
        elif not self._has_key(head):
            return PreparedResponse(401, fault="api_key")  # the API's contract requires an empty body
        return None

    def _has_key(self, head: RequestHead) -> bool:
        """Return whether the request has the configured API key; always False if none is configured."""
        key = head.get("x-api-key")
        if not key:
            authorization = head.get_all("authorization")
            if authorization:
                scheme, _, key = authorization[0].partition(" ")
                key = key.strip() if scheme.lower() == "apikey" else ""
            else:
                key = _parse_query(head.query).get("api_key", "")
        # Compares the bytes as sent, in constant time: the time reveals nothing about a correct prefix.
        return bool(self._key) and hmac.compare_digest(key.encode("latin-1", "replace"), self._key)

    def _resolve_file(self, head: RequestHead) -> RequestHandler | PreparedResponse:
        method, path = head.method, head.path
        for static in self._statics:
            if path + "/" == static.prefix:
                return status_response(308, ("Location", static.prefix))
            if path.startswith(static.prefix):
                file = locate(static, path.removeprefix(static.prefix))
                if file is None:
                    break
                if method not in ("GET", "HEAD"):
                    return fault_response("method", ("Allow", "GET, HEAD"))
                return partial(serve_file, file)
        if path in self._disabled_paths:
            return fault_response("transport_disabled")
        if self._settings.disabled and path.startswith(self._prefix):
            return fault_response("api_disabled")
        return fault_response("websocket_path" if head.get("upgrade").lower() == "websocket" else "not_found")


# -- the server API ---------------------------------------------------------------------------------------------------


def serve_api(call: APICall, default_error_mode: str, request: Exchange) -> None:
    """Call a method of the server API. The call is not cancelled if the peer disconnects: its effects are complete."""
    request.respond_with(call(request.body), _api_response_maker(request, default_error_mode), cancels=False)


def serve_publish(
    publish: Callable[[bytes, DoneCallback], None],
    default_error_mode: str,
    serve_long: RequestHandler,
    request: Exchange,
) -> None:
    """Call the server API's method `publish`.

    serve_long: serves requests with long data, in slices.
    """
    if len(request.body) > LONG_BODY:
        serve_long(request)
        return

    def done(result: Any, error: BaseException | None) -> None:
        if error is None:
            request.respond(json_response(200, APIResponse(result=result)))
        else:
            request.respond_by(_api_response_maker(request, default_error_mode), result, error)

    publish(request.body, done)


def _api_response_maker(request: Exchange, default_error_mode: str) -> ResponseMaker:
    error_mode = request.head.get("x-centrifugo-error-mode") or default_error_mode
    return partial(_api_response, error_mode == "transport")


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
    proxies: TrustedProxies,
    another_worker_available: Callable[[], bool],
    cors_headers: Callable[[RequestHead], cors.Headers],
    request: Exchange,
    path_parameters: dict[str, str | int] | None = None,
) -> None:
    """Call the application's handler; it is cancelled if the peer disconnects.

    cors_headers: those of the response to a request. path_parameters: decoded.
    """
    head = request.head
    parameters = _parse_query(head.query) if head.query else {}
    app_request = Request(
        method=head.method,
        path=head.path,
        query=parameters,
        headers=head.headers,
        body=request.body,
        remote_address=proxies.client_address(request.peer, head.get_all("x-forwarded-for")),
        path_parameters=path_parameters or {},
    )
    own_headers = cors_headers(head)
    if route.is_immediate:
        result = error = None
        try:
            result = route.call_now(app_request)
        except Exception as raised:
            error = raised
        request.respond(_route_response(another_worker_available, own_headers, result, error))
    elif (cached := route.find_cached(app_request)) is not None:
        request.respond(_route_response(another_worker_available, own_headers, cached.value, None))
    else:
        make_response = partial(_route_response, another_worker_available, own_headers)
        request.respond_with(route.call(app_request), make_response, cancels=True)


def _route_response(
    another_worker_available: Callable[[], bool],
    cors_headers: cors.Headers,
    result: Any,
    error: BaseException | None,
) -> PreparedResponse:
    response: PreparedResponse = result if error is None else _error_response(another_worker_available, error)
    if not cors_headers:
        return response
    own = {name.lower() for name, _ in response.headers}
    if "access-control-allow-origin" in own:
        return response
    return msgspec.structs.replace(response, headers=response.headers + cors_headers)


def _error_response(another_worker_available: Callable[[], bool], error: BaseException) -> PreparedResponse:
    match error:
        case Overloaded() if another_worker_available():
            # The connection is closed: another worker serves the client when it reconnects.
            return msgspec.structs.replace(status_response(503, ("Retry-After", "1")), close=True)
        case HandlerTimeout() | PoolFull() | Overloaded():
            return status_response(503, ("Retry-After", str(random.randint(*RETRY_AFTER))))
        case ErrorAnswer():
            return error.response
        case ClientError():
            return json_response(STATUSES.get(error.code, 400), ErrorBody.of(error))
        case Disconnect():
            return status_response(403)
        case _:
            # The dispatcher logged the exception, or the handler was cancelled and the peer has gone.
            return status_response(500)


def _no_headers(head: RequestHead) -> cors.Headers:
    return ()


def _parse_query(query: str) -> dict[str, str]:
    """Return the last value of each parameter. The parser of the request's head limits their number."""
    return dict(parse_qsl(query, keep_blank_values=True))
