"""The `App`: an application's handlers and routes, and its calls to the server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import Any, NoReturn, Protocol, TypeVar, Unpack

import msgspec

from realtime.app.client import Client
from realtime.app.declarations import (
    ARGUMENTS,
    Handler,
    HandlerOptions,
    Policy,
    RunIn,
    Where,
    calling_line,
    defining_line,
    make_handler,
    make_schedule,
)
from realtime.app.http import HTTP, AnyFunction
from realtime.cache import Cache
from realtime.errors import FORCE_DISCONNECT, ClientError, SettingsError
from realtime.types import (
    ChannelCounts,
    ClientInfo,
    ConnectRequest,
    Credentials,
    Grant,
    HistoryPage,
    Position,
    PublishOptions,
    WorkerInfo,
)

Result = TypeVar("Result")

_DEFAULTS = HandlerOptions()

# The signatures that a type checker holds handlers to. At run time `declarations` checks the arguments.
ConnectingFunction = TypeVar(
    "ConnectingFunction", bound=Callable[[ConnectRequest], Awaitable[Credentials | None] | Credentials | None]
)
ConnectedFunction = TypeVar("ConnectedFunction", bound=Callable[[Client], Any])
DisconnectedFunction = TypeVar(
    "DisconnectedFunction", bound=Callable[[Client], Any] | Callable[[Client, int, str], Any]
)
_Admission = Awaitable[Grant | bool | None] | Grant | bool | None
SubscribeFunction = TypeVar(
    "SubscribeFunction", bound=Callable[[Client, str], _Admission] | Callable[[Client, str, Any], _Admission]
)
PublishFunction = TypeVar("PublishFunction", bound=Callable[[Client, str, Any], Any])
MessageFunction = TypeVar("MessageFunction", bound=Callable[[Client, Any], Any])
RPCFunction = TypeVar("RPCFunction", bound=Callable[[Client, Any], Any] | Callable[[Any], Any])
LifecycleFunction = TypeVar("LifecycleFunction", bound=Callable[[], Any])
PeriodicFunction = TypeVar("PeriodicFunction", bound=Callable[[], Any] | Callable[[int], Any])


class Server(Protocol):
    """The server, as an App calls it: coroutines that have not started. `realtime.server_api.operations` is one."""

    def publish(
        self, channel: str, data: bytes, **options: Unpack[PublishOptions]
    ) -> Coroutine[Any, Any, Position]: ...

    def broadcast(
        self, channels: list[str], data: bytes, **options: Unpack[PublishOptions]
    ) -> Coroutine[Any, Any, list[Position | ClientError]]: ...

    def history(
        self, channel: str, *, limit: int, since: Position | None, reverse: bool
    ) -> Coroutine[Any, Any, HistoryPage]: ...

    def history_remove(self, channel: str) -> Coroutine[Any, Any, None]: ...

    def presence(self, channel: str) -> Coroutine[Any, Any, dict[str, ClientInfo]]: ...

    def presence_stats(self, channel: str) -> Coroutine[Any, Any, tuple[int, int]]: ...

    def channels(self, pattern: str) -> Coroutine[Any, Any, ChannelCounts]: ...

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


class Perform(Protocol):
    """Runs a coroutine of the server for the caller: a started future on the loop, the result itself elsewhere."""

    def __call__(self, coroutine: Coroutine[Any, Any, Result], /) -> Awaitable[Result]: ...


class App:
    """An application: its handlers, its HTTP routes, and its calls to the server.

    The methods from `publish` to `refresh` mean the same everywhere. On the loop a call starts at once and returns an
    awaitable of its result; awaiting it is optional. In a thread, and in a handler process, a call blocks and returns
    the result itself, which `result` gives its type. The methods raise ClientError (102 unknown channel, 106 limit
    exceeded, 107 bad request, 108 feature not enabled in the channel), after which nothing was done, and
    EngineUnavailable, after which the outcome is unknown; retry with an idempotency key.

    options: the table `[app.options]` of the configuration, filled in before the server binds the application.
    """

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.http = HTTP(self._declarator)
        self._handlers: dict[str, dict[str, Handler]] = {kind: {} for kind in ARGUMENTS}
        self._server: Server | None = None
        self._perform: Perform = _not_running
        self._pressure_reasons: Callable[[], tuple[str, ...]] = tuple
        self._worker: WorkerInfo | None = None

    # -- declaring handlers -------------------------------------------------------------------------------------------

    def on_connecting(self, function: ConnectingFunction) -> ConnectingFunction:
        """Decide which clients may connect; the function takes a ConnectRequest.

        Return Credentials, or None to leave the decision to the token and the configuration. Raise ClientError or
        Disconnect to refuse.
        """
        return self._declare("on_connecting", "", function)

    def on_connected(self, function: ConnectedFunction) -> ConnectedFunction:
        """React to a new connection; the function takes (client).

        The client has its connect reply. Its next commands wait for the end of the function, which so can fill in
        `client.state` for the other handlers. `on_disconnected` may be called meanwhile. Raise Disconnect to close the
        connection. It is not called again for a connection that moves to another worker.
        """
        return self._declare("on_connected", "", function)

    def on_disconnected(self, function: DisconnectedFunction) -> DisconnectedFunction:
        """React to the end of a connection; the function takes (client) or (client, code, reason).

        It is called at most once for each client, after the end. code, reason: of the disconnect by the server; 3000
        "connection closed" where the client ended the connection. For the clients of a worker that died, the worker in
        its place calls it with 3000 "worker lost": of these clients, it knows only `id` and `user`.
        """
        return self._declare("on_disconnected", "", function)

    def on_subscribe(
        self,
        pattern: str,
        *,
        run: RunIn | None = None,
        timeout: float | None = None,
        limit: int | None = None,
        pressure: Policy = "ignore",
    ) -> Callable[[SubscribeFunction], SubscribeFunction]:
        """Decide which clients may subscribe; the function takes (client, channel) or (client, channel, data).

        pattern: a channel name or a glob such as "chat:*". An exact name wins over a glob; of several globs the first
        declared wins. Return a Grant, True or None to allow, False to refuse with 103; or raise ClientError or
        Disconnect. run, timeout, limit, pressure: see `rpc`.
        """
        return self._declarator("on_subscribe", pattern, HandlerOptions(run, timeout, limit, pressure))

    def on_publish(
        self,
        pattern: str,
        *,
        run: RunIn | None = None,
        timeout: float | None = None,
        limit: int | None = None,
        pressure: Policy = "ignore",
    ) -> Callable[[PublishFunction], PublishFunction]:
        """Check or change a client's publication before it is sent; the function takes (client, channel, data).

        Return None to publish the data unchanged, or a replacement. Raise ClientError or Disconnect to refuse.
        pattern: as for `on_subscribe`. run, timeout, limit, pressure: see `rpc`.
        """
        return self._declarator("on_publish", pattern, HandlerOptions(run, timeout, limit, pressure))

    def on_message(self, function: MessageFunction) -> MessageFunction:
        """Receive messages that clients send without expecting a reply; the function takes (client, data)."""
        return self._declare("on_message", "", function)

    def rpc(
        self,
        method: str,
        *,
        run: RunIn | None = None,
        timeout: float | None = None,
        limit: int | None = None,
        pressure: Policy = "ignore",
        cache: Cache | None = None,
    ) -> Callable[[RPCFunction], RPCFunction]:
        """Answer a client's call of `method`; the function takes (client, data), or (data) alone.

        The return value is the reply: any value that JSON can represent. Raise ClientError or Disconnect to refuse.

        run: where the function runs. By default a coroutine runs on the "loop" and a plain function in a "thread".
        "process" runs a plain function in another process, so that it may use a core of its own; it gets copies of its
        arguments and no client, and its reply may have 1 MiB. "auto" runs a plain function on the loop while it is
        quick: from the third call within a minute that held up the loop for `loop.lagging` (50 ms) it runs in threads,
        and it returns to the loop after a minute without so slow a call.
        timeout: seconds, time in a queue included; by default `workers.handler_timeout`, 0 for none. At the timeout a
        coroutine is cancelled and a process killed; a thread goes on, and its result is dropped.
        limit: concurrent calls in each worker; further calls wait.
        pressure: the treatment of calls while the worker is overloaded: "ignore" calls the handler all the same,
        "refuse" replies with the temporary error 111, and "stale" replies from the cache, however old the value, and
        refuses where the cache has none. A function of the handler's arguments may return one of these; it runs on the
        loop.
        cache: keeps the replies; see `realtime.Cache`.
        """
        return self._declarator("rpc", method, HandlerOptions(run, timeout, limit, pressure, cache))

    def on_start(self, function: LifecycleFunction) -> LifecycleFunction:
        """Run a function without arguments once in each worker before it serves, in order of declaration."""
        return self._declare("on_start", str(len(self._handlers["on_start"])), function)

    def on_stop(self, function: LifecycleFunction) -> LifecycleFunction:
        """Run a function without arguments once in each worker when it stops, the last declared first."""
        return self._declare("on_stop", str(len(self._handlers["on_stop"])), function)

    def every(
        self,
        interval: float | str,
        *,
        where: Where = "one",
        immediately: bool = False,
        name: str = "",
        run: RunIn | None = None,
        timeout: float | None = None,
    ) -> Callable[[PeriodicFunction], PeriodicFunction]:
        """Run a function again and again; it takes () or (term).

        interval: seconds, or a duration such as "1s" or "5m", from 10 ms to 30 days, between the begins of two runs,
        which do not drift. Runs do not overlap: one that takes longer leaves out the runs that it meets, which are
        counted. Exceptions are logged and counted, and the next run comes all the same.

        where: "one" runs it on one worker of all nodes, "each" on every worker. Another worker becomes the one when it
        ends, drains, or is out of reach for `workers.task_lease`; each change begins a new term, with a higher number.
        Runs of "one" begin when the Unix time is a multiple of the interval, so a change does not shift them; those of
        "each" one interval after the worker serves. immediately: the first run of a worker begins at once. name: for
        logs and metrics; by default that of the function. run, timeout: see `rpc`.
        """
        schedule = make_schedule(interval, where, immediately)

        def declare(function: PeriodicFunction) -> PeriodicFunction:
            key = name or getattr(function, "__qualname__", "") or repr(function)
            return self._declare("every", key, function, HandlerOptions(run, timeout, limit=1, schedule=schedule))

        return declare

    def handlers(self, kind: str) -> dict[str, Handler]:
        """Return the handlers of one kind by pattern, method or route, in order of declaration."""
        return dict(self._handlers[kind])

    def _declarator(self, kind: str, key: str, options: HandlerOptions) -> Callable[[AnyFunction], AnyFunction]:
        if not isinstance(key, str) or not key:
            place = defining_line(key) if callable(key) else calling_line()
            raise SettingsError([f'{place}: @app.{kind} needs a name or pattern, as in @app.{kind}("name")'])

        def declare(function: AnyFunction) -> AnyFunction:
            return self._declare(kind, key, function, options)

        return declare

    def _declare(self, kind: str, key: str, function: AnyFunction, options: HandlerOptions = _DEFAULTS) -> AnyFunction:
        """Record a handler and return its function unchanged. Raises SettingsError."""
        place, name = defining_line(function), f"{kind} {key}".rstrip()
        if self._server is not None:
            raise SettingsError([f"{place}: {name} is declared after the server started"])
        earlier = self._handlers[kind].get(key)
        if earlier is not None:
            raise SettingsError([f"{place}: {name} is declared a second time; the first is at {earlier.place}"])
        self._handlers[kind][key] = make_handler(kind, key, function, options)
        return function

    # -- calling the server -------------------------------------------------------------------------------------------

    def bind(
        self,
        server: Server,
        perform: Perform,
        pressure_reasons: Callable[[], tuple[str, ...]] = tuple,
        worker: WorkerInfo | None = None,
    ) -> None:
        """Connect the application to its server; each worker calls this once. No handler can be declared afterwards.

        perform: runs a coroutine of the server in whatever thread the caller is. pressure_reasons: see `pressure`.
        worker: see `worker`; None in a handler process.
        """
        self._server, self._perform, self._pressure_reasons = server, perform, pressure_reasons
        self._worker = worker

    @property
    def worker(self) -> WorkerInfo:
        """The worker that runs this code. May be read in any thread.

        Raises RuntimeError in a handler process, and during the import of the application.
        """
        if self._worker is None:
            raise RuntimeError("app.worker is known in a worker alone, not in a handler process or during the import")
        return self._worker

    @property
    def pressure(self) -> tuple[str, ...]:
        """The limits of `[loop]` that this worker exceeds: "lag", "rss", "queued_bytes", "threads_waiting".

        Empty while the worker is not overloaded. May be read in any thread.
        """
        return self._pressure_reasons()

    @staticmethod
    def result(answer: Awaitable[Result]) -> Result:
        """Return the result of a call made in a thread or a handler process, with its static type.

        There a call has finished when it returns, so this returns `answer` itself, for the type checker's sake:
        `position = app.result(app.publish("news", data))`. On the loop, await the call instead; this raises TypeError.
        """
        if isinstance(answer, Awaitable):
            raise TypeError("on the loop a call returns an awaitable: await it")
        return answer

    def publish(self, channel: str, data: Any, **options: Unpack[PublishOptions]) -> Awaitable[Position]:
        """Publish to a channel and return the publication's Position: (0, "") in a channel without history.

        data: any value that JSON can represent, or msgspec.Raw with JSON text. options: see `PublishOptions`.
        """
        payload = _payload(data, options.get("binary", False))
        return self._perform(self._bound.publish(channel, payload, **options))

    def broadcast(
        self, channels: Iterable[str], data: Any, **options: Unpack[PublishOptions]
    ) -> Awaitable[list[Position | ClientError]]:
        """Publish the same data to many channels; return a Position or a ClientError for each, in their order."""
        payload = _payload(data, options.get("binary", False))
        return self._perform(self._bound.broadcast(list(channels), payload, **options))

    def history(
        self, channel: str, *, limit: int = -1, since: Position | None = None, reverse: bool = False
    ) -> Awaitable[HistoryPage]:
        """Return the stored publications of a channel and its current position; `data` is JSON text there.

        limit: the most publications to return; -1 for all, 0 for the position alone. since: a position; only later
        publications are returned, or earlier ones with `reverse`. reverse: newest first. A page ends at 4 MiB; continue
        with `since` at its last publication. Raises ClientError 112 if `since` has another epoch.
        """
        return self._perform(self._bound.history(channel, limit=limit, since=since, reverse=reverse))

    def history_remove(self, channel: str) -> Awaitable[None]:
        """Remove the stored publications of a channel; its numbering continues."""
        return self._perform(self._bound.history_remove(channel))

    def presence(self, channel: str) -> Awaitable[dict[str, ClientInfo]]:
        """Return the subscribers of a channel by client id."""
        return self._perform(self._bound.presence(channel))

    def presence_stats(self, channel: str) -> Awaitable[tuple[int, int]]:
        """Return the number of clients subscribed to a channel and the number of distinct users among them."""
        return self._perform(self._bound.presence_stats(channel))

    def channels(self, pattern: str = "") -> Awaitable[ChannelCounts]:
        """Return the number of subscribers of each channel that has any, over all workers of all nodes.

        Workers that do not answer within 5 s are left out; the result counts them in its `silent_workers`.
        pattern: selects channels by `*`, `?`, `[a-z]` and `{this,that}`; "" for all. Raises ClientError 107 for an
        invalid pattern, and 106 if the names exceed 4 MiB.
        """
        return self._perform(self._bound.channels(pattern))

    def info(self) -> Awaitable[list[dict[str, Any]]]:
        """Return one dict for each node with its name, version and counts, as the HTTP API does."""
        return self._perform(self._bound.info())

    # The methods below act on the connections of a user, at every worker. client: a client id, for that connection
    # alone. session: the session id that some transports send to their client, likewise. The user "" is the anonymous
    # one.

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
    ) -> Awaitable[None]:
        """Subscribe the connections of `user` to a channel, regardless of its permissions, and notify each client.

        info: shown to other clients in the channel. data: sent to the client. recover_since: a position known to the
        client; it receives the later publications that are stored. override: replaces the channel's own options
        "presence", "join_leave", "force_push_join_leave", "force_recovery", "force_positioning". expire_at: Unix
        seconds at which the subscription expires, 0 for never. An existing subscription stays unchanged.
        """
        return self._perform(
            self._bound.subscribe(
                user,
                channel,
                client=client,
                session=session,
                info=_optional_json(info),
                data=_optional_json(data),
                recover_since=recover_since,
                override=override,
                expire_at=expire_at,
            )
        )

    def unsubscribe(self, user: str, channel: str, *, client: str = "", session: str = "") -> Awaitable[None]:
        """End the subscriptions of `user` to a channel, and notify each client."""
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
    ) -> Awaitable[None]:
        """Close the connections of `user`. whitelist: client ids to keep. code, reason: see `realtime.Disconnect`."""
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
    ) -> Awaitable[None]:
        """Change the time at which the connections of `user` expire, and notify each client.

        expire_at: Unix seconds, 0 for never; a past time, or `expired`, closes the connections with 3005. info:
        replaces the client's public information; None keeps it.
        """
        return self._perform(
            self._bound.refresh(
                user, client=client, session=session, expired=expired, expire_at=expire_at, info=_optional_json(info)
            )
        )

    @property
    def _bound(self) -> Server:
        if self._server is None:
            _not_running()
        return self._server


def _not_running(coroutine: object = None, /) -> NoReturn:
    raise RuntimeError("the application can call the server only while a server runs it, not during its import")


def _payload(data: Any, binary: bool) -> bytes:
    """Return `data` as JSON text, or unchanged if it is binary. Raises TypeError if that is impossible."""
    if not binary:
        return msgspec.json.encode(data)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"binary data must be bytes, not {type(data).__name__}")
    return bytes(data)


def _optional_json(value: Any) -> bytes:
    """Return `value` as JSON text; b"" for None."""
    return b"" if value is None else msgspec.json.encode(value)
