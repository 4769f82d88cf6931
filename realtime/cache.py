"""Cached answers: many callers cost one computation.

    @Cache(ttl=1, stale=30)
    async def forecast(city): ...                                        # any coroutine function

    @app.http.get("/weather", cache=Cache(ttl=1, stale=30))              # a handler of either kind
    def weather(request): ...

A cached value is *fresh* for `ttl` seconds. Afterwards it is *stale*: callers still get it at once, while one
computation makes the next value. A stale value serves only for a window of time that grows with the load:

    window(load) = base + (stale - base) * min(load, 1)        base = min(stale, ttl)

`load` is the measured loop lag as a share of `loop.max_lag`, and 1 while the worker exceeds any pressure limit. So an
idle worker computes anew when a value is older than ttl + base. An overloaded worker serves values up to the age of
ttl + stale, and computes nothing while it has one. A failed computation raises its error in the waiting callers and is
not cached; an existing value goes on serving up to ttl + stale.

Of the workers of one machine, one computes a value, and the others that need it meanwhile wait for it (`Flight`). The
value travels as bytes (`pack_value`); a cache whose values can't, or whose keys can't, computes in each worker.

An `Invalidation` reaches the caches of the same name in all workers. A cache reaches its process, and through it the
other workers, through a `Host`; in a worker, `realtime.worker.load_shedding` fills it in. Loop thread only, except for
`invalidate`, `invalidate_tags` and `clear`.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import inspect
import time
import weakref
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Coroutine, Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeVar, cast

import msgspec

from realtime.errors import RealtimeError
from realtime.metrics import Counter

Function = TypeVar("Function", bound=Callable[..., Any])
# A callback, called once with (result, None) or (None, error).
Done = Callable[[Any, BaseException | None], None]

# The most bytes of a value that goes to other workers.
MAX_SHARED = 1_048_576

# Seconds without a new attempt after a failed computation, as long as a stale value can serve.
RETRY_AFTER = 1.0


class NothingCached(RealtimeError):
    """The cache has no value that it may serve, and the caller forbade a computation."""


@dataclass(slots=True)
class Entry:
    """One cached value. made: the end of its computation, by the host's clock. retry: the earliest next attempt."""

    value: Any
    made: float
    tags: frozenset[str] = frozenset()
    retry: float = 0.0


class Storage(Protocol):
    """A store of entries. Keys are hashable values without further meaning to the store."""

    async def get(self, key: Hashable) -> Entry | None:
        """Return the entry of this key, however old."""

    async def put(self, key: Hashable, entry: Entry) -> int:
        """Store an entry in place of an earlier one; return the number of evicted entries."""

    async def drop(self, key: Hashable) -> None:
        """Remove a key, if it exists."""

    async def drop_tag(self, tag: str) -> None:
        """Remove every entry with this tag."""

    async def clear(self) -> None:
        """Remove all entries."""


class MemoryStorage:
    """Entries in this process, `max_entries` at most; the least recently used is evicted first."""

    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._tagged: dict[str, set[Hashable]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, key: Hashable) -> Entry | None:
        """Like `get`, which every storage has, for callers that can't wait."""
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    async def get(self, key: Hashable) -> Entry | None:
        return self.find(key)

    async def put(self, key: Hashable, entry: Entry) -> int:
        await self.drop(key)
        self._entries[key] = entry
        for tag in entry.tags:
            self._tagged.setdefault(tag, set()).add(key)
        evicted = 0
        while len(self._entries) > self._max_entries:
            self._untag(*self._entries.popitem(last=False))  # one step: relief may call `find` before or after it
            evicted += 1
        return evicted

    async def drop(self, key: Hashable) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._untag(key, entry)

    def _untag(self, key: Hashable, entry: Entry) -> None:
        for tag in entry.tags:
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
    _tasks.add(task)  # the loop holds a waiting task only weakly

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


class Invalidation(msgspec.Struct, frozen=True):
    """The removal of entries from the caches of one name: by key (`encode_key`), by tag, or of all (both None).

    kept: the seconds for which Redis keeps values of these caches, 0 if it has none.
    """

    cache: str
    keys: list[bytes] | None = None
    tags: list[str] | None = None
    kept: float = 0.0


class StoredComputation(msgspec.Struct, frozen=True):
    """A computation for all nodes. key: `shared_key`. ttl: seconds for which a value is fresh. kept: until it goes."""

    cache: str
    key: bytes
    tags: list[str]
    ttl: float
    kept: float


class Landing(msgspec.Struct, frozen=True):
    """The end of another worker's computation. value: from `pack_value`; None after an error, or if it can't be packed.

    made: as in `Entry`. is_void: it was invalidated after the computation had started, or the worker has ended.
    """

    value: bytes | None = None
    made: float = 0.0
    is_void: bool = False


class Flight(Protocol):
    """This worker computes a value that others may wait for."""

    def land(self, landing: Landing) -> None:
        """Pass the value on. Never fails."""


async def _to_no_worker(invalidation: Invalidation) -> None:
    """Send an invalidation from a process without other workers."""


@dataclass(slots=True)
class Host:
    """The process around its caches.

    load: 0 when idle, 1 or more when overloaded. start: runs a coroutine on the loop and calls back. perform: runs a
    coroutine for the caller, also from a thread. counter: returns the counter for a cache's name and an outcome.
    broadcast: sends an invalidation to the other workers. caches: of this process, by name. take_off: begins the
    computation of a key (`shared_key`) of a cache by one worker alone: returns its flight, or its end once another
    worker had it, or None if each worker computes on its own. None without other workers. obtain: returns a value of
    Redis, or computes it for all nodes, and the time of its computation by `clock`.
    """

    clock: Callable[[], float] = time.monotonic
    load: Callable[[], float] = float
    start: Callable[[Coroutine[Any, Any, Any], Done], object] = start_task
    perform: Callable[[Coroutine[Any, Any, Any]], Awaitable[Any]] = asyncio.ensure_future
    counter: Callable[[str, str], Counter] = field(default=lambda name, outcome: Counter())
    broadcast: Callable[[Invalidation], Awaitable[Any]] = _to_no_worker
    take_off: Callable[[str, bytes], Awaitable[Flight | Landing | None]] | None = None
    obtain: Callable[[StoredComputation, Callable[[], Awaitable[Any]]], Awaitable[tuple[Any, float]]] | None = None
    caches: dict[str, weakref.WeakSet[Cache]] = field(default_factory=dict)

    async def invalidate(self, invalidation: Invalidation) -> None:
        """Carry out an invalidation of a handler process here, and in the other workers. Raises as `broadcast`."""
        await self.invalidate_here(invalidation)
        await self.broadcast(invalidation)

    async def invalidate_here(self, invalidation: Invalidation) -> None:
        """Carry out an invalidation in this process alone."""
        for each in tuple(self.caches.get(invalidation.cache, ())):
            await each.carry_out(invalidation)

    async def clear_here(self) -> None:
        """Clear all caches of this process: invalidations of other workers may have been lost."""
        for name in tuple(self.caches):
            await self.invalidate_here(Invalidation(name))


# The default host of every cache. A worker fills it in before it accepts clients.
HOST = Host()


class Computation:
    """One running computation and its waiting callers."""

    __slots__ = ("_outcome", "_waiters", "awaited", "tags", "void")

    def __init__(self, tags: frozenset[str], awaited: bool) -> None:
        """awaited: whether a caller waits for the result; false for a refresh while a stale value serves."""
        self.tags = tags
        self.awaited = awaited
        self.void = False  # invalidated meanwhile: waiting callers get the result, but the cache does not store it
        self._outcome: tuple[Any, BaseException | None] | None = None
        self._waiters: list[asyncio.Future[Any]] = []

    def result(self) -> asyncio.Future[Any]:
        """Return a future of the outcome for one caller; cancelling it does not affect other callers."""
        self.awaited = True
        waiter: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        if self._outcome is None:
            self._waiters.append(waiter)
        else:
            _settle(waiter, *self._outcome)
        return waiter

    def settle(self, value: Any, error: BaseException | None) -> None:
        """Settle the futures of all waiting callers."""
        self._outcome = value, error
        for waiter in self._waiters:
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
    """A cache of one function's results, by its arguments. Use it as a decorator, or as the `cache` of a handler."""

    def __init__(
        self,
        ttl: float,
        stale: float = 0,
        max_entries: int = 1000,
        key: Callable[..., Hashable] | None = None,
        tags: Callable[..., Iterable[str]] | Collection[str] | None = None,
        storage: Storage | Literal["redis"] | None = None,
        *,
        share: bool = True,
        host: Host | None = None,
    ) -> None:
        """ttl, stale: seconds, see the module. max_entries: the most entries in memory; unused with a `storage`.

        key: a function of the arguments that returns the key of an answer. By default every argument counts: JSON by
        its value, a client by its user, a request by method, path, query, body, cookies and authorization. So no user
        sees another user's answer by mistake; pass a key for an answer that all users share.
        storage: "redis" shares the values with all nodes (`engine.type = "redis"`); each worker keeps a copy in memory.
        share: one worker of this machine computes a value for all workers that need it at that time.
        tags: names for invalidating entries together, or a function of the arguments that returns them.
        """
        if not ttl >= 0 or not stale >= 0 or max_entries < 1:
            raise ValueError("a Cache needs ttl and stale of 0 or more seconds, and max_entries of 1 or more")
        self.ttl = ttl
        self.stale = stale
        self.name = ""
        self.key = key or default_key
        self._tags = tags
        self._kept = ttl + stale if storage == "redis" else 0.0
        self._storage: Storage = MemoryStorage(max_entries) if storage is None or storage == "redis" else storage
        self._is_shared = share
        self._host = host or HOST
        self._computations: dict[Hashable, Computation] = {}
        self._counters: dict[str, Counter] = {}

    def __call__(self, function: Function) -> Function:
        """Decorate a function. A plain function must be a handler: the cache wraps the part that runs in a thread."""
        self.attach_to(getattr(function, "__qualname__", repr(function)))

        @functools.wraps(function)
        async def cached(*args: Any, **arguments: Any) -> Any:
            return await self.call(functools.partial(function, *args, **arguments), args, arguments)

        @functools.wraps(function)
        def refused(*args: Any, **arguments: Any) -> Any:
            raise TypeError(f"{self.name} is a plain function: its cache works only if it is declared as a handler")

        wrapped = cached if inspect.iscoroutinefunction(function) else refused
        setattr(wrapped, _DECORATED, (function, self))
        return cast(Function, wrapped)

    def attach_to(self, name: str) -> None:
        """Name the cache after its only function. Raises TypeError for a second function: their keys would collide."""
        if self.name:
            raise TypeError(f"this Cache belongs to {self.name}; {name} needs its own Cache")
        self.name = name
        self._host.caches.setdefault(name, weakref.WeakSet()).add(self)

    @property
    def has_own_key(self) -> bool:
        """Whether the application makes the keys."""
        return self.key is not default_key

    def find(self, args: tuple[Any, ...]) -> Entry | None:
        """Return the entry whose value `call` would return at once, without starting anything; None if there is none.

        The short path for answers in memory. Raises what the key function raises.
        """
        storage = self._storage
        if not isinstance(storage, MemoryStorage):
            return None
        key = self.key(*args)
        entry = storage.find(key)
        if entry is None:
            return None
        age = self._host.clock() - entry.made
        if age < self.ttl:
            self._count("hit")
            return entry
        load = self._host.load()
        if age < self.ttl + self.window(load) and (load >= 1 or key in self._computations):
            self._count("stale")
            return entry
        return None

    async def call(
        self,
        compute: Callable[[], Awaitable[Any]],
        args: Collection[Any],
        arguments: dict[str, Any] | None = None,
        may_compute: bool = True,
    ) -> Any:
        """Return the cached result for these arguments, or that of `await compute()`; errors of `compute` propagate.

        may_compute: False raises NothingCached in place of starting a computation; a running one is awaited all the
        same.
        """
        arguments = arguments or {}
        key = self.key(*args, **arguments)
        entry = await self._storage.get(key)
        computation = self._computations.get(key)
        if entry is not None:
            now = self._host.clock()
            age = now - entry.made
            if age < self.ttl:
                self._count("hit")
                return entry.value
            load = self._host.load()
            if age < self.ttl + self.window(1.0 if now < entry.retry else load):
                if computation is None and load < 1 and now >= entry.retry:
                    self._start(key, compute, args, arguments, awaited=False)
                self._count("stale")
                return entry.value
        if computation is not None:
            self._count("shared")
        elif may_compute:
            computation = self._start(key, compute, args, arguments, awaited=True)
            self._count("miss")
        else:
            raise NothingCached(f"{self.name} has no cached answer")
        try:
            return await computation.result()
        except Exception:
            if entry is None or not self._host.clock() - entry.made < self.ttl + self.stale:
                raise
            self._count("stale")
            return entry.value

    def window(self, load: float) -> float:
        """Return the seconds after `ttl` in which a value may serve, by the formula at the top of this module."""
        base = min(self.stale, self.ttl)
        return base + (self.stale - base) * max(0.0, min(load, 1.0))

    def invalidate(self, *keys: Hashable) -> Awaitable[None]:
        """Remove these keys in all workers, and do not store results of their running computations.

        On the loop this takes effect in this worker at once, and awaiting the return value is optional. Once it has
        been awaited, and on return in a thread, the broker has sent it to all other workers. Raises EngineUnavailable
        if the broker does not answer: call it again. Raises TypeError for a key that consists of anything but text,
        bytes, None, numbers, and tuples and frozensets of them.
        """
        return self._perform(Invalidation(self.name, keys=[encode_key(key) for key in keys], kept=self._kept))

    def invalidate_tags(self, *tags: str) -> Awaitable[None]:
        """Remove all entries with any of these tags, as `invalidate` does."""
        return self._perform(Invalidation(self.name, tags=list(tags), kept=self._kept))

    def clear(self) -> Awaitable[None]:
        """Remove all entries, as `invalidate` does."""
        return self._perform(Invalidation(self.name, kept=self._kept))

    def _perform(self, invalidation: Invalidation) -> Awaitable[None]:
        return self._host.perform(self._invalidate_everywhere(invalidation))

    async def _invalidate_everywhere(self, invalidation: Invalidation) -> None:
        await self.carry_out(invalidation)
        if self.name:
            await self._host.broadcast(invalidation)

    async def carry_out(self, invalidation: Invalidation) -> None:
        """Carry out an invalidation in this process."""
        if invalidation.keys is not None:
            await self._invalidate(map(decode_key, invalidation.keys))
        elif invalidation.tags is not None:
            await self._invalidate_tags(invalidation.tags)
        else:
            await self._clear()

    async def _invalidate(self, keys: Iterable[Hashable]) -> None:
        for key in keys:
            self._void(key)
            await self._storage.drop(key)

    async def _invalidate_tags(self, tags: Collection[str]) -> None:
        for key, computation in tuple(self._computations.items()):
            if not computation.tags.isdisjoint(tags):
                self._void(key)
        for tag in tags:
            await self._storage.drop_tag(tag)

    async def _clear(self) -> None:
        for key in tuple(self._computations):
            self._void(key)
        await self._storage.clear()

    def _void(self, key: Hashable) -> None:
        """Detach a running computation, so that the next caller starts another."""
        computation = self._computations.pop(key, None)
        if computation is not None:
            computation.void = True

    def _start(
        self,
        key: Hashable,
        compute: Callable[[], Awaitable[Any]],
        args: Collection[Any],
        arguments: dict[str, Any],
        awaited: bool,
    ) -> Computation:
        """Start a computation. It belongs to no caller, so no caller can cancel it."""
        tags = self._tags(*args, **arguments) if callable(self._tags) else self._tags or ()
        computation = self._computations[key] = Computation(frozenset(tags), awaited)

        def done(value: Any, error: BaseException | None) -> None:
            if self._computations.get(key) is computation:
                del self._computations[key]
            computation.settle(value, error)
            if error is not None and not computation.awaited:
                _report_failure(self.name, error)

        self._host.start(self._compute(key, computation, compute), done)
        return computation

    async def _compute(self, key: Hashable, computation: Computation, compute: Callable[[], Awaitable[Any]]) -> Any:
        flight = await self._take_off(key, computation) if self._is_shared and self._host.take_off else None
        if isinstance(flight, Entry):
            self._count("landed")
            value, made = flight.value, flight.made
        else:
            landing = Landing()
            try:
                value, made = await self._obtain(key, computation, compute)
                landing = Landing(self._packed(value), made, computation.void) if flight is not None else landing
            except Exception:
                entry = await self._storage.get(key)
                if entry is not None:
                    entry.retry = self._host.clock() + RETRY_AFTER
                raise
            finally:
                if flight is not None:
                    flight.land(landing)
        if not computation.void:
            evicted = await self._storage.put(key, Entry(value, made, computation.tags))
            self._count("evicted", evicted)
            if computation.void:  # invalidated while a remote storage was storing it
                await self._storage.drop(key)
        return value

    async def _obtain(
        self, key: Hashable, computation: Computation, compute: Callable[[], Awaitable[Any]]
    ) -> tuple[Any, float]:
        """Return a value, and the time of its computation."""
        shared = shared_key(key) if self._kept and self._host.obtain is not None else None
        if shared is None or self._host.obtain is None:
            return await compute(), self._host.clock()
        wanted = StoredComputation(self.name, shared, sorted(computation.tags), self.ttl, self._kept)
        return await self._host.obtain(wanted, compute)

    async def _take_off(self, key: Hashable, computation: Computation) -> Flight | Entry | None:
        """Return the flight of this computation, the value of another worker, or None to compute without a flight."""
        shared = shared_key(key)
        while shared is not None and self._host.take_off is not None:
            flight = await self._host.take_off(self.name, shared)
            if not isinstance(flight, Landing):
                return flight
            if flight.is_void and not computation.void:
                continue  # the value was invalidated before our callers asked, or the worker has ended
            try:
                return Entry(unpack_value(flight.value), flight.made) if flight.value is not None else None
            except (ValueError, KeyError):
                return None  # the other worker runs another version of the application
        return None

    def _packed(self, value: Any) -> bytes | None:
        """Return a value for the other workers, None if they have to compute it."""
        try:
            packed = pack_value(value)
        except TypeError:
            self._is_shared = False  # the next ones will be of this kind, too
            return None
        return packed if len(packed) <= MAX_SHARED else None

    def _count(self, outcome: str, times: int = 1) -> None:
        counter = self._counters.get(outcome)
        if counter is None:
            counter = self._counters[outcome] = self._host.counter(self.name, outcome)
        counter.value += times


_DECORATED = "__realtime_cache__"


def undecorate(function: Any) -> tuple[Any, Cache | None]:
    """Return a decorated function without its cache, and the cache; for any other function, itself and None."""
    found: tuple[Any, Cache | None] = getattr(function, _DECORATED, (function, None))
    return found


def default_key(*args: Any, **arguments: Any) -> Hashable:
    """Return a key of all arguments by value. Raises TypeError for an argument without a comparable value."""
    if len(args) == 1 and not arguments and hasattr(args[0], "cache_key"):
        return type(args[0]), args[0].cache_key()
    return _by_value((args, arguments))


def _by_value(value: Any) -> Hashable:
    match value:
        case str() | bytes() | None:
            return value
        case bool() | int() | float():
            return type(value), value  # 1, 1.0 and True are equal in Python, but not to a client
        case list() | tuple():
            return (list, *map(_by_value, value))
        case dict():
            return dict, frozenset((name, _by_value(item)) for name, item in value.items())
    own = getattr(value, "cache_key", None)
    if own is not None:
        return type(value), own()
    try:
        hash(value)
    except TypeError:
        raise TypeError(f"a Cache can't compare {type(value).__name__} objects by value: pass key=") from None
    return cast(Hashable, value)


# The types among the keys that `default_key` makes.
_KEY_TYPES: dict[str, Hashable] = {kind.__name__: kind for kind in (bool, int, float, list, dict)}


def encode_key(key: Hashable) -> bytes:
    """Encode a key for the other workers. Raises TypeError for other keys than `Cache.invalidate` lists."""

    def packed(part: Any) -> Any:
        match part:
            case str() | bytes() | None | bool() | int() | float():
                return part
            case tuple():
                return ["tuple", *map(packed, part)]
            case frozenset():
                return ["frozenset", *map(packed, part)]
            case type() if part.__name__ in _KEY_TYPES:
                return ["type", part.__name__]
        kind = type(part).__name__
        raise TypeError(f"a Cache can't send a key of type {kind} to the other workers: invalidate by text, or by tag")

    try:
        return msgspec.msgpack.encode(packed(key))
    except OverflowError as error:
        raise TypeError(f"a Cache can't send this key to the other workers: {error}") from None


def decode_key(data: bytes) -> Hashable:
    """Decode a key from `encode_key`. Raises msgspec.MsgspecError and ValueError for other bytes."""

    def unpacked(part: Any) -> Hashable:
        match part:
            case ["tuple", *parts]:
                return tuple(map(unpacked, parts))
            case ["frozenset", *parts]:
                return frozenset(map(unpacked, parts))
            case ["type", str(name)] if name in _KEY_TYPES:
                return _KEY_TYPES[name]
            case list() | dict():
                raise ValueError("not a key of a cache")
        return cast(Hashable, part)

    return unpacked(msgspec.msgpack.decode(data))


def shared_key(key: Hashable) -> bytes | None:
    """Return the same bytes for the same key in every worker, None for a key that other workers can't have."""

    def packed(part: Any) -> Any:
        match part:
            case tuple():
                return ["tuple", *map(packed, part)]
            case frozenset():  # its order differs from worker to worker
                return ["frozenset", *sorted(msgspec.msgpack.encode(packed(each)) for each in part)]
            case type():
                return ["type", part.__module__, part.__qualname__]
        if type(part) in _PLAIN:
            return part
        raise TypeError

    try:
        return hashlib.blake2b(msgspec.msgpack.encode(packed(key)), digest_size=16).digest()
    except (TypeError, OverflowError, RecursionError):
        return None


_PLAIN = {str, bytes, type(None), bool, int, float}
_SHARED_STRUCTS: dict[str, type[msgspec.Struct]] = {}


def share_values_of(kind: type[msgspec.Struct]) -> None:
    """Let values of this type go to other workers. Its fields must be of types that MessagePack restores."""
    _SHARED_STRUCTS[kind.__name__] = kind


def pack_value(value: Any) -> bytes:
    """Return the bytes of a value for other workers. Raises TypeError for a type that would not be the same there."""

    def packed(part: Any) -> Any:
        kind = type(part)
        if kind in _PLAIN:
            return part
        if kind is list or kind is tuple:
            return [kind.__name__, *map(packed, part)]
        if kind is dict:
            return ["dict", *([packed(name), packed(item)] for name, item in part.items())]
        if kind is msgspec.Raw:
            return ["raw", bytes(part)]
        if _SHARED_STRUCTS.get(kind.__name__) is kind:
            return ["struct", kind.__name__, msgspec.msgpack.encode(part)]
        raise TypeError(f"a Cache can't share values of type {kind.__name__}")

    try:
        return msgspec.msgpack.encode(packed(value))
    except (OverflowError, RecursionError) as error:
        raise TypeError(f"a Cache can't share this value: {error}") from None


def unpack_value(data: bytes) -> Any:
    """Return the value of `pack_value`."""

    def unpacked(part: Any) -> Any:
        match part:
            case ["list", *parts]:
                return [*map(unpacked, parts)]
            case ["tuple", *parts]:
                return tuple(map(unpacked, parts))
            case ["dict", *items]:
                return {unpacked(name): unpacked(item) for name, item in items}
            case ["raw", text]:
                return msgspec.Raw(text)
            case ["struct", name, text]:
                return msgspec.msgpack.decode(text, type=_SHARED_STRUCTS[name])
        return part

    return unpacked(msgspec.msgpack.decode(data))


def _report_failure(name: str, error: BaseException) -> None:
    """Report an error without a waiting caller. The raising code has logged a RealtimeError already."""
    if not isinstance(error, (RealtimeError, asyncio.CancelledError)):
        asyncio.get_running_loop().call_exception_handler(
            {
                "message": f"refreshing the cache of {name} failed; it serves the stale value meanwhile",
                "exception": error,
            }
        )
