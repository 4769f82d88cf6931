"""Marks the time in which a handler runs on the loop, so that it can be charged and, when it blocks, be named."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from realtime.app import Handler
from realtime.supervision.loop_time import LoopAccount, LoopTimeLedger

Names = tuple[bytes, bytes]
"""A handler's name, and the channel, method or path that the call concerns; in UTF-8."""


class Marker(Protocol):
    """Records which handler runs on the loop, and has the loop's time charged to its account."""

    def enter(self, names: Names, account: LoopAccount) -> Any:
        """A handler begins to run, perhaps inside another one. Returns a token for `leave`."""

    def leave(self, outer: Any) -> None:
        """The handler has returned, or waits. outer: the token that `enter` returned."""


class ChargingMarker:
    """A marker that charges the handlers' accounts and records nothing else."""

    def __init__(self, ledger: LoopTimeLedger) -> None:
        self._ledger = ledger

    def enter(self, names: Names, account: LoopAccount) -> LoopAccount:
        return self._ledger.switch(account)

    def leave(self, outer: LoopAccount) -> None:
        self._ledger.switch(outer)


def call_marked(marker: Marker, names: Names, account: LoopAccount, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function` between `enter` and `leave` of the marker."""
    outer = marker.enter(names, account)
    try:
        return function(*args)
    finally:
        marker.leave(outer)


class MarkedCoroutine:
    """A handler's coroutine that is marked during each of its steps; between two steps other code runs."""

    __slots__ = ("_call_marked", "_coroutine")

    def __init__(self, call_marked: Callable[..., Any], coroutine: Coroutine[Any, Any, Any]) -> None:
        """call_marked: calls a function with its arguments, marked; see `call_marked` above."""
        self._call_marked = call_marked
        self._coroutine = coroutine

    def send(self, value: Any) -> Any:
        return self._call_marked(self._coroutine.send, value)

    def throw(self, error: BaseException) -> Any:
        return self._call_marked(self._coroutine.throw, error)


def names_reader(handler: Handler) -> Callable[[tuple[Any, ...]], Names]:
    """Return a function from a call's arguments to its names; the subject is the channel, path or method."""
    name = handler.name.encode()
    if handler.kind in ("on_subscribe", "on_publish"):
        return lambda args: (name, str(args[1]).encode("utf-8", "replace"))
    if handler.kind == "http":
        return lambda args: (name, str(args[0].path).encode("utf-8", "replace"))
    names = name, handler.name.partition(" ")[2].encode("utf-8", "replace")
    return lambda args: names
