"""HTTP on the clients' port: the application's routes and files, the server API under its prefix, and services.

twisted.web parses requests and writes responses; the heads that it gets were judged by the front. What it leaves open
is closed here: a body has a limit and an absolute deadline and is never written to disk, a request that can't succeed
is refused from its head before the body is read, and nothing of an error but its code reaches the peer.
"""

from __future__ import annotations

import hmac
import random
import re
import sys
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from functools import partial
from http import HTTPStatus
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import msgspec
from twisted.internet.interfaces import IDelayedCall
from twisted.internet.protocol import connectionDone
from twisted.logger import Logger, LogPublisher
from twisted.python.failure import Failure
from twisted.web import http
from twisted.web.http_headers import Headers
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Site
from twisted.web.static import File, getTypeAndEncoding

from realtime import app as declared
from realtime.app import App, Static
from realtime.config.settings import HTTPAPISettings, Settings
from realtime.errors import INTERNAL_ERROR, ClientError, Disconnect, HandlerTimeout, Overloaded, PoolFull, RealtimeError
from realtime.handlers.coroutines import CoroutineDriver, drive
from realtime.handlers.dispatch import Dispatcher, HandlerCall
from realtime.handlers.results import PreparedResponse, json, plain
from realtime.http import cors
from realtime.http.body import too_many
from realtime.http.forwarded import TrustedProxies
from realtime.http.request import RequestHead
from realtime.metrics import Counter, Metrics
from realtime.server_api import http_api as server_api
from realtime.server_api.http_api import HTTPAPI, BadBody, BatchResult, ErrorBody, UnknownMethod
from realtime.transports.websocket import bad_input

# Parameters in one query.
MAX_PARAMETERS = 100
# Seconds for which what a refused peer still sends is read and thrown away: a reset would destroy the response.
LINGER = 2.0
# Seconds that a kept-alive connection may be idle.
IDLE = 60.0

# Seconds until a client may try again, each told another number.
RETRY_AFTER = (3, 10)

# Client error codes as HTTP statuses, in the API's transport error mode and for the application's routes alike.
STATUSES = {100: 500, 102: 404, 103: 403, 104: 404, 107: 400, 108: 400, 109: 401, 111: 429, 112: 416, 113: 409}

_log = Logger()


# What is refused and counted, with the status that says so.
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


def faulty(fault: str) -> PreparedResponse:
    """The refusal of one of `FAULTS`."""
    return msgspec.structs.replace(plain(FAULTS[fault]), fault=fault)


Serve = Callable[["HTTPRequest"], None]


class BodyRefused(RealtimeError):
    """The answer to a request was written before its body had come whole."""


class HTTPRequest(http.Request):
    """One request: its body in memory, within the limit, and its one answer."""

    channel: Any
    content: BytesIO
    _running: CoroutineDriver | None = None
    _size = 0
    _pieces = 0

    def gotLength(self, length: int | None) -> None:
        self.content = BytesIO()  # twisted.web's own goes to disk from 100,000 bytes on

    def parseCookies(self) -> None:
        pass

    def handleContentChunk(self, data: bytes) -> None:
        self._size += len(data)
        self._pieces += 1
        self.channel.take_body(self._size, self._pieces)
        self.content.write(data)

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        # In place of twisted.web's, which parses queries and forms without a limit.
        self.method, self.uri, self.clientproto = command, path, version
        self.path = path.partition(b"?")[0]
        self.site = self.channel.site
        try:
            found = self.site.door.find(command.decode("ascii"), path.decode("ascii"), self.requestHeaders)
            if isinstance(found, PreparedResponse):
                self.answer(found)
            else:
                found(self)
        except Exception:
            self.fail()

    def body(self) -> bytes:
        """The whole body."""
        return self.content.getvalue()

    def start(
        self, coroutine: Any, done: Callable[[Any, BaseException | None], PreparedResponse], cancel: bool
    ) -> None:
        """Run `coroutine` and answer with what `done` makes of its end. cancel: when the peer leaves before."""

        def ended(result: Any, error: BaseException | None) -> None:
            self._running = None
            try:
                answer = done(result, error)
            except Exception:
                self.fail()
            else:
                self.answer(answer)

        running = self.site.run(coroutine, ended)
        if cancel and not self.finished:
            self._running = running

    def answer(self, answer: PreparedResponse) -> None:
        """Write the response, unless the peer is gone."""
        if self._disconnected or self.finished:
            return
        self.site.count(answer.fault)
        self.setResponseCode(answer.status)
        if answer.close:
            self.channel.persistent = 0
            self.responseHeaders.addRawHeader("Connection", "close")
        for name, value in answer.all_headers():
            self.responseHeaders.addRawHeader(name.encode("latin-1", "replace"), value.encode("latin-1", "replace"))
        self.write(answer.body)
        self.finish()

    def fail(self) -> None:
        """Log the exception that is being handled, and say no more than 500."""
        _log.failure("a request failed")
        if self.startedWriting:
            self.loseConnection()
        else:
            self.responseHeaders = Headers()
            self.answer(plain(500))

    def connectionLost(self, reason: Failure) -> None:
        running, self._running = self._running, None
        super().connectionLost(reason)
        if running is not None:
            running.cancel()


class HTTPConnection(http.HTTPChannel):
    """A connection: bodies within limits of size and time, refusals that arrive."""

    site: HTTPSite
    transport: Any
    _networkProducer: Any
    requestFactory = HTTPRequest
    # The front has judged the head, by the limits of the settings.
    maxHeaders = totalHeadersSize = sys.maxsize
    # Twisted's own writes a line with the peer's address for each connection that was idle for long enough.
    _log = Logger(observer=LogPublisher())
    _deadline: IDelayedCall | None = None
    _refused = False
    _max_body_size = 0  # of the request that is being read

    def dataReceived(self, data: bytes) -> None:
        if not self._refused:
            super().dataReceived(data)

    def rawDataReceived(self, data: bytes) -> None:
        if not self._refused:
            with suppress(BodyRefused):
                super().rawDataReceived(data)

    def allHeadersReceived(self) -> None:
        if self.length == 0:
            super().allHeadersReceived()
            return
        self._judge_body()
        if not self._refused:
            super().allHeadersReceived()  # says "100 Continue" if the peer waits for it
            self._set_deadline(self.site.settings.body_timeout, partial(self._refuse_body, "body_timeout"))

    def allContentReceived(self) -> None:
        if not self._refused:
            self._set_deadline(0)
            super().allContentReceived()

    def take_body(self, size: int, pieces: int) -> None:
        """Judge a body of which `size` bytes have come in so many pieces. Raises Refused, so that no more is read."""
        if 0 < self._max_body_size < size:
            self._refuse_body("body_too_large")
        elif self.length is None and too_many(pieces, size):
            self._refuse_body("body_syntax")
        if self._refused:
            raise BodyRefused

    def refuse(self, answer: PreparedResponse) -> None:
        """Answer before the request has come whole, and read no more of it."""
        if self._refused:
            return
        self._refused = True
        self.site.count(answer.fault)
        self.setTimeout(None)
        self._networkProducer.unregisterProducer()
        lines = [f"HTTP/1.1 {answer.status} {HTTPStatus(answer.status).phrase}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in answer.all_headers()]
        self.transport.write("\r\n".join([*lines, "", ""]).encode("latin-1", "replace") + answer.body)
        self.transport.loseWriteConnection()
        self._set_deadline(LINGER, self.transport.abortConnection)

    def connectionLost(self, reason: Failure = connectionDone) -> None:
        self._set_deadline(0)
        super().connectionLost(reason)

    def release(self) -> bool:
        """Let go of the transport for good; False while a request is being answered."""
        if self.requests or self._refused or not self.persistent:
            return False
        self.setTimeout(None)
        self._networkProducer.unregisterProducer()
        self._networkProducer.resumeProducing()  # in case the last response has not left yet
        return True

    def _judge_body(self) -> None:
        """Refuse a request with a body by its head, if there is a reason."""
        headers, door = self.requests[-1].requestHeaders, self.site.door
        method, uri = self._command.decode("ascii"), self._path.decode("ascii")
        self._max_body_size = door.max_body_size(uri)
        found = door.find(method, uri, headers)
        if isinstance(found, PreparedResponse):
            self.refuse(found)
        elif _header(headers, "Content-Encoding").lower() not in ("", "identity"):
            self._refuse_body("body_encoding")
        elif self.length is not None and 0 < self._max_body_size < self.length:
            self._refuse_body("body_too_large")

    def _refuse_body(self, fault: str) -> None:
        """Say what is wrong with a body, so that the page that it is from can read it."""
        uri, headers = self._path.decode("ascii"), self.requests[-1].requestHeaders
        self.refuse(msgspec.structs.replace(faulty(fault), headers=self.site.door.sharing(uri, headers)))

    def _set_deadline(self, seconds: float, act: Callable[[], None] | None = None) -> None:
        """Set the one deadline of this connection, in place of the one before; 0 sets none."""
        if self._deadline is not None and self._deadline.active():
            self._deadline.cancel()
        self._deadline = self.site.reactor.callLater(seconds, act) if seconds and act else None


class HTTPSite(Site):
    """The factory of `HTTPConnection`s. It writes no access log: a URL may hold a key."""

    protocol = HTTPConnection  # type: ignore[assignment]
    noisy = False
    settings: HTTPAPISettings
    door: Router
    faults: dict[str, Counter]
    relieved: Callable[[], bool]
    proxies: TrustedProxies
    run: Callable[..., CoroutineDriver | None]

    def count(self, fault: str) -> None:
        """Count a refusal; "" is none."""
        if fault:
            self.faults[fault].value += 1

    def startFactory(self) -> None:
        pass

    def stopFactory(self) -> None:
        pass

    def log(self, request: http.Request) -> None:
        pass


def make_site(
    app: App,
    dispatcher: Dispatcher,
    api: HTTPAPI,
    settings: Settings,
    metrics: Metrics,
    reactor: Any = None,
    relieved: Callable[[], bool] = lambda: False,
    services: Mapping[str, CORSRoute] | None = None,
    proxies: TrustedProxies | None = None,
) -> HTTPSite:
    """The site of one worker.

    reactor: for deadlines; the process's own unless given. relieved: whether another worker can take new clients, so
    that whoever is refused had better connect anew. services: by path. proxies: those that are trusted.
    """
    site = HTTPSite(Resource(), requestFactory=HTTPRequest, timeout=IDLE, reactor=reactor)
    site.settings = settings.http_api
    site.faults = {fault: bad_input(metrics, fault) for fault in FAULTS}
    site.door = Router(app, dispatcher, api, settings.http_api, services or {})
    site.relieved = relieved
    site.run = partial(drive, accounts=dispatcher.accounts)
    site.proxies = proxies or TrustedProxies(())
    return site


class CORSRoute:
    """A path of the server's own, for the pages of allowed origins."""

    def __init__(
        self,
        methods: tuple[str, ...],
        origin_allowed: Callable[[RequestHead], bool],
        serve: Callable[[cors.Headers, HTTPRequest], None] | None = None,
        max_body_size: int = 1024,
    ) -> None:
        """serve: answers a request, with these headers among others; None where only OPTIONS comes here."""
        self.max_body_size = max_body_size
        self._methods = methods
        self._origin_allowed = origin_allowed
        self._serve = serve

    def find(self, head: RequestHead) -> Serve | PreparedResponse:
        """As `Router.find`."""
        if not self._origin_allowed(head):
            return faulty("origin")
        if head.method == "OPTIONS":
            return PreparedResponse(204, headers=cors.preflight(head, self._methods))
        if head.method not in self._methods:
            return plain(405, ("Allow", ", ".join((*self._methods, "OPTIONS"))))
        return partial(self._serve, cors.sharing(head)) if self._serve else plain(404)


def serve_init(shared: cors.Headers, request: HTTPRequest) -> None:
    """A small answer, with which a load balancer can send its cookie."""
    request.answer(msgspec.structs.replace(json(200, {}), headers=shared))


APICall = Callable[[bytes], Coroutine[Any, Any, msgspec.Struct]]


class Router:
    """Knows what each URL is for: a service, the server API, the application's routes, then its files."""

    def __init__(
        self,
        app: App,
        dispatcher: Dispatcher,
        api: HTTPAPI,
        settings: HTTPAPISettings,
        services: Mapping[str, CORSRoute],
    ) -> None:
        self._services = services
        self._dispatcher = dispatcher
        self._api = api
        self._settings = settings
        self._prefix = settings.handler_prefix.rstrip("/") + "/"
        self._key = settings.key.encode()
        self._statics = sorted(app.http.statics, key=lambda static: len(static.prefix), reverse=True)

    def find(self, method: str, uri: str, headers: Headers) -> Serve | PreparedResponse:
        """Who serves a request, judged by its head; or what it gets when nobody does."""
        path, _, query = uri.partition("?")
        service = self._services.get(path)
        if service is not None:
            return service.find(_head(method, uri, headers))
        if path.startswith(self._prefix) and not self._settings.disabled:
            return self._find_method(method, partial(self._api.call, path.removeprefix(self._prefix)), query, headers)
        if method == "POST" and path + "/" == self._prefix and not self._settings.disabled:
            return self._find_method(method, self._api.call_named, query, headers)
        route = self._dispatcher.route("GET" if method == "HEAD" else method, path)
        if route is not None:
            return partial(serve_route, route, path, query)
        allowed = [verb for verb in ("GET", "POST") if self._dispatcher.route(verb, path) is not None]
        if allowed:
            return plain(405, ("Allow", ", ".join(allowed)))
        return self._find_file(method, path)

    def max_body_size(self, uri: str) -> int:
        """Bytes that the body of a request may have; 0 for no limit."""
        service = self._services.get(uri.partition("?")[0])
        return self._settings.max_body_size if service is None else service.max_body_size

    def sharing(self, uri: str, headers: Headers) -> cors.Headers:
        """What every answer of a service is sent with."""
        return cors.sharing(_head("POST", uri, headers)) if uri.partition("?")[0] in self._services else ()

    def _find_method(self, method: str, call: APICall, query: str, headers: Headers) -> Serve | PreparedResponse:
        if method != "POST":
            return plain(405, ("Allow", "POST"))
        if not self._settings.insecure and not self._has_key(query, headers):
            return PreparedResponse(401, fault="api_key")  # the body is empty by the API's contract
        return partial(serve_api, call)

    def _has_key(self, query: str, headers: Headers) -> bool:
        """Whether the request brings the key; no request does when none is configured."""
        given = _header(headers, "X-API-Key")
        if not given and headers.hasHeader("Authorization"):
            scheme, _, given = _header(headers, "Authorization").partition(" ")
            given = given.strip() if scheme.lower() == "apikey" else ""
        elif not given:
            given = (_parameters(query) or {}).get("api_key", "")
        # By the bytes that the peer sent, in a time that tells nothing of how much of it is right.
        return bool(self._key) and hmac.compare_digest(given.encode("latin-1", "replace"), self._key)

    def _find_file(self, method: str, path: str) -> Serve | PreparedResponse:
        for static in self._statics:
            if path + "/" == static.prefix:
                return plain(308, ("Location", static.prefix))
            if path.startswith(static.prefix):
                file = locate(static, path.removeprefix(static.prefix))
                if file is None:
                    break
                return partial(serve_file, file) if method in ("GET", "HEAD") else plain(405, ("Allow", "GET, HEAD"))
        return plain(404)


# -- the server API ---------------------------------------------------------------------------------------------------


def serve_api(call: APICall, request: HTTPRequest) -> None:
    """Call a method of the server API. It runs to its end even if the peer leaves: what was asked for is done."""
    mode = request.getHeader("X-Centrifugo-Error-Mode") or request.site.settings.error_mode
    bare_errors = mode == "transport"
    request.start(call(request.body()), partial(_api_answer, bare_errors), cancel=False)


def _api_answer(bare_errors: bool, result: Any, error: BaseException | None) -> PreparedResponse:
    match error:
        case None:
            # A batch is the one result without a wrapper.
            return json(200, result if isinstance(result, BatchResult) else server_api.APIResponse(result=result))
        case UnknownMethod():
            return plain(404)
        case BadBody():
            return plain(400)
        case ClientError():
            refused = error
        case _:
            _log.failure("a call of the server API failed", Failure(error))
            refused = ClientError(*INTERNAL_ERROR)
    body = ErrorBody.of(refused)
    return json(STATUSES.get(refused.code, 400), body) if bare_errors else json(200, server_api.APIResponse(error=body))


# -- the application's routes -----------------------------------------------------------------------------------------


def serve_route(route: HandlerCall, path: str, query: str, request: HTTPRequest) -> None:
    """Call the application's handler; it is cancelled when the peer leaves."""
    parameters = _parameters(query)
    if parameters is None:
        request.answer(faulty("parameters"))
        return
    headers = {
        name.decode("latin-1").lower(): b", ".join(values).decode("latin-1")
        for name, values in request.requestHeaders.getAllRawHeaders()
    }
    asked = declared.Request(
        method=request.method.decode("ascii"),
        path=path,
        query=parameters,
        headers=headers,
        body=request.body(),
        remote_address=request.site.proxies.client(
            getattr(request.client, "host", ""), [headers.get("x-forwarded-for", "")]
        ),
    )
    request.start(route.perform(asked), partial(_route_answer, request.site.relieved), cancel=True)


def _route_answer(relieved: Callable[[], bool], result: Any, error: BaseException | None) -> PreparedResponse:
    match error:
        case None:
            answer: PreparedResponse = result
            return answer
        case Overloaded() if relieved():
            # Whoever connects anew is served by another worker.
            return msgspec.structs.replace(plain(503, ("Retry-After", "1")), close=True)
        case HandlerTimeout() | PoolFull() | Overloaded():
            return plain(503, ("Retry-After", str(random.randint(*RETRY_AFTER))))
        case ClientError():
            return json(STATUSES.get(error.code, 400), ErrorBody.of(error))
        case Disconnect():
            return plain(403)
        case _:
            return plain(500)  # the dispatcher logged it, or the handler was cancelled and nobody reads this


# -- files ------------------------------------------------------------------------------------------------------------


def locate(static: Static, path: str) -> Path | None:
    """The file that a URL path below the prefix names, or None.

    Nothing outside the directory is ever named, by whatever spelling or symbolic link, and nothing hidden.
    """
    try:
        *folders, name = [unquote(part, errors="strict") for part in path.split("/")]
    except UnicodeDecodeError:
        return None
    parts = [*folders, name or "index.html"]
    if any(not part or part.startswith(".") or any(sign in part for sign in "/\\\0") for part in parts):
        return None
    try:
        file = static.directory.joinpath(*parts).resolve(strict=True)
    except OSError:
        return None
    return file if file.is_file() and file.is_relative_to(static.directory) else None


# The forms that browsers use of the headers by which a file is served in part or not at all. What has another form may
# be ignored (RFC 9110 sections 13.1.3 and 14.2), and is: twisted.web would repeat it in the log, stumble over it, or
# send a thousand parts for one request.
_RANGE = re.compile(r"bytes=(?:([0-9]{1,15})-([0-9]{0,15})|-0*[1-9][0-9]{0,14})")
_SINCE = re.compile(r"[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2} GMT")


def _is_range(text: str) -> bool:
    found = _RANGE.fullmatch(text)
    return found is not None and int(found[1] or 0) <= int(found[2] or 10**15)


def serve_file(file: Path, request: HTTPRequest) -> None:
    """Send a file, or the part of it that was asked for; the peer may keep it, and asks whether it has changed."""
    headers = request.requestHeaders
    for name, is_usual in (("Range", _is_range), ("If-Modified-Since", _SINCE.fullmatch)):
        values = headers.getRawHeaders(name.encode(), [])
        if len(values) > 1 or not all(is_usual(value.decode("latin-1")) for value in values):
            headers.removeHeader(name)
    resource = File(str(file))
    kind, resource.encoding = getTypeAndEncoding(
        file.name, File.contentTypes, File.contentEncodings, "application/octet-stream"
    )
    resource.type = f"{kind}; charset=utf-8" if kind.startswith("text/") else kind
    for name, value in PreparedResponse(200, headers=(("Cache-Control", "no-cache"),)).all_headers():
        if name != "Content-Length":
            request.setHeader(name, value)
    result = resource.render_GET(request)
    if result is not NOT_DONE_YET:
        request.write(result)
        request.finish()


# -- small things -----------------------------------------------------------------------------------------------------


def _head(method: str, uri: str, headers: Headers) -> RequestHead:
    """The head of a request again, as it was before twisted.web took it."""
    fields = [
        (name.decode("ascii").lower(), value.decode("latin-1"))
        for name, values in headers.getAllRawHeaders()
        for value in values
    ]
    return RequestHead(method, uri, "1.1", tuple(fields), 0)


def _header(headers: Headers, name: str) -> str:
    values = headers.getRawHeaders(name.encode())
    return values[0].decode("latin-1") if values else ""


def _parameters(query: str) -> dict[str, str] | None:
    """The parameters of a query, the last of each name; None when there are too many."""
    try:
        return dict(parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_PARAMETERS))
    except ValueError:
        return None
