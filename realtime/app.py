"""The application: where handlers are declared, and from where the application publishes.

    from realtime import App

    app = App()

    @app.on_subscribe("chat:*")
    async def may_join(client, channel):            # a coroutine runs on the loop
        return bool(client.user)

    @app.rpc("report", timeout=5, limit=2)
    def report(client, data):                       # a plain function runs in a thread
        app.publish("chat:news", {"asked by": client.user})
        return {"total": 42}

All about a handler is decided when it is declared: what it is for, where it runs, which arguments it takes. A mistake
is an error there and then, as `SettingsError` with one line that names the function's file and line. An `App` does
nothing by itself and knows no socket; the server binds itself to it at the start (`App.bind`), in every worker.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping
from dataclasses import dataclass
from dataclasses import field as record_field
from pathlib import Path
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import msgspec

from realtime.cache import Cache, taken_apart
from realtime.config.settings import AppSettings
from realtime.errors import BAD_REQUEST, FORCE_DISCONNECT, ClientError, SettingsError
from realtime.types import ClientInfo, ConnectRequest, Credentials, Grant, HistoryPage, Position

__all__ = ["App", "Client", "ConnectRequest", "Credentials", "Grant", "Handler", "Request", "Response", "load"]

Function = TypeVar("Function", bound=Callable[..., Any])
T = TypeVar("T")


class Client(Protocol):
    """One connected client, as a handler gets it. Its methods may be called from the loop and from threads alike."""

    @property
    def id(self) -> str:
        """Names this connection; a client that comes back gets another."""

    @property
    def user(self) -> str:
        """The application's user id, "" for an anonymous connection."""

    @property
    def info(self) -> Any:
        """What its credentials say about it, shown to others; None for nothing."""

    @property
    def meta(self) -> Any:
        """What its connection token says for the server's eyes only; None for nothing."""

    @property
    def name(self) -> str:
        """The SDK or application that connected, in its own words."""

    @property
    def version(self) -> str:
        """The version of that, in its own words."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of the WebSocket handshake, names in lower case."""

    @property
    def remote_address(self) -> str:
        """The peer's address."""

    @property
    def channels(self) -> Iterable[str]:
        """The channels that it is subscribed to now."""

    @property
    def under_pressure(self) -> bool:
        """Whether this worker has more to do than it can: cheaper answers are welcome."""

    def send(self, data: Any) -> None:
        """Send it a message outside any channel. data: anything that JSON can carry."""

    def subscribe(self, channel: str, grant: Grant | None = None) -> None:
        """Begin a subscription from the server's side, whatever the channel's options permit; the client is told.

        Nothing happens if it is subscribed already. Raises ValueError for a Grant with an override that is unknown.
        """

    def refresh(self, expire_at: int | None = None, info: Any = None) -> None:
        """Have its connection expire at `expire_at` (Unix seconds; None for never), at once if that has passed.

        info: takes the place of what its credentials said of it; None leaves it.
        """

    def unsubscribe(self, channel: str) -> None:
        """End its subscription to `channel`, if it has one."""

    def disconnect(self, code: int = FORCE_DISCONNECT[0], reason: str = FORCE_DISCONNECT[1]) -> None:
        """Close its connection; see `realtime.errors.Disconnect` for the codes."""


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP request. query: the last value of each name, decoded. headers: names in lower case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes
    remote_address: str = ""

    def json(self) -> Any:
        """The body, decoded. Raises ClientError 107 (answered with status 400) when it is no JSON."""
        try:
            return msgspec.json.decode(self.body)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ClientError(*BAD_REQUEST) from None

    def cache_key(self) -> Hashable:
        """What a cached answer depends on unless its Cache has a key; cookies and authorization tell users apart."""
        users = self.headers.get("cookie"), self.headers.get("authorization")
        return self.method, self.path, tuple(sorted(self.query.items())), self.body, users


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP answer with everything said. A str body is sent as UTF-8."""

    status: int = 200
    headers: Mapping[str, str] = record_field(default_factory=dict)
    body: bytes | str = b""


@dataclass(frozen=True, slots=True)
class Static:
    """A directory whose files are served under a URL prefix that ends in a slash."""

    prefix: str
    directory: Path


# Where a handler runs: see `App.rpc`.
PLACES = ("loop", "thread", "process", "auto")
# What becomes of a call while its worker is under pressure: see `App.rpc`.
POLICIES = ("refuse", "stale", "ignore")
Policy = str | Callable[..., str]


@dataclass(frozen=True, slots=True)
class Manner:
    """How a handler is to be called, as its declaration says; see `App.rpc` and `HTTP.get`."""

    run: str | None = None
    timeout: float | None = None
    limit: int | None = None
    pressure: Policy | None = None
    cache: Cache | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Handler:
    """One declared function, and how to call it.

    kind: what it is for, a key of `ARGUMENTS`. name: for logs and metrics, unique in its App. run: one of `PLACES`.
    timeout: seconds, None for the configured default, 0 for no limit. limit: calls at a time, None for no limit.
    place: "file:line". taken: which of its kind's arguments it takes. pressure: a policy, or a function of the same
    arguments that chooses one. cache: of its answers, if they are kept.
    """

    function: Callable[..., Any]
    kind: str
    name: str
    run: str
    timeout: float | None
    limit: int | None
    place: str
    taken: slice
    pressure: Policy = "ignore"
    cache: Cache | None = None


# What each kind is called with, and the ways in which a function may take it, the fullest first.
ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[slice, ...]]] = {
    "on_connecting": (("request",), (slice(None),)),
    "on_disconnected": (("client",), (slice(None),)),
    "on_subscribe": (("client", "channel", "data"), (slice(3), slice(2))),
    "on_publish": (("client", "channel", "data"), (slice(None),)),
    "on_message": (("client", "data"), (slice(None),)),
    "rpc": (("client", "data"), (slice(2), slice(1, 2))),
    "http": (("request",), (slice(None),)),
    "on_start": ((), (slice(None),)),
    "on_stop": ((), (slice(None),)),
}


class Server(Protocol):
    """What an App needs of the server: coroutines that are not started yet, see `realtime.server_api.operations`."""

    def publish(
        self,
        channel: str,
        data: bytes,
        *,
        binary: bool,
        tags: dict[str, str] | None,
        skip_history: bool,
        idempotency_key: str,
        delta: bool,
        version: int,
        version_epoch: str,
    ) -> Coroutine[Any, Any, Position]: ...

    def broadcast(
        self, channels: list[str], data: bytes, **marks: Any
    ) -> Coroutine[Any, Any, list[Position | ClientError]]: ...

    def history(
        self, channel: str, *, limit: int, since: Position | None, reverse: bool
    ) -> Coroutine[Any, Any, HistoryPage]: ...

    def history_remove(self, channel: str) -> Coroutine[Any, Any, None]: ...

    def presence(self, channel: str) -> Coroutine[Any, Any, dict[str, ClientInfo]]: ...

    def presence_stats(self, channel: str) -> Coroutine[Any, Any, tuple[int, int]]: ...

    def channels(self, pattern: str) -> Coroutine[Any, Any, dict[str, int]]: ...

    def info(self) -> Coroutine[Any, Any, list[dict[str, Any]]]: ...

    def subscribe(
        self,
        user: str,
        channel: str,
        *,
        client: str,
        session: str,
        info: bytes,
        data: bytes,
        recover_since: Position | None,
        override: Mapping[str, bool] | None,
        expire_at: float,
    ) -> Coroutine[Any, Any, None]: ...

    def unsubscribe(self, user: str, channel: str, *, client: str, session: str) -> Coroutine[Any, Any, None]: ...

    def disconnect(
        self, user: str, *, client: str, session: str, whitelist: Iterable[str], code: int, reason: str
    ) -> Coroutine[Any, Any, None]: ...

    def refresh(
        self, user: str, *, client: str, session: str, expired: bool, expire_at: float, info: bytes
    ) -> Coroutine[Any, Any, None]: ...


class App:
    """An application: its handlers, its HTTP routes, and its voice.

    The methods from `publish` to `refresh` mean the same everywhere. On the loop they start at once and return an
    awaitable of the result, which need not be awaited; in a thread, and in the process of a handler, they return the
    result itself. They raise ClientError (its `code` says why: 102 unknown channel, 106 too much, 107 bad request, 108
    the channel has not got that feature) and EngineUnavailable, after which nothing was published.

    options: the table `[app.options]` of the configuration, there from the moment the server loads the application.
    """

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.http = HTTP(self)
        self._handlers: dict[str, dict[str, Handler]] = {kind: {} for kind in ARGUMENTS}
        self._server: Server | None = None
        self._perform: Callable[[Coroutine[Any, Any, Any]], Any] = _not_running
        self._pressing: Callable[[], tuple[str, ...]] = tuple

    # -- declaring handlers -------------------------------------------------------------------------------------------

    def on_connecting(self, function: Function) -> Function:
        """Decide who is let in: called with a ConnectRequest.

        Return Credentials, or None to leave the decision to the token and the configuration. Raise ClientError or
        Disconnect to refuse.
        """
        return self._declare("on_connecting", "", function)

    def on_disconnected(self, function: Function) -> Function:
        """Learn that a client that was connected is gone: called with the client."""
        return self._declare("on_disconnected", "", function)

    def on_subscribe(
        self,
        pattern: str,
        *,
        run: str | None = None,
        timeout: float | None = None,
        limit: int | None = None,
        pressure: Policy = "ignore",
    ) -> Callable[[Function], Function]:
        """Decide who may hear a channel: called with (client, channel) or (client, channel, data).

        pattern: a channel name or a glob such as "chat:*"; an exact name wins over globs, among globs the first
        declared. Return a Grant, True or None to allow; False refuses with 103; or raise ClientError or Disconnect.
        run, timeout, limit, pressure: see `rpc`.
        """
        return self._declarer("on_subscribe", pattern, Manner(run, timeout, limit, pressure))

    def on_publish(
        self,
        pattern: str,
        *,
        run: str | None = None,
        timeout: float | None = None,
        limit: int | None = None,
        pressure: Policy = "ignore",
    ) -> Callable[[Function], Function]:
        """Decide what a client may publish: called with (client, channel, data) before anybody sees it.

        Return None to publish the data as it came, or what to publish instead; raise ClientError or Disconnect to
        refuse. pattern: as for `on_subscribe`. run, timeout, limit, pressure: see `rpc`.
        """
        return self._declarer("on_publish", pattern, Manner(run, timeout, limit, pressure))

    def on_message(self, function: Function) -> Function:
        """Take a client's message, for which it expects no answer: called with (client, data)."""
        return self._declare("on_message", "", function)

    def rpc(
        self,
        method: str,
        *,
        run: str | None = None,
        timeout: float | None = None,
        limit: int | None = None,
        pressure: Policy = "ignore",
        cache: Cache | None = None,
    ) -> Callable[[Function], Function]:
        """Answer a client's call of `method`: called with (client, data), or with (data) if it takes just one argument.

        What it returns is the answer: anything that JSON can carry. Raise ClientError or Disconnect to refuse.
        run: as a rule left out: a coroutine runs on the "loop" and a plain function in a "thread". For a plain function
        there is also "process": in another process, of which it may use a core; it gets copies of its arguments and no
        client, and its answer has 1 MiB at most. And "auto": on the loop while it
        is quick, in threads from the third call within a minute that held up the loop for `loop.lagging` (50 ms), and
        on the loop again when no call has been that slow for a minute.
        timeout: seconds, waiting for a thread included; the configured `workers.handler_timeout` unless given, 0 for
        none. A coroutine is cancelled then, and a process killed; a thread can't be, so its result is dropped.
        limit: how many calls of it run at a time in each worker; more of them wait.
        pressure: what becomes of a call while the worker is under pressure: "ignore" and call the handler, "refuse" it
        with the temporary error 111, or answer with what the cache has, however "stale" it may be, and refuse where it
        has nothing. Or a function of the handler's arguments that returns one of these; it runs on the loop.
        cache: keeps the answers; see `realtime.Cache`.
        """
        return self._declarer("rpc", method, Manner(run, timeout, limit, pressure, cache))

    def on_start(self, function: Function) -> Function:
        """Run once in each worker before it takes clients; takes no argument. Several run in order of declaration."""
        return self._declare("on_start", str(len(self._handlers["on_start"])), function)

    def on_stop(self, function: Function) -> Function:
        """Run once in each worker when it stops, last declared first; takes no argument."""
        return self._declare("on_stop", str(len(self._handlers["on_stop"])), function)

    def handlers(self, kind: str) -> dict[str, Handler]:
        """The handlers of one kind, by pattern, method or route, in order of declaration."""
        return dict(self._handlers[kind])

    def _declarer(self, kind: str, key: str, manner: Manner) -> Callable[[Function], Function]:
        if not isinstance(key, str) or not key:
            place = _place(key) if callable(key) else _caller()
            raise SettingsError([f'{place}: @app.{kind} needs a name or pattern, as in @app.{kind}("name")'])

        def declare(function: Function) -> Function:
            return self._declare(kind, key, function, manner)

        return declare

    def _declare(self, kind: str, key: str, function: Function, manner: Manner = Manner()) -> Function:
        """Check one declaration and keep it. Raises SettingsError; the function itself is returned unchanged."""
        place = _place(function)
        name = f"{kind} {key}".rstrip()
        earlier = self._handlers[kind].get(key)
        if self._server is not None:
            raise SettingsError([f"{place}: {name} is declared after the server started"])
        if earlier is not None:
            raise SettingsError([f"{place}: {name} is declared a second time; the first is at {earlier.place}"])
        if manner.timeout is not None and not manner.timeout >= 0:
            raise SettingsError([f"{place}: the timeout of {name} is a number of seconds, 0 for none"])
        if manner.limit is not None and not manner.limit >= 1:
            raise SettingsError([f"{place}: the limit of {name} is 1 or more"])
        subject = f"{place}: {name}"
        called, cache = _cached(function, kind, name, manner.cache, subject)
        run = _where(called, manner.run, subject)
        self._handlers[kind][key] = Handler(
            called,
            kind,
            name,
            run,
            manner.timeout,
            manner.limit,
            place,
            _taken(called, kind, run, subject),
            _policy(manner.pressure, kind, cache, subject),
            cache,
        )
        return function

    # -- acting on channels and clients -------------------------------------------------------------------------------

    def bind(
        self,
        server: Server,
        perform: Callable[[Coroutine[Any, Any, Any]], Any],
        pressing: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """For the server: connect what follows. perform: runs one of its coroutines wherever the caller is.

        pressing: what presses the worker. From then on no handler can be declared.
        """
        self._server, self._perform, self._pressing = server, perform, pressing

    @property
    def pressure(self) -> tuple[str, ...]:
        """What this worker has too much of just now, of "lag", "rss", "queued_bytes", "threads_waiting"; () for none.

        The limits are those of `[loop]` in the configuration. May be read in any thread.
        """
        return self._pressing()

    def publish(
        self,
        channel: str,
        data: Any,
        *,
        tags: dict[str, str] | None = None,
        skip_history: bool = False,
        idempotency_key: str = "",
        delta: bool = False,
        version: int = 0,
        version_epoch: str = "",
        binary: bool = False,
    ) -> Any:
        """Publish to a channel; the Position that the publication got, (0, "") in a channel without history.

        data: anything that JSON can carry; msgspec.Raw for text that is JSON already. skip_history: neither keep it nor
        number it. idempotency_key: a repeat within 300 s publishes nothing and returns the first position. delta:
        subscribers that agreed on deltas are sent the difference to the publication before. version: of what is
        published; when the channel has had this one or a later one, nothing is published, and the position is that of
        the newest. Needs history. version_epoch: versions of another epoch start anew. binary: `data` is bytes, sent
        as they are; unless they are JSON text, only clients that speak Protobuf can be sent them.
        """
        return self._perform(
            self._bound.publish(
                channel,
                _payload(data, binary),
                binary=binary,
                tags=tags,
                skip_history=skip_history,
                idempotency_key=idempotency_key,
                delta=delta,
                version=version,
                version_epoch=version_epoch,
            )
        )

    def broadcast(
        self,
        channels: Iterable[str],
        data: Any,
        *,
        tags: dict[str, str] | None = None,
        skip_history: bool = False,
        idempotency_key: str = "",
        delta: bool = False,
        version: int = 0,
        version_epoch: str = "",
        binary: bool = False,
    ) -> Any:
        """Publish the same to many channels; a list with a Position or a ClientError for each, in the same order.

        All else is as for `publish`.
        """
        return self._perform(
            self._bound.broadcast(
                list(channels),
                _payload(data, binary),
                binary=binary,
                tags=tags,
                skip_history=skip_history,
                idempotency_key=idempotency_key,
                delta=delta,
                version=version,
                version_epoch=version_epoch,
            )
        )

    def history(self, channel: str, *, limit: int = -1, since: Position | None = None, reverse: bool = False) -> Any:
        """The kept publications of a channel and the top of its stream, as a HistoryPage; their `data` is JSON text.

        limit: at most so many, -1 for all, 0 for the position alone. since: only those after it (reverse: before it).
        reverse: newest first. A page ends at 4 MiB; ask again, since its last one. Raises ClientError 112 when `since`
        is of another epoch.
        """
        return self._perform(self._bound.history(channel, limit=limit, since=since, reverse=reverse))

    def history_remove(self, channel: str) -> Any:
        """Drop the kept publications of a channel; its numbering goes on."""
        return self._perform(self._bound.history_remove(channel))

    def presence(self, channel: str) -> Any:
        """Who is subscribed to a channel, as a dict of ClientInfo by client id."""
        return self._perform(self._bound.presence(channel))

    def presence_stats(self, channel: str) -> Any:
        """The number of clients subscribed to a channel and of distinct users among them."""
        return self._perform(self._bound.presence_stats(channel))

    def channels(self, pattern: str = "") -> Any:
        """The channels that have subscribers, as a dict of their numbers by name.

        pattern: only those that it fits, with `*`, `?`, `[a-z]` and `{this,that}`. Each worker is asked for its own.
        Raises ClientError 107 for a pattern that can't be, and 106 when the names are more than 4 MiB.
        """
        return self._perform(self._bound.channels(pattern))

    def info(self) -> Any:
        """What the server says of itself: a list with one dict for each node, as in the HTTP API."""
        return self._perform(self._bound.info())

    # These reach the connections of a user on every worker: all, or the one of the client id `client`, or of the
    # session id `session` that some transports tell their client. The user "" is that of the anonymous connections.

    def subscribe(
        self,
        user: str,
        channel: str,
        *,
        client: str = "",
        session: str = "",
        info: Any = None,
        data: Any = None,
        recover_since: Position | None = None,
        override: Mapping[str, bool] | None = None,
        expire_at: float = 0.0,
    ) -> Any:
        """Subscribe the connections of `user` to a channel, whatever its options permit; each client is told.

        info: shown to others in the channel. data: goes to the client. recover_since: a position that the client knows;
        it is sent what came after, if that is kept. override: values in place of the channel's own options "presence",
        "join_leave", "force_push_join_leave", "force_recovery", "force_positioning". expire_at: Unix time in seconds at
        which the subscription expires, 0 for never. Who is subscribed already stays so.
        """
        return self._perform(
            self._bound.subscribe(
                user,
                channel,
                client=client,
                session=session,
                info=_optional(info),
                data=_optional(data),
                recover_since=recover_since,
                override=override,
                expire_at=expire_at,
            )
        )

    def unsubscribe(self, user: str, channel: str, *, client: str = "", session: str = "") -> Any:
        """End the subscriptions of `user` to a channel; each client is told."""
        return self._perform(self._bound.unsubscribe(user, channel, client=client, session=session))

    def disconnect(
        self,
        user: str,
        *,
        client: str = "",
        session: str = "",
        whitelist: Iterable[str] = (),
        code: int = FORCE_DISCONNECT[0],
        reason: str = FORCE_DISCONNECT[1],
    ) -> Any:
        """Close the connections of `user`. whitelist: ids of clients to spare. code, reason: see errors.Disconnect."""
        return self._perform(
            self._bound.disconnect(
                user, client=client, session=session, whitelist=tuple(whitelist), code=code, reason=reason
            )
        )

    def refresh(
        self,
        user: str,
        *,
        client: str = "",
        session: str = "",
        expired: bool = False,
        expire_at: float = 0.0,
        info: Any = None,
    ) -> Any:
        """Let the connections of `user` expire at another time, and tell the clients.

        expire_at: Unix time in seconds, 0 for never; a time that has passed, or `expired`, closes them with 3005.
        info: what others see of the client from now on; None leaves that as it is.
        """
        return self._perform(
            self._bound.refresh(
                user, client=client, session=session, expired=expired, expire_at=expire_at, info=_optional(info)
            )
        )

    @property
    def _bound(self) -> Server:
        if self._server is None:
            _not_running()
        return self._server


class HTTP:
    """The HTTP side of an App: `app.http`.

    A handler gets a Request and returns a dict or a list (sent as JSON), a str (as plain text), bytes, None (status
    204) or a Response. A ClientError that it raises is answered with a 4xx status, its code and message as JSON.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self.statics: list[Static] = []

    def get(
        self,
        path: str,
        *,
        run: str | None = None,
        timeout: float | None = None,
        limit: int | None = None,
        pressure: Policy | None = None,
        cache: Cache | None = None,
    ) -> Callable[[Function], Function]:
        """Answer GET and HEAD requests of exactly this path.

        pressure: what becomes of a request while the worker is under pressure, as for `App.rpc`; refused ones get
        status 503. Unless given it is "stale" for a route with a cache, and "refuse" for others. run, timeout, limit,
        cache: see `App.rpc`.
        """
        return self._route("GET", path, Manner(run, timeout, limit, pressure, cache))

    def post(
        self,
        path: str,
        *,
        run: str | None = None,
        timeout: float | None = None,
        limit: int | None = None,
        pressure: Policy | None = None,
        cache: Cache | None = None,
    ) -> Callable[[Function], Function]:
        """Answer POST requests of exactly this path; all else as for `get`."""
        return self._route("POST", path, Manner(run, timeout, limit, pressure, cache))

    def static(self, prefix: str, directory: str | Path) -> None:
        """Serve the files of a directory under a URL prefix; "index.html" stands for the directory itself.

        directory: relative to the file that calls this. Files whose name begins with a dot are not served. The longest
        prefix wins, and a route wins over files. Raises SettingsError when there is no such directory.
        """
        root = Path(sys._getframe(1).f_code.co_filename).parent / directory
        if not prefix.startswith("/"):
            raise SettingsError([f"{_caller()}: a URL prefix begins with a slash, unlike {prefix!r}"])
        if not root.is_dir():
            raise SettingsError([f"{_caller()}: there is no directory {str(root)!r} to serve"])
        prefix = prefix.rstrip("/") + "/"
        if any(static.prefix == prefix for static in self.statics):
            raise SettingsError([f"{_caller()}: files under {prefix!r} are declared a second time"])
        self.statics.append(Static(prefix, root.resolve()))

    def _route(self, method: str, path: str, manner: Manner) -> Callable[[Function], Function]:
        if not isinstance(path, str) or not path.startswith("/") or "?" in path or not path.isascii():
            raise SettingsError([f'{_caller()}: a path begins with a slash and is ASCII, as in @app.http.get("/path")'])
        return self._app._declarer("http", f"{method} {path}", manner)


class Patterns(Generic[T]):
    """What belongs to a channel name: an exact pattern first, then the first glob that fits. Remembers its answers."""

    def __init__(self, by_pattern: Mapping[str, T]) -> None:
        self._exact = dict(by_pattern)
        self._globs = [
            (re.compile(fnmatch.translate(pattern)), found)
            for pattern, found in by_pattern.items()
            if any(sign in pattern for sign in "*?[")
        ]
        # Names come from clients, so the memory is bounded.
        self.find: Callable[[str], T | None] = functools.lru_cache(maxsize=4096)(self._search)

    def _search(self, name: str) -> T | None:
        if name in self._exact:
            return self._exact[name]
        return next((found for glob, found in self._globs if glob.match(name)), None)


def load(settings: AppSettings) -> App:
    """Import the application that the configuration names; an App without handlers when it names none.

    Puts `settings.path` first on sys.path. Raises SettingsError with one line that names the user's file and line.
    """
    if not settings.module:
        return App()
    if settings.path and sys.path[0] != settings.path:
        sys.path.insert(0, settings.path)
    key = f'app.module = "{settings.module}"'
    module_name, _, attribute = settings.module.partition(":")
    try:
        module = importlib.import_module(module_name)
    except SettingsError:
        raise
    except (Exception, SystemExit) as error:
        raise SettingsError([f"{key}: {_import_problem(error, module_name, settings.path)}"]) from error
    found = getattr(module, attribute or "app", None)
    if not isinstance(found, App):
        what = "missing" if found is None else f"of type {type(found).__name__}"
        raise SettingsError(
            [f"{key}: {module.__file__}: '{attribute or 'app'}' is {what}, and should be an App: app = realtime.App()"]
        )
    found.options = dict(settings.options)
    return found


def _import_problem(error: BaseException, module: str, path: str) -> str:
    """What went wrong in the user's code, and where, in one line."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
        return f"there is no module {error.name!r} (app.path is {path!r})"
    says = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: SyntaxError: {error.msg}"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_source(frame.filename)]
    own = [frame for frame in frames if path and frame.filename.startswith(path)] or frames
    return f"{own[-1].filename}:{own[-1].lineno}: {says}" if own else says


def _is_source(filename: str) -> bool:
    return not filename.startswith("<") and filename not in (__file__, importlib.__file__)


def _not_running(*_: object) -> NoReturn:
    raise RuntimeError("the application can publish and ask once the server runs it, not while it is imported")


def _payload(data: Any, binary: bool) -> bytes:
    """Bytes as they are, or JSON text of anything else. Raises TypeError for what can't be that."""
    if not binary:
        return msgspec.json.encode(data)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"binary data is bytes, not {type(data).__name__}")
    return bytes(data)


def _optional(value: Any) -> bytes:
    """JSON text of anything but None."""
    return b"" if value is None else msgspec.json.encode(value)


def _place(function: object) -> str:
    """Where a function is defined: "file:line"."""
    function = inspect.unwrap(function) if callable(function) else function
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def _caller() -> str:
    """The place outside this module that called into it."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _where(function: Callable[..., Any], run: str | None, subject: str) -> str:
    """Where a function runs, with the default filled in."""
    if not callable(function):
        raise SettingsError([f"{subject} is not a function"])
    coroutine = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - an object with an `async def __call__` is what we look for
    )
    if run is None:
        return "loop" if coroutine else "thread"
    if run not in PLACES:
        raise SettingsError([f"{subject} asks for run={run!r}; there are {', '.join(PLACES)}"])
    if coroutine and run != "loop":
        raise SettingsError([f'{subject} is a coroutine, which runs on the loop; "{run}" is for a plain function'])
    return run


def _taken(function: Callable[..., Any], kind: str, run: str, subject: str) -> slice:
    """Which of its kind's arguments a function takes: as many as it can, but in a process no client."""
    names, ways = ARGUMENTS[kind]
    if run == "process":
        ways = tuple(way for way in ways if "client" not in names[way])
        if not ways:
            raise SettingsError([f'{subject} is called with a client, which can\'t go to a process; use run="thread"'])
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have none
        return ways[0]
    for way in ways:
        try:
            signature.bind(*names[way])
        except TypeError:
            continue
        return way
    wanted = " or ".join(f"({', '.join(names[way])})" for way in reversed(ways))
    where = " in a process, where no client can go" if run == "process" and "client" in names else ""
    raise SettingsError([f"{subject} is called with {wanted}{where}, which {signature} does not take"])


def _cached(
    function: Callable[..., Any], kind: str, name: str, cache: Cache | None, subject: str
) -> tuple[Callable[..., Any], Cache | None]:
    """The function to call, and the cache of its answers: the one declared, or the one that decorates it."""
    called, decorating = taken_apart(function)
    if decorating is None and cache is None:
        return function, None
    if kind not in ("rpc", "http"):
        raise SettingsError([f"{subject} has a cache, which is for rpc and http handlers"])
    if decorating is not None and cache is not None:
        raise SettingsError([f"{subject} has two caches, one declared and one that decorates it"])
    if cache is not None:
        try:
            cache.belong(name)
        except TypeError as error:
            raise SettingsError([f"{subject}: {error}"]) from None
    return called, cache or decorating


def _policy(pressure: Policy | None, kind: str, cache: Cache | None, subject: str) -> Policy:
    """What becomes of calls under pressure, with the defaults filled in."""
    if pressure is None:
        return "ignore" if kind != "http" else "stale" if cache is not None else "refuse"
    if callable(pressure):
        return pressure
    if pressure not in POLICIES:
        raise SettingsError([f"{subject} asks for pressure={pressure!r}; there are {', '.join(POLICIES)}"])
    if pressure == "stale" and cache is None:
        raise SettingsError([f'{subject} asks for pressure="stale" and has no cache=Cache(...) to serve from'])
    return pressure
