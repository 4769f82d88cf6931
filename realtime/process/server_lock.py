"""The server lock of a worker: the thread that touches the server's state holds it.

    the loop's thread   holds it, except while a step of a handler runs: `ReleasingMarker` lets go of it for the step
    application code    never holds it: the methods of the App and of clients take it for the call (`ServerLock.call`)
    the relief thread   takes it, for about a millisecond at a time, once a turn of the loop has taken too long

So application code runs in one thread alone, as asyncio promises, and the server's state has one user at a time. A
process without a relief thread never releases the lock.
"""

from __future__ import annotations

import asyncio
import time
from _thread import allocate_lock
from collections.abc import Callable
from typing import Any, TypeVar

from twisted.internet.defer import Deferred

from realtime.process.heartbeat import HandlerMarker, HandlerNames
from realtime.supervision.loop_time import LoopAccount, LoopTimeLedger
from realtime.supervision.vitals import VitalsPage

T = TypeVar("T")

# Seconds in which the relief thread takes the lock after a call of the server.
_TURN = 0.0005


class ServerLock:
    """See the module. Created in the loop's thread, which holds it from then on.

    is_released: whether the loop's thread has released it. is_wanted: the loop's thread waits for it. is_asked: the
    relief thread waits for it. is_relieving: the relief thread holds it, and serves. on_step_end: called by the loop's
    thread when it is back after a relief. on_step: called by the loop's thread at the next step of application code; it
    wakes the relief thread.
    """

    __slots__ = ("acquire", "is_asked", "is_released", "is_relieving", "is_wanted", "on_step", "on_step_end", "release")

    def __init__(self) -> None:
        lock = allocate_lock()
        self.acquire: Callable[..., bool] = lock.acquire
        self.release: Callable[[], None] = lock.release
        self.is_released = self.is_wanted = self.is_asked = self.is_relieving = False
        self.on_step_end: Callable[[], None] | None = None
        self.on_step: Callable[[], None] | None = None
        lock.acquire()

    def take_back(self) -> None:
        """Acquire it for the loop's thread; the relief thread gives it back within a slice."""
        if not self.acquire(False):
            self.is_wanted = True
            self.acquire()
            self.is_wanted = False
        self.is_released = False

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function of the server for application code in the loop's thread."""
        if not self.is_released:  # code that no handler's mark surrounds: a task or a timer of the application
            return function(*args)
        self.take_back()
        try:
            return function(*args)
        finally:
            self.is_released = True
            self.release()
            if self.is_asked:
                # A handler that calls the server again and again must leave the relief thread its turn.
                time.sleep(_TURN)

    # For the server's code, which may run in the relief thread

    def call_on_loop(self, function: Callable[..., object], *args: Any) -> None:
        """Call a function that belongs to the loop's thread: now, or once that thread is back."""
        if self.is_relieving:
            asyncio.get_running_loop().call_soon_threadsafe(function, *args)
        else:
            function(*args)

    def back_on_loop(self) -> Deferred[None]:
        """Return a Deferred that fires in the loop's thread: the caller, in the relief thread, continues there."""
        back: Deferred[None] = Deferred()
        asyncio.get_running_loop().call_soon_threadsafe(back.callback, None)
        return back


class ReleasingMarker(HandlerMarker):
    """A marker that also releases the server lock for each step of a handler."""

    def __init__(self, page: VitalsPage, accounts: LoopTimeLedger, lock: ServerLock) -> None:
        super().__init__(page, accounts)
        self._lock = lock
        self._acquire, self._release = lock.acquire, lock.release

    def enter(self, names: HandlerNames, account: LoopAccount) -> tuple[HandlerNames | None, LoopAccount]:
        # As in `HandlerMarker`: one call less for each step of a handler.
        outer = self._running, self._accounts.enter(account)
        self._running = names
        self._page.mark(*names, account.turn, account.calls, account.spent - account.spent_before)
        lock = self._lock
        on_step = lock.on_step
        if on_step is not None:
            on_step()
        lock.is_released = True
        release = self._release  # a plain call: the attribute is no method
        release()
        return outer

    def leave(self, outer: tuple[HandlerNames | None, LoopAccount]) -> None:
        lock, acquire = self._lock, self._acquire
        if acquire(False):
            lock.is_released = False
        else:
            lock.take_back()
        if lock.on_step_end is not None:
            lock.on_step_end()
        self._running, account = outer
        self._accounts.switch(account)
        if self._running is None:
            self._page.unmark()
        else:
            self._page.mark(*self._running, account.turn, account.calls, account.spent - account.spent_before)
