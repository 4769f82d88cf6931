"""Runs coroutines on the loop; a coroutine may await Deferreds and asyncio's awaitables alike.

There are two ways. `drive` is for coroutines of this package: it starts one at once, on the caller's stack and without
a task, so a coroutine that never waits costs little more than a function call. `await_deferreds` is for coroutines of
the application: it awaits one inside an asyncio Task, where `asyncio.timeout`, `current_task` and the libraries that
build on them work, and lets the coroutine await Deferreds too.
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

_NOT_AWAITING: Any = object()

DoneCallback = Callable[[Any, BaseException | None], None]
"""Called once with (result, None) or (None, error). Must not raise."""


class CoroutineLike(Protocol):
    """The methods of a coroutine that drive it."""

    def send(self, value: Any, /) -> Any: ...
    def throw(self, error: BaseException, /) -> Any: ...


def drive(
    coroutine: Coroutine[Any, Any, Any], done: DoneCallback, ledger: LoopTimeLedger | None = None
) -> CoroutineDriver | None:
    """Start `coroutine` now, and call `done` when it has finished.

    Its first step runs in the caller's context, and the others in a copy: it must not set context variables before it
    waits. Returns None if the coroutine finished without waiting; `done` has been called by then. Otherwise returns the
    `CoroutineDriver`, which can cancel it; the coroutine continues as soon as the object that it awaits has a result.
    ledger: of the loop's time. With it, every step is charged to the account that was charged at the start, and not to
    the code that resumes the coroutine. Loop thread only.
    """
    result: Any = None
    error: BaseException | None = None
    try:
        awaited = coroutine.send(None)
    except StopIteration as stop:
        result = stop.value
    except BaseException as raised:
        error = raised
    else:
        driver = CoroutineDriver(coroutine, done, ledger)
        return driver if driver._wait(awaited) else None
    # Outside the `except` blocks, so that an exception of `done` is not chained to the coroutine's.
    done(result, error)
    return None


class CoroutineDriver:
    """A coroutine that `drive` has started and that waits, and its next step."""

    __slots__ = ("_account", "_awaited", "_cancelled", "_context", "_coroutine", "_done", "_ledger")

    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], done: DoneCallback, ledger: LoopTimeLedger | None = None
    ) -> None:
        self._coroutine = coroutine
        self._done = done
        self._ledger = ledger
        self._account = None if ledger is None else ledger.current
        self._context = copy_context()
        self._awaited: Any = None
        self._cancelled = False

    def cancel(self) -> None:
        """Make the pending `await` raise CancelledError (asyncio's or Twisted's). Harmless after the end."""
        awaited = self._awaited
        if awaited is None:
            self._cancelled = True
        else:
            awaited.cancel()

    def _advance(self, error: BaseException | None) -> bool:
        """Run the coroutine until it waits (True) or has finished (False)."""
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
        self._done(result, error)  # outside the `except` blocks, as in `drive`
        return False

    def _wait(self, awaited: Any) -> bool:
        # The most frequent case first: the engine and the transports return Deferreds.
        if isinstance(awaited, Deferred):
            self._awaited = awaited
            awaited.addBoth(self._on_deferred)
        elif getattr(awaited, "_asyncio_future_blocking", False):
            # The flag by which an asyncio Future announces an `await` (asyncio.Future, "Duck typing Futures").
            awaited._asyncio_future_blocking = False
            self._awaited = awaited
            awaited.add_done_callback(self._on_future)
        elif awaited is None:  # asyncio.sleep(0): let other callbacks run first
            asyncio.get_running_loop().call_soon(self._on_future)
        else:
            return self._advance(TypeError(f"a coroutine can't await {awaited!r} here"))
        if self._cancelled and self._awaited is not None:
            self._cancelled = False
            awaited.cancel()
        return True

    def _on_deferred(self, result: object) -> None:
        # The Deferred hands its result to the `await` inside it. It can't raise a failure there until all its
        # callbacks have run, and this is one of them; so the exception is thrown from here.
        self._resume(result.value if isinstance(result, Failure) else None)

    def _on_future(self, _: object = None) -> None:
        cancelled, self._cancelled = self._cancelled, False
        self._resume(asyncio.CancelledError() if cancelled else None)

    def _resume(self, error: BaseException | None) -> None:
        if self._ledger is None or self._account is None:
            self._advance(error)
            return
        charged_before = self._ledger.switch(self._account)
        try:
            self._advance(error)
        finally:
            self._ledger.switch(charged_before)


def settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    """Set the outcome of a coroutine as that of `future`, unless the future is done or was cancelled."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, asyncio.CancelledError):
        future.cancel()
    else:
        future.set_exception(error)


def _call(function: Callable[..., object], *args: Any) -> None:
    function(*args)


def start_future(
    coroutine: Coroutine[Any, Any, Any],
    ledger: LoopTimeLedger | None = None,
    call_on_loop: Callable[..., None] = _call,
) -> asyncio.Future[Any]:
    """Start `coroutine` now and return the future of its result; cancelling the future cancels the coroutine.

    It runs in a copy of the caller's context. ledger: see `drive`. call_on_loop: calls a function with its arguments in
    the loop's thread, to which the future belongs.
    """
    future = asyncio.get_running_loop().create_future()
    driver = copy_context().run(drive, coroutine, partial(call_on_loop, settle, future), ledger)
    if driver is not None:
        future.add_done_callback(lambda future: driver.cancel() if future.cancelled() else None)
    return future


async def gather(coroutines: Sequence[Coroutine[Any, Any, Any]], ledger: LoopTimeLedger | None = None) -> list[Any]:
    """Start all coroutines now, in order, and return their results in that order.

    Raises the first error, once all have ended. ledger: see `drive`.
    """
    results: list[Any] = [None] * len(coroutines)
    errors: list[BaseException] = []
    unfinished = len(coroutines)
    all_done: Deferred[None] = Deferred()

    def done(index: int, result: Any, error: BaseException | None) -> None:
        nonlocal unfinished
        unfinished -= 1
        results[index] = result
        if error is not None:
            errors.append(error)
        if unfinished == 0:
            all_done.callback(None)

    for index, coroutine in enumerate(coroutines):
        drive(coroutine, partial(done, index), ledger)
    if unfinished:
        await all_done
    if errors:
        raise errors[0]
    return results


def eager_task(coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Return a task that has taken its first step, so that a coroutine that never waits costs no turn of the loop."""
    loop = asyncio.get_running_loop()
    if sys.version_info >= (3, 12):
        return asyncio.Task(coroutine, loop=loop, eager_start=True)
    # Until 3.12 a task schedules its first step with `loop.call_soon`. Capture that call, and make it now.
    loop.call_soon = _capture_step  # type: ignore[method-assign, assignment]
    try:
        task = asyncio.Task(coroutine, loop=loop)
    finally:
        del loop.call_soon
    step, context = _captured_steps.pop()
    outer_task = _current_tasks.get(loop)
    if outer_task is None:
        context.run(step)
        return task
    _leave_task(loop, outer_task)
    try:
        context.run(step)
    finally:
        _enter_task(loop, outer_task)
    return task


_captured_steps: list[tuple[Callable[[], object], Context]] = []


def _capture_step(step: Callable[[], object], *, context: Context) -> None:
    _captured_steps.append((step, context))


@types.coroutine
def await_deferreds(coroutine: CoroutineLike, awaited: Any = _NOT_AWAITING) -> Generator[Any, Any, Any]:
    """Await `coroutine` inside an asyncio Task, and resume it with the results of the Deferreds that it awaits.

    awaited: the object that a coroutine which has already started is waiting for.
    """
    error: BaseException | None = None
    while True:
        if awaited is _NOT_AWAITING:
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
        awaited = _NOT_AWAITING


def _until_fired(deferred: Deferred[Any]) -> Generator[Any, Any, None]:
    """Wait for a Deferred without taking its result; cancel it when the task is cancelled."""
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fired(result: Any) -> Any:
        if not waiter.done():
            waiter.set_result(None)
        elif isinstance(result, Failure):
            return None  # the failure of a cancelled wait, which no code will read
        return result

    deferred.addBoth(fired)
    try:
        yield from waiter
    except asyncio.CancelledError:
        deferred.cancel()
        raise
