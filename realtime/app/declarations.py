"""Declarations of handlers: what a declaration may say, and the checks that it must pass.

A declaration settles everything about a handler: its purpose, where it runs, and which arguments it takes. A mistake
raises `SettingsError` at once, with one line that names the function's file and line.
"""

from __future__ import annotations

import fnmatch
import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, get_args

from realtime.app.data_types import data_converter
from realtime.cache import Cache, undecorate
from realtime.config.values import parse_duration
from realtime.errors import SettingsError

Value = TypeVar("Value")

RunIn = Literal["loop", "thread", "process", "auto"]
"""Where a handler runs; see `App.rpc`."""

PLACES: tuple[str, ...] = get_args(RunIn)

PolicyName = Literal["refuse", "stale", "ignore"]
POLICIES: tuple[str, ...] = get_args(PolicyName)

Policy = PolicyName | Callable[..., PolicyName]
"""The treatment of calls while the worker is overloaded: a name, or a function of the handler's arguments."""

Where = Literal["one", "each"]
"""The workers that run a periodic function; see `App.every`."""

PLACES_OF_TASKS: tuple[str, ...] = get_args(Where)

MIN_INTERVAL, MAX_INTERVAL = 0.01, 30 * 86_400.0
"""Limits of the interval of a periodic function, in seconds."""

_PACKAGE = str(Path(__file__).parent)


@dataclass(frozen=True, slots=True)
class Schedule:
    """When and where a periodic function runs; see `App.every`. interval: seconds."""

    interval: float
    where: Where
    immediately: bool


@dataclass(frozen=True, slots=True)
class HandlerOptions:
    """The options of a declaration; see `App.rpc`, `HTTP.get` and `App.every`."""

    run: RunIn | None = None
    timeout: float | None = None
    limit: int | None = None
    pressure: Policy | None = None
    cache: Cache | None = None
    schedule: Schedule | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Handler:
    """One declared function, and how to call it.

    kind: its purpose, a key of `ARGUMENTS`. name: for logs and metrics, unique in its App. run: one of `PLACES`.
    timeout: seconds; None for the configured default, 0 for no limit. limit: concurrent calls; None for no limit.
    place: "file:line" of the function. taken: the slice of its kind's arguments that the function takes. pressure: a
    policy, or a function of the same arguments that chooses one. cache: keeps its answers, if there is one. convert:
    makes `data` what its annotation says; None without one. schedule: of a periodic function.
    """

    function: Callable[..., Any]
    kind: str
    name: str
    run: RunIn
    timeout: float | None
    limit: int | None
    place: str
    taken: slice
    pressure: Policy = "ignore"
    cache: Cache | None = None
    convert: Callable[[Any], Any] | None = None
    schedule: Schedule | None = None

    def take(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the function's arguments, out of all of its kind. Raises ClientError 400 for data of another type."""
        taken = args[self.taken]
        return taken if self.convert is None else self.convert_data(taken)

    def convert_data(self, taken: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments with `data`, the last one, converted."""
        return taken if self.convert is None else (*taken[:-1], self.convert(taken[-1]))


ARGUMENTS: dict[str, tuple[tuple[str, ...], tuple[slice, ...]]] = {
    "on_connecting": (("request",), (slice(None),)),
    "on_connected": (("client",), (slice(None),)),
    "on_disconnected": (("client", "code", "reason"), (slice(3), slice(1))),
    "on_subscribe": (("client", "channel", "data"), (slice(3), slice(2))),
    "on_publish": (("client", "channel", "data"), (slice(None),)),
    "on_message": (("client", "data"), (slice(None),)),
    "rpc": (("client", "data"), (slice(2), slice(1, 2))),
    "http": (("request",), (slice(None),)),
    "on_start": ((), (slice(None),)),
    "on_stop": ((), (slice(None),)),
    "every": (("term",), (slice(1), slice(0))),
}
"""For each kind of handler: the names of its arguments, and the slices of them that a function may take."""


def make_handler(kind: str, key: str, function: Callable[..., Any], options: HandlerOptions) -> Handler:
    """Check one declaration and return its handler. Raises SettingsError."""
    place = defining_line(function)
    name = f"{kind} {key}".rstrip()
    if options.timeout is not None and not options.timeout >= 0:
        raise SettingsError([f"{place}: the timeout of {name} must be a number of seconds, 0 for no limit"])
    if options.limit is not None and not options.limit >= 1:
        raise SettingsError([f"{place}: the limit of {name} must be 1 or more"])
    subject = f"{place}: {name}"
    called, cache = _cache_of(function, kind, name, options.cache, subject)
    run = _run_of(called, options.run, subject)
    taken = _arguments_of(called, kind, run, subject)
    names = ARGUMENTS[kind][0][taken]
    takes_data = names[-1:] == ("data",)
    return Handler(
        called,
        kind,
        name,
        run,
        options.timeout,
        options.limit,
        place,
        taken,
        _policy_of(options.pressure, kind, cache, subject),
        cache,
        data_converter(called, len(names) - 1, subject) if takes_data else None,
        options.schedule,
    )


def make_schedule(interval: float | str, where: Where, immediately: bool) -> Schedule:
    """Check the arguments of `App.every`. Raises SettingsError."""
    place = calling_line()
    if isinstance(interval, str):
        try:
            seconds = parse_duration(interval)
        except ValueError as error:
            raise SettingsError([f"{place}: the interval of @app.every: {error}"]) from None
    elif isinstance(interval, int | float) and not isinstance(interval, bool):
        seconds = float(interval)
    else:
        raise SettingsError([f'{place}: @app.every needs an interval, as in @app.every("1s") or @app.every(0.5)'])
    if not MIN_INTERVAL <= seconds <= MAX_INTERVAL:
        raise SettingsError(
            [f"{place}: the interval of @app.every is {seconds:g} s; choose one from 10 ms to {MAX_INTERVAL:g} s"]
        )
    if where not in PLACES_OF_TASKS:
        raise SettingsError([f"{place}: @app.every has where={where!r}; choose one of {', '.join(PLACES_OF_TASKS)}"])
    return Schedule(seconds, where, bool(immediately))


class Patterns(Generic[Value]):
    """A mapping from channel patterns to values: an exact name wins, then the first glob that matches.

    find: returns the value for a channel name, or None. Results are memoised for 4096 names; clients choose names, so
    the memory must have a bound.
    """

    def __init__(self, by_pattern: Mapping[str, Value]) -> None:
        self._exact = dict(by_pattern)
        self._globs = [
            (re.compile(fnmatch.translate(pattern)), value)
            for pattern, value in by_pattern.items()
            if any(sign in pattern for sign in "*?[")
        ]
        self.find: Callable[[str], Value | None] = functools.lru_cache(maxsize=4096)(self._search)

    def _search(self, name: str) -> Value | None:
        if name in self._exact:
            return self._exact[name]
        return next((value for glob, value in self._globs if glob.match(name)), None)


def defining_line(function: object) -> str:
    """Return "file:line" of a function's definition."""
    function = inspect.unwrap(function) if callable(function) else function
    while isinstance(function, functools.partial):
        function = function.func
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def calling_line() -> str:
    """Return "file:line" of the application's code that called into this package."""
    frame = sys._getframe(1)
    while str(Path(frame.f_code.co_filename).parent) == _PACKAGE and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _run_of(function: Callable[..., Any], run: RunIn | None, subject: str) -> RunIn:
    """Check where a function runs, and fill in the default."""
    if not callable(function):
        raise SettingsError([f"{subject} is not a function"])
    is_coroutine = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - finds an object with an `async def __call__`
    )
    if run is None:
        return "loop" if is_coroutine else "thread"
    if run not in PLACES:
        raise SettingsError([f"{subject} has run={run!r}; choose one of {', '.join(PLACES)}"])
    if is_coroutine and run != "loop":
        raise SettingsError([f'{subject} is a coroutine and runs on the loop; run="{run}" is for a plain function'])
    return run


def _arguments_of(function: Callable[..., Any], kind: str, run: RunIn, subject: str) -> slice:
    """Choose the longest slice of arguments that a function takes. A handler process gets no client."""
    names, slices = ARGUMENTS[kind]
    if run == "process":
        slices = tuple(part for part in slices if "client" not in names[part])
        if not slices:
            raise SettingsError([f'{subject} takes a client, which a process can\'t receive; use run="thread"'])
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some callables written in C have no signature
        return slices[0]
    for part in slices:
        try:
            signature.bind(*names[part])
        except TypeError:
            continue
        return part
    expected = " or ".join(f"({', '.join(names[part])})" for part in reversed(slices))
    remark = " in a process, which can't receive a client" if run == "process" and "client" in names else ""
    raise SettingsError([f"{subject} is called with {expected}{remark}, which {signature} does not accept"])


def _cache_of(
    function: Callable[..., Any], kind: str, name: str, cache: Cache | None, subject: str
) -> tuple[Callable[..., Any], Cache | None]:
    """Return the function to call and its cache, from the declaration or from a `Cache` that decorates the function."""
    called, decorating = undecorate(function)
    if decorating is None and cache is None:
        return function, None
    if kind not in ("rpc", "http"):
        raise SettingsError([f"{subject} has a cache; only rpc and http handlers may have one"])
    if decorating is not None and cache is not None:
        raise SettingsError([f"{subject} has two caches: one declared, and one as a decorator"])
    if cache is not None:
        try:
            cache.attach_to(name)
        except TypeError as error:
            raise SettingsError([f"{subject}: {error}"]) from None
    return called, cache or decorating


def _policy_of(pressure: Policy | None, kind: str, cache: Cache | None, subject: str) -> Policy:
    """Check the pressure policy of a handler, and fill in the default."""
    if pressure is None:
        return "ignore" if kind != "http" else "stale" if cache is not None else "refuse"
    if callable(pressure):
        return pressure
    if pressure not in POLICIES:
        raise SettingsError([f"{subject} has pressure={pressure!r}; choose one of {', '.join(POLICIES)}"])
    if pressure == "stale" and cache is None:
        raise SettingsError([f'{subject} has pressure="stale" but no cache=Cache(...) to serve from'])
    return pressure
