"""Where a loop's time goes: the ledger charges each nanosecond of a loop's work to exactly one account. Without I/O.

Charging is exclusive. While protocol work calls a handler, only the handler's account is charged; after the handler
has returned, the protocol's account is charged again. Work without an account goes to OTHER, and idle time to no
account. So the accounts add up to the busy time of the loop, to the nanosecond.

There is one account per handler and per namespace, and a few more. Their names never come from clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class LoopWork(Enum):
    """Kinds of work on a loop. HANDLER has an account per handler, and FANOUT one per namespace."""

    HANDLER = "handler"
    FANOUT = "fanout"
    PROTOCOL = "protocol"  # commands of clients and their answers
    HTTP = "http"  # requests, and connections until they are WebSockets
    ENGINE = "engine"  # the link to the broker
    TIMERS = "timers"
    OTHER = "other"


class LoopAccount:
    """Time that one kind of work, or one handler or namespace, took of a loop.

    spent: nanoseconds, without the stretch in progress. turn: the loop's turn in which the account was last entered;
    calls, spent_before: how often in that turn, and `spent` at the first time.
    """

    __slots__ = ("calls", "kind", "name", "spent", "spent_before", "turn")

    def __init__(self, kind: LoopWork, name: str) -> None:
        self.kind = kind
        self.name = name
        self.spent = 0
        self.turn = self.calls = self.spent_before = 0


class LoopTimeLedger:
    """The accounts of one loop, for the holder of the server's state. Iterating yields them.

    current: the account charged now. turn: the beginning of the loop's current turn, in nanoseconds.
    """

    def __init__(self, now: Callable[[], int]) -> None:
        """now: returns nanoseconds of a monotonic clock. The loop counts as busy from this call on."""
        self._now = now
        self._all: dict[tuple[LoopWork, str], LoopAccount] = {}
        self._since = self.turn = now()
        self.current = self.open(LoopWork.OTHER)

    def __iter__(self) -> Iterator[LoopAccount]:
        return iter(list(self._all.values()))

    def open(self, kind: LoopWork, name: str = "") -> LoopAccount:
        """Return the account of this kind and name, the same object at every call. Open it once, ahead of use."""
        key = kind, name
        if key not in self._all:
            self._all[key] = LoopAccount(kind, name)
        return self._all[key]

    def switch(self, account: LoopAccount) -> LoopAccount:
        """Charge `account` from now on. Returns the account charged until now.

        Switch back to that account in a `finally`, and before every `await`. Takes about 0.15 microseconds.
        """
        now = self._now()
        before = self.current
        before.spent += now - self._since
        self._since = now
        self.current = account
        return before

    def enter(self, account: LoopAccount) -> LoopAccount:
        """As `switch`, in its body, and count a call in this turn."""
        if account.turn != self.turn:
            account.turn, account.calls, account.spent_before = self.turn, 0, account.spent
        account.calls += 1
        now = self._now()
        before = self.current
        before.spent += now - self._since
        self._since = now
        self.current = account
        return before

    def interrupt(self, account: LoopAccount) -> tuple[LoopAccount, int]:
        """Charge `account` for work of another thread than the loop's, beside the account of the loop's own work.

        Returns the state to `resume`.
        """
        interrupted = self.current, self._since
        self.current, self._since = account, self._now()
        return interrupted

    def resume(self, interrupted: tuple[LoopAccount, int]) -> None:
        """End the work of another thread; the loop's own is charged as if it had not been interrupted."""
        self.current.spent += self._now() - self._since
        self.current, self._since = interrupted

    def charging(self, account: LoopAccount, function: Callable[P, T]) -> Callable[P, T]:
        """Wrap `function` so that its time is charged to `account`."""

        @wraps(function)
        def charged(*args: P.args, **kwargs: P.kwargs) -> T:
            before = self.switch(account)
            try:
                return function(*args, **kwargs)
            finally:
                self.switch(before)

        return charged

    # For the loop's selector, which has already read the clock.

    def idle(self, now: int) -> None:
        """Stop charging while the loop idles; `now` in nanoseconds."""
        self.current.spent += now - self._since

    def wake(self, now: int) -> None:
        """Resume charging after `idle`; `now` in nanoseconds."""
        self._since = now
