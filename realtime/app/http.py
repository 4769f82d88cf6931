"""The HTTP side of an application: requests, responses, routes and static files."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as record_field
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar, Unpack, overload

import msgspec

from realtime.app.cookies import Cookie, parse_cookies
from realtime.app.data_types import BAD_DATA
from realtime.app.declarations import HandlerOptions, Policy, RunIn, calling_line, defining_line
from realtime.app.forms import MAX_FIELDS, Form, parse_form
from realtime.app.path_patterns import parse_pattern
from realtime.cache import Cache
from realtime.errors import BAD_REQUEST, ClientError, SettingsError

Data = TypeVar("Data")


class Request(msgspec.Struct, frozen=True):
    """One HTTP request.

    path: as sent, without the query. query: the last value of each name, decoded. headers: names in lower case.
    path_parameters: the values of the parameters in the route's path, decoded; an int for `{name:int}`.
    """

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    remote_address: str = ""
    path_parameters: dict[str, str | int] = {}

    @property
    def cookies(self) -> dict[str, str]:
        """The cookies by name, as sent; see `realtime.app.cookies.parse_cookies`."""
        return parse_cookies(self.headers.get("cookie", ""))

    @overload
    def json(self) -> Any: ...

    @overload
    def json(self, type: type[Data]) -> Data: ...

    @overload
    def json(self, type: Any) -> Any: ...

    def json(self, type: Any = Any) -> Any:
        """Return the decoded body.

        Raises ClientError 107, answered with status 400, if it is not JSON. type: of the result, one that msgspec
        converts to, such as a Struct; then the error is 400, with the place of the mistake.
        """
        try:
            return msgspec.json.decode(self.body, type=type)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            if type is Any:
                raise ClientError(*BAD_REQUEST) from None
            raise ClientError(BAD_DATA, str(error)) from None

    def form(self, max_fields: int = MAX_FIELDS) -> Form:
        """Return the fields and files of the form in the body, URL-encoded or multipart/form-data.

        Raises ClientError 400 for another body, and for one with more than `max_fields` fields and files.
        `http_api.max_body_size` limits the size of bodies.
        """
        return parse_form(self.headers.get("content-type", ""), self.body, max_fields)

    def cache_key(self) -> Hashable:
        """Return the default key of a cached answer. It includes cookies and authorization, which tell users apart."""
        credentials = self.headers.get("cookie"), self.headers.get("authorization")
        return self.method, self.path, tuple(sorted(self.query.items())), self.body, credentials


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP response with its status, headers and body.

    A `str` body is sent as UTF-8. cookies: set by the response.
    """

    status: int = 200
    headers: Mapping[str, str] = record_field(default_factory=dict)
    body: bytes | str = b""
    cookies: Sequence[Cookie] = ()


@dataclass(frozen=True, slots=True)
class Static:
    """A directory that is served under a URL prefix; the prefix ends in a slash."""

    prefix: str
    directory: Path


class RouteOptions(TypedDict, total=False):
    """The options of a route; see `HTTP.get`."""

    run: RunIn | None
    timeout: float | None
    limit: int | None
    pressure: Policy | None
    cache: Cache | None


RouteFunction = TypeVar("RouteFunction", bound=Callable[[Request], Any])
AnyFunction = TypeVar("AnyFunction", bound=Callable[..., Any])


ErrorFunction = Callable[[Request, Any], Any]
"""Answers an exception of a handler; see `HTTP.on_error`."""

Failed = TypeVar("Failed", bound=Exception)
Answer = Callable[[Request, Failed], Any]


class Declare(Protocol):
    """Records a handler in its App; see `App`."""

    def __call__(self, kind: str, key: str, options: HandlerOptions, /) -> Callable[[AnyFunction], AnyFunction]: ...


class HTTP:
    """The routes and static files of an App, as `app.http`.

    A handler receives a `Request`. It returns a dict or a list (sent as JSON), a str (sent as plain text), bytes, None
    (status 204) or a `Response`. A `ClientError` becomes a response with a 4xx status, its code and message as JSON.
    """

    def __init__(self, declare: Declare) -> None:
        self._declare = declare
        self.statics: list[Static] = []
        self.errors: dict[type[Exception], ErrorFunction] = {}
        self._by_shape: dict[str, tuple[str, str]] = {}  # the routes with their places

    def get(self, path: str, **options: Unpack[RouteOptions]) -> Callable[[RouteFunction], RouteFunction]:
        """Answer GET and HEAD requests for this path.

        A segment of the path may be a parameter, `{name}` or `{name:int}`: "/rooms/{room}/messages/{number:int}". The
        handler gets the values, decoded, as `Request.path_parameters`. A path without parameters has precedence over
        one with; of two with parameters the segments decide, from the left: a literal before an `int`, an `int` before
        a text. Raises SettingsError for two routes of one method that match the same paths.

        pressure: the policy for requests while the worker is overloaded, as for `App.rpc`; a refused request gets
        status 503. The default is "stale" for a route with a cache and "refuse" for any other.
        run, timeout, limit, cache: see `App.rpc`.
        """
        return self._route("GET", path, HandlerOptions(**options))

    def post(self, path: str, **options: Unpack[RouteOptions]) -> Callable[[RouteFunction], RouteFunction]:
        """Answer POST requests for this path; see `get`."""
        return self._route("POST", path, HandlerOptions(**options))

    def put(self, path: str, **options: Unpack[RouteOptions]) -> Callable[[RouteFunction], RouteFunction]:
        """Answer PUT requests for this path; see `get`."""
        return self._route("PUT", path, HandlerOptions(**options))

    def patch(self, path: str, **options: Unpack[RouteOptions]) -> Callable[[RouteFunction], RouteFunction]:
        """Answer PATCH requests for this path; see `get`."""
        return self._route("PATCH", path, HandlerOptions(**options))

    def delete(self, path: str, **options: Unpack[RouteOptions]) -> Callable[[RouteFunction], RouteFunction]:
        """Answer DELETE requests for this path; see `get`."""
        return self._route("DELETE", path, HandlerOptions(**options))

    def on_error(self, kind: type[Failed]) -> Callable[[Answer[Failed]], Answer[Failed]]:
        """Answer exceptions of this type that the handlers of routes raise; the function takes (request, error).

        It returns what a handler may return, mostly a `Response`, and runs where the handler ran: so it is a plain
        function that does not wait. It also answers the subtypes that have no function of their own, ClientError
        included. An answered exception is not logged, and no cache keeps the answer. Raises SettingsError.
        """
        place = calling_line()
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise SettingsError([f"{place}: @app.http.on_error needs a type of exceptions, as in on_error(KeyError)"])

        def declare(function: Answer[Failed]) -> Answer[Failed]:
            place, name = defining_line(function), f"on_error({kind.__name__})"
            if kind in self.errors:
                first = defining_line(self.errors[kind])
                raise SettingsError([f"{place}: {name} is declared a second time; the first is at {first}"])
            if inspect.iscoroutinefunction(function):
                raise SettingsError([f"{place}: {name} is a coroutine; use a plain function that does not wait"])
            try:
                inspect.signature(function).bind("request", "error")
            except TypeError:
                raise SettingsError([f"{place}: {name} is called with (request, error)"]) from None
            self.errors[kind] = function
            return function

        return declare

    def static(self, prefix: str, directory: str | Path) -> None:
        """Serve the files of a directory under a URL prefix; "index.html" is the page of the directory itself.

        directory: relative to the calling file. Files whose name begins with a dot are not served. The longest prefix
        wins, and a route wins over a file. Raises SettingsError if the directory does not exist.
        """
        root = Path(sys._getframe(1).f_code.co_filename).parent / directory
        if not prefix.startswith("/"):
            raise SettingsError([f"{calling_line()}: a URL prefix must begin with a slash, unlike {prefix!r}"])
        if not root.is_dir():
            raise SettingsError([f"{calling_line()}: the directory {str(root)!r} does not exist"])
        prefix = prefix.rstrip("/") + "/"
        if any(static.prefix == prefix for static in self.statics):
            raise SettingsError([f"{calling_line()}: the URL prefix {prefix!r} is declared a second time"])
        self.statics.append(Static(prefix, root.resolve()))

    def _route(self, method: str, path: str, options: HandlerOptions) -> Callable[[RouteFunction], RouteFunction]:
        if not isinstance(path, str) or not path.startswith("/") or "?" in path or not path.isascii():
            raise SettingsError(
                [f'{calling_line()}: a path must begin with a slash and be ASCII, as in @app.http.get("/path")']
            )
        try:
            pattern = parse_pattern(path)
        except ValueError as error:
            raise SettingsError([f"{calling_line()}: the path {path!r} is wrong: {error}"]) from None
        route, shape = f"{method} {path}", f"{method} {pattern.shape}"
        declare = self._declare("http", route, options)

        def declare_once(function: RouteFunction) -> RouteFunction:
            earlier, place = self._by_shape.get(shape, (route, ""))
            if earlier != route:
                raise SettingsError(
                    [f"{defining_line(function)}: {route} matches the same paths as {earlier}, declared at {place}"]
                )
            declared = declare(function)
            self._by_shape[shape] = route, defining_line(function)
            return declared

        return declare_once
