"""Coroutines on the loop: they may await Deferreds and asyncio's awaitables alike.

Two ways to drive one. `drive` is for our own: it starts at once, on the caller's stack, and makes no task, so a
coroutine that never waits costs little more than a call. `await_deferreds` is for the application's: inside an asyncio
Task, where `asyncio.timeout`, `current_task` and libraries built on them work, it lets a coroutine await Deferreds too.
"""

from __future__ import annotations

import asyncio
import sys
import types
from asyncio.tasks import _current_tasks, _enter_task, _leave_task  # type: ignore[attr-defined]
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Protocol, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

from realtime.supervision.loop_time import LoopTimeLedger

T = TypeVar("T")

_NOTHING_YET: Any = object()

# Called once with (result, None) or (None, error); must not raise.
Done = Callable[[Any, BaseException | None], None]


class Steps(Protocol):
    """As much of a coroutine as it takes to drive it."""

    def send(self, value: Any, /) -> Any: ...
    def throw(self, error: BaseException, /) -> Any: ...


def drive(
    coroutine: Coroutine[Any, Any, Any], done: Done, accounts: LoopTimeLedger | None = None
) -> CoroutineDriver | None:
    """Start `coroutine` now, in a copy of the caller's context, and call `done` when it has finished.

    A coroutine that finishes without waiting has called `done` before this returns, which then returns None. Else it
    goes on when what it awaits is there, and the `CoroutineDriver` that is returned can cancel it. accounts: the
    loop's; then whoever started it is charged, whatever it is that lets it go on. Loop thread only.
    """
    running = CoroutineDriver(coroutine, done, accounts)
    return running if running._advance() else None


class CoroutineDriver:
    """A coroutine between two steps."""

    __slots__ = ("_account", "_accounts", "_awaited", "_cancelled", "_context", "_coroutine", "_done")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], done: Done, accounts: LoopTimeLedger | None = None) -> None:
        self._coroutine = coroutine
        self._done = done
        self._accounts = accounts
        self._account = None if accounts is None else accounts.current
        self._context = copy_context()
        self._awaited: Any = None
        self._cancelled = False

    def cancel(self) -> None:
        """Have what the coroutine awaits raise CancelledError in it (asyncio's or Twisted's). Harmless at the end."""
        awaited = self._awaited
        if awaited is None:
            self._cancelled = True
        else:
            awaited.cancel()

    def _advance(self, error: BaseException | None = None) -> bool:
        """Go on until the coroutine waits (True) or has finished (False)."""
        self._awaited = None
        result: Any = None
        try:
            if error is None:
                awaited = self._context.run(self._coroutine.send, None)
            else:
                awaited = self._context.run(self._coroutine.throw, error)
        except StopIteration as stop:
            result, error = stop.value, None
        except BaseException as raised:
            error = raised
        else:
            return self._wait(awaited)
        # Out of the `except` blocks, so that what `done` raises is not chained to it.
        self._done(result, error)
        return False

    def _wait(self, awaited: Any) -> bool:
        if isinstance(awaited, Deferred):
            self._awaited = awaited
            awaited.addBoth(self._fired)
        elif getattr(awaited, "_asyncio_future_blocking", False):
            # How an asyncio Future says that it was awaited (asyncio.Future, "Duck typing Futures").
            awaited._asyncio_future_blocking = False
            self._awaited = awaited
            awaited.add_done_callback(self._woken)
        elif awaited is None:  # asyncio.sleep(0): let others go first
            asyncio.get_running_loop().call_soon(self._woken)
        else:
            return self._advance(TypeError(f"a coroutine can't await {awaited!r} here"))
        if self._cancelled and self._awaited is not None:
            self._cancelled = False
            awaited.cancel()
        return True

    def _fired(self, result: object) -> None:
        # The Deferred gives its result to the `await` that is waiting in it. A failure it could not raise there before
        # it has run all its callbacks, of which this is one.
        self._go_on(result.value if isinstance(result, Failure) else None)

    def _woken(self, _: object = None) -> None:
        cancelled, self._cancelled = self._cancelled, False
        self._go_on(asyncio.CancelledError() if cancelled else None)

    def _go_on(self, error: BaseException | None) -> None:
        if self._accounts is None or self._account is None:
            self._advance(error)
            return
        before = self._accounts.switch(self._account)
        try:
            self._advance(error)
        finally:
            self._accounts.switch(before)


def settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """Give a future the outcome of a coroutine, unless it has one or was cancelled."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, asyncio.CancelledError):
        future.cancel()
    else:
        future.set_exception(error)


def start_future(coroutine: Coroutine[Any, Any, Any], accounts: LoopTimeLedger | None = None) -> asyncio.Future[Any]:
    """Start `coroutine` now and return the future of its result; cancelling the future cancels the coroutine.

    accounts: see `drive`.
    """
    future = asyncio.get_running_loop().create_future()
    running = drive(coroutine, partial(settle, future), accounts)
    if running is not None:
        future.add_done_callback(lambda future: running.cancel() if future.cancelled() else None)
    return future


async def gather(coroutines: Sequence[Coroutine[Any, Any, Any]], accounts: LoopTimeLedger | None = None) -> list[Any]:
    """Start all now, in order, and return their results in that order. Raises the first error when all have ended.

    accounts: see `drive`.
    """
    results: list[Any] = [None] * len(coroutines)
    errors: list[BaseException] = []
    left = len(coroutines)
    ended: Deferred[None] = Deferred()

    def done(number: int, result: Any, error: BaseException | None) -> None:
        nonlocal left
        left -= 1
        results[number] = result
        if error is not None:
            errors.append(error)
        if left == 0:
            ended.callback(None)

    for number, coroutine in enumerate(coroutines):
        drive(coroutine, partial(done, number), accounts)
    if left:
        await ended
    if errors:
        raise errors[0]
    return results


def eager_task(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """A task that has taken its first step already, so that one that never waits costs no turn of the loop."""
    loop = asyncio.get_running_loop()
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, eager_start=True)
    # Until 3.12 a task has its loop call the first step soon. The call is taken here, and made now.
    loop.call_soon = _take  # type: ignore[method-assign, assignment]
    try:
        task = asyncio.Task(coroutine, loop=loop)
    finally:
        del loop.call_soon
    step, context = _taken.pop()
    outer = _current_tasks.get(loop)
    if outer is None:
        context.run(step)
        return task
    _leave_task(loop, outer)
    try:
        context.run(step)
    finally:
        _enter_task(loop, outer)
    return task


_taken: list[tuple[Callable[[], object], Context]] = []


def _take(step: Callable[[], object], *, context: Context) -> None:
    _taken.append((step, context))


@types.coroutine
def await_deferreds(coroutine: Steps, awaited: Any = _NOTHING_YET) -> Generator[Any, Any, Any]:
    """Await `coroutine` inside an asyncio Task, and have it get the results of the Deferreds that it awaits.

    awaited: what it waits for, if it has begun already.
    """
    error: BaseException | None = None
    while True:
        if awaited is _NOTHING_YET:
            try:
                awaited = coroutine.send(None) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
        error = None
        try:
            if isinstance(awaited, Deferred):
                yield from _until_fired(awaited)
            else:
                yield awaited
        except BaseException as raised:
            error = raised
        awaited = _NOTHING_YET


def _until_fired(deferred: Deferred[Any]) -> Generator[Any, Any, None]:
    """Wait for a Deferred without taking its result; cancel it when the task is cancelled."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fired(result: Any) -> Any:
        if not waiter.done():
            waiter.set_result(None)
        elif isinstance(result, Failure):
            return None  # the failure of a cancelled wait, which nobody is left to hear
        return result

    deferred.addBoth(fired)
    try:
        yield from waiter
    except asyncio.CancelledError:
        deferred.cancel()
        raise
