"""Where a loop's time goes: each nanosecond that a loop is at work is charged to one account. Without I/O.

Time is charged exclusively. A handler that is called in the midst of protocol work is charged for itself alone, and
when it returns, the protocol work is charged again. What nobody opened an account for is OTHER's, and idling is
nobody's. So all accounts together are the time that the loop was busy, to the nanosecond.

There are as many accounts as there are handlers and namespaces, and a few more: names never come from clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class LoopWork(Enum):
    """What a loop does. The first two have an account for each handler, and for each namespace."""

    HANDLER = "handler"
    FANOUT = "fanout"
    PROTOCOL = "protocol"  # commands of clients and their answers
    HTTP = "http"  # requests, and connections until they are WebSockets
    ENGINE = "engine"  # the link to the broker
    TIMERS = "timers"
    OTHER = "other"


class LoopAccount:
    """What one thing has taken of a loop. spent: nanoseconds, without the stretch that is being charged now."""

    __slots__ = ("kind", "name", "spent")

    def __init__(self, kind: LoopWork, name: str) -> None:
        self.kind = kind
        self.name = name
        self.spent = 0


class LoopTimeLedger:
    """The accounts of one loop. Loop thread only; iterating gives all of them. charged: the one that is charged now."""

    def __init__(self, now: Callable[[], int]) -> None:
        """now: nanoseconds of a clock that never goes back. The loop counts as busy from here on."""
        self._now = now
        self._all: dict[tuple[LoopWork, str], LoopAccount] = {}
        self._since = now()
        self.charged = self.open(LoopWork.OTHER)

    def __iter__(self) -> Iterator[LoopAccount]:
        return iter(list(self._all.values()))

    def open(self, kind: LoopWork, name: str = "") -> LoopAccount:
        """The account of this name; the same object at every call. Ask for it once, ahead of time, and keep it."""
        key = kind, name
        if key not in self._all:
            self._all[key] = LoopAccount(kind, name)
        return self._all[key]

    def switch(self, account: LoopAccount) -> LoopAccount:
        """Charge `account` from now on. Returns the one that was charged until now, to be switched back to.

        Switch back in a `finally`, and before anything is awaited. About 0.15 microseconds.
        """
        now = self._now()
        before = self.charged
        before.spent += now - self._since
        self._since = now
        self.charged = account
        return before

    def charging(self, account: LoopAccount, function: Callable[P, T]) -> Callable[P, T]:
        """The same function, whose time is charged to `account`."""

        @wraps(function)
        def charged(*args: P.args, **kwargs: P.kwargs) -> T:
            before = self.switch(account)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(before)

        return charged

    # For the loop's selector, which has read the clock already.

    def idle(self, now: int) -> None:
        """The loop has nothing to do."""
        self.charged.spent += now - self._since

    def wake(self, now: int) -> None:
        """It has, after `idle`."""
        self._since = now
