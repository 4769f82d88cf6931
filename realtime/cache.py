"""Answers that are kept for a while, so that many callers cost one computation.

    @Cache(ttl=1, stale=30)
    async def forecast(city): ...                                        # any coroutine function

    @app.http.get("/weather", cache=Cache(ttl=1, stale=30))              # a handler of either kind
    def weather(request): ...

A kept value is *fresh* for `ttl` seconds. After that it is *stale*: whoever asks gets it at once while one computation
makes the next, but only for a window of time, which is wider the more the process has to do:

    window(load) = base + (stale - base) * min(load, 1)        base = min(stale, ttl)

`load` is the loop's measured lag as a share of `loop.max_lag`, and 1 whenever anything presses the worker: an idle
worker takes the time to compute what is older than ttl + base, a pressed one makes do with anything up to ttl + stale,
and computes nothing as long as it has that. When a computation fails, its error goes to those who wait for it and is
not kept; a value that is there already serves on, up to ttl + stale.

What a cache needs of its surroundings is a `Host`; in a worker, `realtime.worker.process` provides it. Loop thread
only, but for `invalidate`, `invalidate_tags` and `clear`.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

from realtime.errors import RealtimeError
from realtime.metrics import Counter

Function = TypeVar("Function", bound=Callable[..., Any])
# Called once with (result, None) or (None, error).
Done = Callable[[Any, BaseException | None], None]

# Seconds in which a computation that failed is not tried again, as long as a stale value can serve.
RETRY_AFTER = 1.0


class NothingKept(RealtimeError):
    """There is no value that may be served, and computing one was ruled out."""


@dataclass(slots=True)
class Entry:
    """One kept value. made: when its computation ended, by the host's clock. retry: not to be computed again before."""

    value: Any
    made: float
    tags: frozenset[str] = frozenset()
    retry: float = 0.0


class Storage(Protocol):
    """Where entries are. Keys are hashable values; what they mean is the cache's affair."""

    async def get(self, key: Hashable) -> Entry | None:
        """The entry of this key, however old."""

    async def put(self, key: Hashable, entry: Entry) -> int:
        """Keep an entry, in place of the one before; returns how many others had to go for it."""

    async def drop(self, key: Hashable) -> None:
        """Forget a key, if it is there."""

    async def drop_tag(self, tag: str) -> None:
        """Forget every entry with this tag."""

    async def clear(self) -> None:
        """Forget everything."""


class Memory:
    """Entries in this process: at most so many; the one that was not asked for longest goes first."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._tagged: dict[str, set[Hashable]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    async def get(self, key: Hashable) -> Entry | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    async def put(self, key: Hashable, entry: Entry) -> int:
        await self.drop(key)
        self._entries[key] = entry
        for tag in entry.tags:
            self._tagged.setdefault(tag, set()).add(key)
        evicted = 0
        while len(self._entries) > self._max_entries:
            await self.drop(next(iter(self._entries)))
            evicted += 1
        return evicted

    async def drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        for tag in entry.tags if entry is not None else ():
            keys = self._tagged[tag]
            keys.discard(key)
            if not keys:
                del self._tagged[tag]

    async def drop_tag(self, tag: str) -> None:
        for key in tuple(self._tagged.get(tag, ())):
            await self.drop(key)

    async def clear(self) -> None:
        self._entries.clear()
        self._tagged.clear()


def start_task(coroutine: Coroutine[Any, Any, Any], done: Done) -> None:
    """Run a coroutine as an asyncio task."""
    task = asyncio.get_running_loop().create_task(coroutine)
    _tasks.add(task)  # the loop itself refers to a waiting task but weakly

    def ended(task: asyncio.Task[Any]) -> None:
        _tasks.discard(task)
        if task.cancelled():
            done(None, asyncio.CancelledError())
        elif (error := task.exception()) is not None:
            done(None, error)
        else:
            done(task.result(), None)

    task.add_done_callback(ended)


_tasks: set[asyncio.Task[Any]] = set()


@dataclass(slots=True)
class Host:
    """What caches need of the process that they are in.

    load: 0 when idle, 1 or more when pressed. start: runs a coroutine on the loop, for nobody in particular. perform:
    runs a coroutine for whoever calls, in a thread too. counter: of a cache's name and an outcome.
    """

    clock: Callable[[], float] = time.monotonic
    load: Callable[[], float] = float
    start: Callable[[Coroutine[Any, Any, Any], Done], object] = start_task
    perform: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.ensure_future
    counter: Callable[[str, str], Counter] = field(default=lambda name, outcome: Counter())


# The process's own, for every cache that was not given one. A worker fills it in before it takes clients.
HOST = Host()


class Flight:
    """One computation under way, and who waits for it."""

    __slots__ = ("_outcome", "_waiting", "awaited", "tags", "void")

    def __init__(self, tags: frozenset[str], awaited: bool) -> None:
        """awaited: whether anybody waits for it; not for a refresh while a stale value serves."""
        self.tags = tags
        self.awaited = awaited
        self.void = False  # invalidated meanwhile: its result goes to those who wait, and is not kept
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._waiting: list[asyncio.Future[Any]] = []

    def result(self) -> asyncio.Future[Any]:
        """Its outcome, for one caller, who may cancel it without harm to the others."""
        self.awaited = True
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._outcome is None:
            self._waiting.append(waiter)
        else:
            _settle(waiter, *self._outcome)
        return waiter

    def land(self, value: Any, error: BaseException | None) -> None:
        """Tell all who wait."""
        self._outcome = value, error
        for waiter in self._waiting:
            if not waiter.done():
                _settle(waiter, value, error)


def _settle(waiter: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if error is None:
        waiter.set_result(value)
    elif isinstance(error, asyncio.CancelledError):
        waiter.cancel()
    else:
        waiter.set_exception(error)


class Cache:
    """Keeps what one function returned, by its arguments. Use it as a decorator, or as the `cache` of a handler."""

    def __init__(
        self,
        ttl: float,
        stale: float = 0,
        max_entries: int = 1000,
        key: Callable[..., Hashable] | None = None,
        tags: Callable[..., Iterable[str]] | Collection[str] | None = None,
        storage: Storage | None = None,
        *,
        host: Host | None = None,
    ) -> None:
        """ttl, stale: seconds, see the module. max_entries: kept in memory; without meaning for another `storage`.

        key: called with the function's arguments, names one answer. Without it, every argument counts: JSON by its
        value, a client by its user, a request by method, path, query, body, cookies and authorization. So nobody is
        shown another's answer by mistake; an answer that is the same for all wants a key that says so.
        tags: names under which an entry can be invalidated, or a function of the arguments that gives them.
        """
        if not ttl >= 0 or not stale >= 0 or max_entries < 1:
            raise ValueError("a Cache needs a ttl and a stale time of 0 or more seconds, and room for an entry or more")
        self.ttl = ttl
        self.stale = stale
        self.name = ""
        self.key = key or whole_key
        self._tags = tags
        self._storage: Storage = storage if storage is not None else Memory(max_entries)
        self._host = host or HOST
        self._flights: dict[Hashable, Flight] = {}
        self._counters: dict[str, Counter] = {}

    def __call__(self, function: Function) -> Function:
        """Decorate a function. A plain one must be a handler: its cached part is what runs in a thread."""
        self.belong(getattr(function, "__qualname__", repr(function)))

        @functools.wraps(function)
        async def cached(*args: Any, **arguments: Any) -> Any:
            return await self.call(functools.partial(function, *args, **arguments), args, arguments)

        @functools.wraps(function)
        def refused(*args: Any, **arguments: Any) -> Any:
            raise TypeError(f"{self.name} is a plain function: its cache works where it is declared as a handler")

        wrapped = cached if inspect.iscoroutinefunction(function) else refused
        setattr(wrapped, _MARK, (function, self))
        return cast(Function, wrapped)

    def belong(self, name: str) -> None:
        """Take the name of its function. Raises TypeError for a second one: keys would mean two things."""
        if self.name:
            raise TypeError(f"this Cache is that of {self.name}; {name} needs one of its own")
        self.name = name

    async def call(
        self,
        compute: Callable[[], Awaitable[Any]],
        args: Collection[Any],
        arguments: dict[str, Any] | None = None,
        may_compute: bool = True,
    ) -> Any:
        """What the function returns for these arguments: kept, or by awaiting `compute()`, whose errors it raises.

        may_compute: False to raise NothingKept instead; a computation that is under way may be waited for.
        """
        arguments = arguments or {}
        key = self.key(*args, **arguments)
        entry = await self._storage.get(key)
        flight = self._flights.get(key)
        if entry is not None:
            now = self._host.clock()
            age = now - entry.made
            if age < self.ttl:
                self._count("hit")
                return entry.value
            load = self._host.load()
            if age < self.ttl + self.window(1.0 if now < entry.retry else load):
                if flight is None and load < 1 and now >= entry.retry:
                    self._take_off(key, compute, args, arguments, awaited=False)
                self._count("stale")
                return entry.value
        if flight is not None:
            self._count("shared")
        elif may_compute:
            flight = self._take_off(key, compute, args, arguments, awaited=True)
            self._count("miss")
        else:
            raise NothingKept(f"{self.name} has no answer to serve")
        try:
            return await flight.result()
        except Exception:
            if entry is None or not self._host.clock() - entry.made < self.ttl + self.stale:
                raise
            self._count("stale")
            return entry.value

    def window(self, load: float) -> float:
        """For how many seconds after `ttl` a value is served, by the formula at the top of this module."""
        base = min(self.stale, self.ttl)
        return base + (self.stale - base) * max(0.0, min(load, 1.0))

    def invalidate(self, *keys: Hashable) -> Any:
        """Forget these keys; what is being computed for them is not kept.

        On the loop it starts at once, and what it returns need not be awaited; in a thread it is done on return.
        """
        return self._host.perform(self._invalidate(keys))

    def invalidate_tags(self, *tags: str) -> Any:
        """Forget all entries that have any of these tags; as `invalidate`."""
        return self._host.perform(self._invalidate_tags(tags))

    def clear(self) -> Any:
        """Forget everything; as `invalidate`."""
        return self._host.perform(self._clear())

    async def _invalidate(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            self._void(key)
            await self._storage.drop(key)

    async def _invalidate_tags(self, tags: Collection[str]) -> None:
        for key, flight in tuple(self._flights.items()):
            if not flight.tags.isdisjoint(tags):
                self._void(key)
        for tag in tags:
            await self._storage.drop_tag(tag)

    async def _clear(self) -> None:
        for key in tuple(self._flights):
            self._void(key)
        await self._storage.clear()

    def _void(self, key: Hashable) -> None:
        """Let the next caller start anew, whatever is being computed."""
        flight = self._flights.pop(key, None)
        if flight is not None:
            flight.void = True

    def _take_off(
        self,
        key: Hashable,
        compute: Callable[[], Awaitable[Any]],
        args: Collection[Any],
        arguments: dict[str, Any],
        awaited: bool,
    ) -> Flight:
        """Start a computation. It belongs to no caller: none can cancel it."""
        tags = self._tags(*args, **arguments) if callable(self._tags) else self._tags or ()
        flight = self._flights[key] = Flight(frozenset(tags), awaited)

        def done(value: Any, error: BaseException | None) -> None:
            if self._flights.get(key) is flight:
                del self._flights[key]
            flight.land(value, error)
            if error is not None and not flight.awaited:
                _complain(self.name, error)

        self._host.start(self._fly(key, flight, compute), done)
        return flight

    async def _fly(self, key: Hashable, flight: Flight, compute: Callable[[], Awaitable[Any]]) -> Any:
        try:
            value = await compute()
        except Exception:
            entry = await self._storage.get(key)
            if entry is not None:
                entry.retry = self._host.clock() + RETRY_AFTER
            raise
        if not flight.void:
            evicted = await self._storage.put(key, Entry(value, self._host.clock(), flight.tags))
            self._count("evicted", evicted)
            if flight.void:  # while a storage elsewhere was taking it
                await self._storage.drop(key)
        return value

    def _count(self, outcome: str, times: int = 1) -> None:
        counter = self._counters.get(outcome)
        if counter is None:
            counter = self._counters[outcome] = self._host.counter(self.name, outcome)
        counter.value += times


_MARK = "__realtime_cache__"


def taken_apart(function: Any) -> tuple[Any, Cache | None]:
    """A decorated function and its cache; any other function as it is."""
    found: tuple[Any, Cache | None] = getattr(function, _MARK, (function, None))
    return found


def whole_key(*args: Any, **arguments: Any) -> Hashable:
    """A key that differs when anything in the arguments does. Raises TypeError for what can't be compared by value."""
    return _frozen((args, arguments))


def _frozen(value: Any) -> Hashable:
    match value:
        case str() | bytes() | None:
            return value
        case bool() | int() | float():
            return type(value), value  # 1, 1.0 and True are equal to Python, and are not to a client
        case list() | tuple():
            return (list, *map(_frozen, value))
        case dict():
            return dict, frozenset((name, _frozen(item)) for name, item in value.items())
    own = getattr(value, "cache_key", None)
    if own is not None:
        return type(value), own()
    try:
        hash(value)
    except TypeError:
        raise TypeError(f"a Cache can't tell {type(value).__name__} objects apart: give it a key=") from None
    return cast(Hashable, value)


def _complain(name: str, error: BaseException) -> None:
    """Report an error that no caller waits for. What is one of ours was logged where it was raised."""
    if not isinstance(error, (RealtimeError, asyncio.CancelledError)):
        asyncio.get_running_loop().call_exception_handler(
            {"message": f"the cache of {name} could not be refreshed", "exception": error}
        )
