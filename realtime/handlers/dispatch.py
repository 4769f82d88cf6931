"""Runs the application's handlers: coroutines on the loop, plain functions in threads, processes or wherever is best.

    session -> Dispatcher.procedure("report") -> Call -> asyncio Task -> the coroutine
                                                                      `> gate -> thread pool -> the function
                                                                      `> gate -> process pool -> the function

Whatever a handler does, its caller gets an answer in time: a result, or one of the exceptions named at `HandlerCall`.
Its place may stay taken for longer, since a thread can't be stopped (a process is killed); that is bounded, and
counted. A handler's own mistake is logged once with its traceback, and never travels on.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dis
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import copy_context
from functools import partial
from typing import Any, Protocol

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.threadable import isInIOThread

from realtime.app import ARGUMENTS, POLICIES, App, Handler, Patterns, Server
from realtime.cache import NothingCached
from realtime.config.settings import WorkersSettings
from realtime.errors import (
    INTERNAL_ERROR,
    TOO_MANY_REQUESTS,
    ClientError,
    Disconnect,
    EngineUnavailable,
    HandlerTimeout,
    Overloaded,
    PoolFull,
    RealtimeError,
    SettingsError,
)
from realtime.handlers.compute_pool import ComputePool
from realtime.handlers.coroutines import await_deferreds, drive, eager_task, start_future
from realtime.handlers.outcomes import HandlerErrorLog, OutcomeCounters
from realtime.handlers.placement import PlacementTracker
from realtime.handlers.results import maker, plain_result
from realtime.handlers.threads import BoundedSemaphore, HandlerThreads, ThreadSafeClient
from realtime.metrics import Counter, Metrics
from realtime.supervision.loop_time import LoopAccount, LoopTimeLedger, LoopWork
from realtime.supervision.pressure import Throttle


class PressureReading(Protocol):
    """What presses this worker; for any thread to ask."""

    @property
    def pressed(self) -> bool:
        """Whether anything does."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """What does: names of a closed set."""


class _NoPressure:
    """Nothing ever does."""

    pressed = False
    reasons = ()


class Marker(Protocol):
    """Who wants to know which handler runs on the loop, and has it charged.

    names: the handler and its channel or method, in UTF-8. account: the handler's.
    """

    def enter(self, names: tuple[bytes, bytes], account: LoopAccount) -> Any:
        """It begins to run, perhaps inside another. What this returns is given to `leave`."""

    def leave(self, outer: Any) -> None:
        """It has returned, or waits for something."""


class _ChargingOnly:
    """Nobody wants to know."""

    def __init__(self, accounts: LoopTimeLedger) -> None:
        self._accounts = accounts

    def enter(self, names: tuple[bytes, bytes], account: LoopAccount) -> LoopAccount:
        return self._accounts.switch(account)

    def leave(self, outer: LoopAccount) -> None:
        self._accounts.switch(outer)


_NO_PRESSURE = _NoPressure()


class Dispatcher:
    """The handlers of one App, ready to be called; what the session asks for is its Protocol `Handlers`.

    Loop thread only, except `perform`. Construct it before the loop runs or while it does; `start` it on the loop.
    """

    def __init__(
        self,
        app: App,
        reactor: Any,
        settings: WorkersSettings,
        metrics: Metrics,
        log: Logger,
        marks: Marker | None = None,
        pressure: PressureReading = _NO_PRESSURE,
        processes: ComputePool | None = None,
        slow: float = 0.05,
        accounts: LoopTimeLedger | None = None,
    ) -> None:
        """reactor: IReactorTime and IReactorFromThreads, on the asyncio loop. marks: told which handler runs on it,
        and charge `accounts`.

        pressure: decides together with the handlers' policies what is refused. processes: not started yet, for the
        handlers that run in one. slow: seconds on the loop that are too long for a handler with run="auto".
        accounts: the loop's; every handler is given one.
        """
        self._app = app
        self._reactor = reactor
        self._settings = settings
        self._metrics = metrics
        self._log = log
        self._mistakes = HandlerErrorLog(log, reactor)
        self._pressure = pressure
        self.throttles: list[Throttle] = []  # of handlers on the loop; whoever watches the loop calls their `observe`
        self._processes = processes
        self._slow = slow
        self.accounts = accounts or LoopTimeLedger(time.monotonic_ns)
        self._marks = marks or _ChargingOnly(self.accounts)
        self._made: list[HandlerCall] = []
        self.threads = HandlerThreads(reactor, settings.threads, settings.thread_queue)
        self.threads.measure(metrics)
        self.connecting = self._only("on_connecting")
        self.disconnected = self._only("on_disconnected")
        self.message = self._only("on_message")
        self._subscribing = Patterns(self._calls("on_subscribe"))
        self._publishing = Patterns(self._calls("on_publish"))
        self._procedures = self._calls("rpc")
        self._routes = self._calls("http")
        self.has_procedures = bool(self._procedures)

    def subscribing(self, channel: str) -> HandlerCall | None:
        """Who decides on a subscription to `channel`: called with (client, channel, data), gives Grant or None."""
        return self._subscribing.find(channel)

    def publishing(self, channel: str) -> HandlerCall | None:
        """Who decides on a client's publication: called with (client, channel, data), gives new data or None."""
        return self._publishing.find(channel)

    def procedure(self, method: str) -> HandlerCall | None:
        """Who answers calls of `method`: called with (client, data), gives anything that msgspec can encode."""
        return self._procedures.get(method)

    def route(self, method: str, path: str) -> HandlerCall | None:
        """Who answers requests for exactly this path: use its `perform`, with a `realtime.app.Request`."""
        return self._routes.get(f"{method} {path}")

    @property
    def running(self) -> int:
        """How many calls of handlers have begun and wait for something."""
        return sum(call.running for call in self._made)

    def bind(self, server: Server) -> None:
        """Connect the App's own methods (`App.publish` and the rest) to the server."""
        self._app.bind(server, self.perform, lambda: self._pressure.reasons)
        if self._processes is not None:
            self._processes.bind(server)

    def perform(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine of the server for whoever calls: on the loop a started future, in a thread the result."""
        if isInIOThread():
            return start_future(coroutine, self.accounts)
        answer: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def done(result: Any, error: BaseException | None) -> None:
            if error is None:
                answer.set_result(result)
            else:
                answer.set_exception(error)

        self._reactor.callFromThread(drive, coroutine, done, self.accounts)
        return answer.result()

    async def start(self) -> None:
        """Open the pools and run the `on_start` handlers.

        Raises SettingsError with one line about the first that fails: this worker can't serve.
        """
        self.threads.start()
        if self._processes is not None and any(call.handler.run == "process" for call in self._made):
            self._processes.start()
        for call in self._calls("on_start").values():
            try:
                await call.perform(timeout=0)
            except ClientError as error:
                raise SettingsError(
                    [f"{call.handler.place}: {call.handler.name} failed: {_first_line(error)}"]
                ) from None

    async def stop(self, grace: float) -> None:
        """Run the `on_stop` handlers and close the pools; done after about `grace` seconds at the latest.

        A thread that does not return by then is left behind; it ends with the process.
        """
        until = self._reactor.seconds() + grace
        for call in reversed(self._calls("on_stop").values()):
            left = until - self._reactor.seconds()
            if left > 0:
                # What went wrong is logged and counted; the next one is to have its chance.
                with contextlib.suppress(ClientError, Disconnect, HandlerTimeout, PoolFull):
                    await call.perform(timeout=left)
        if self._processes is not None:
            await self._processes.stop(max(until - self._reactor.seconds(), 0.0))
        await self.threads.stop(max(until - self._reactor.seconds(), 0.0))

    def _only(self, kind: str) -> HandlerCall | None:
        return next(iter(self._calls(kind).values()), None)

    def _calls(self, kind: str) -> dict[str, HandlerCall]:
        return {key: self._call(handler) for key, handler in self._app.handlers(kind).items()}

    def _call(self, handler: Handler) -> HandlerCall:
        gate = BoundedSemaphore(handler.limit, self._settings.thread_queue) if handler.limit else None
        timeout = self._settings.handler_timeout if handler.timeout is None else handler.timeout
        outcomes = OutcomeCounters(self._metrics, handler.name)
        account = self.accounts.open(LoopWork.HANDLER, handler.name)
        throttle = Throttle(account)
        if handler.run in ("loop", "auto") and handler.pressure != "ignore":
            self.throttles.append(throttle)
            self._metrics.gauge(
                "realtime_handler_throttle",
                "Calls of a handler that may run on the loop at a time; 0: as many as come.",
                lambda: throttle.limit or 0,
                handler=handler.name,
            )
        valve = AdmissionPolicy(handler, self._pressure, throttle, self._metrics)
        moves = None
        if handler.run == "auto":
            moves = PlacementTracker(handler, self._slow, self._reactor, self._metrics, self._log)
        pools = self.threads, self._processes
        call = HandlerCall(handler, timeout, gate, pools, moves, self._mistakes, outcomes, self._marks, account, valve)
        self._made.append(call)
        return call


class HandlerCall:
    """One handler, ready to be called. `gate`: its own limit, if it has one. `timeout`: seconds, 0 for none."""

    def __init__(
        self,
        handler: Handler,
        timeout: float,
        gate: BoundedSemaphore | None,
        pools: tuple[HandlerThreads, ComputePool | None],
        moves: PlacementTracker | None,
        mistakes: HandlerErrorLog,
        outcomes: OutcomeCounters,
        marks: Marker,
        account: LoopAccount,
        valve: AdmissionPolicy,
    ) -> None:
        self.handler = handler
        self._valve = valve
        self._marks = marks
        self._account = account
        self._name = handler.name.encode()
        self._subject = _subject(handler)
        self._timeout = timeout
        self._gate = gate
        self._threads, self._processes = pools
        self._moves = moves
        self._mistakes = mistakes
        self._count = outcomes
        self._takes_client = ARGUMENTS[handler.kind][0][:1] == ("client",)
        self._answer = maker(handler.kind)
        self._never_waits = handler.run == "loop" and gate is None and never_waits(handler.function)
        self._always_immediate = self._never_waits and valve.wide_open
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> int:
        """How many calls have begun and wait for something."""
        return len(self._tasks)

    @property
    def is_immediate(self) -> bool:
        """Whether `call_now` may be called: the handler waits for nothing, and no limit holds it back."""
        return self._always_immediate or (self._never_waits and self._valve.open)

    def call_now(self, *args: Any) -> Any:
        """As calling it, without a coroutine, for a handler that `is_immediate`. It runs in a context of its own."""
        if self._takes_client:
            args = (ThreadSafeClient(args[0], self._threads.reactor, self._valve.is_pressed), *args[1:])
        try:
            # No throttle: of a handler that never waits only one call runs at a time.
            result = copy_context().run(self._at_once, args[self.handler.taken])
        except BaseException as error:
            self._count_failure(error)
            raise
        self._count("ok")
        return result

    async def __call__(self, *args: Any) -> Any:
        """Call it for a client, with all the arguments of its kind. Raises ClientError and Disconnect alone.

        A mistake of the handler, a time-out and a full pool are all the temporary error 100 to a client, and what the
        worker refuses under pressure is the temporary error 111.
        """
        try:
            return await self.perform(*args)
        except (HandlerTimeout, PoolFull):
            raise ClientError(*INTERNAL_ERROR) from None
        except Overloaded:
            raise ClientError(*TOO_MANY_REQUESTS) from None

    async def perform(self, *args: Any, timeout: float | None = None) -> Any:
        """The same for other callers, who get HandlerTimeout, PoolFull and Overloaded as such.

        Cancelling the caller cancels the handler, unless its answer is to be kept. timeout: in place of the declared
        one.
        """
        if self._takes_client:
            args = (ThreadSafeClient(args[0], self._threads.reactor, self._valve.is_pressed), *args[1:])
        args = args[self.handler.taken]
        limit = self._timeout if timeout is None else timeout
        if self._valve.open:
            return await self._compute(args, limit)
        try:
            may_compute = self._valve.admit(args)
            if self.handler.cache is None:
                return await self._compute(args, limit)
            # The computation is not this caller's alone, and is driven by a plain task.
            return await self.handler.cache.call(
                lambda: await_deferreds(self._compute(args, limit)), args, None, may_compute
            )
        except NothingCached:
            raise self._valve.refusal() from None
        except (RealtimeError, asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:  # of the policy, or of the cache's key or tags
            self._count("error")
            self._mistakes.report(self.handler, error)
            raise ClientError(*INTERNAL_ERROR) from error

    async def _compute(self, args: tuple[Any, ...], timeout: float) -> Any:
        """Call the handler, and count how that ended."""
        self._valve.throttle.enter()
        try:
            if self._never_waits:
                result = self._at_once(args)
            else:
                task = eager_task(self._in_its_place(args))
                if not task.done():
                    await self._wait(task, timeout)
                result = _result(task)
        except BaseException as error:
            self._count_failure(error)
            raise
        finally:
            self._valve.throttle.leave()
        self._count("ok")
        return result

    def _count_failure(self, error: BaseException) -> None:
        """Count what a call ended with. Raises ClientError 100 in place of what is not for callers to know."""
        for kinds, outcome in _OUTCOMES:
            if isinstance(error, kinds):
                self._count(outcome)
                return
        if isinstance(error, EngineUnavailable):
            self._count("unavailable")
        else:
            self._count("error")
            self._mistakes.report(self.handler, error)
        raise ClientError(*INTERNAL_ERROR) from error

    async def _wait(self, task: asyncio.Task[Any], timeout: float) -> None:
        """Wait for a handler's task, by the deadline. It may go on for longer when it does not heed cancellation."""
        # A Deferred, since every kind of caller can await one (a plain asyncio Task by way of `await_deferreds`).
        outcome: Deferred[None] = Deferred()

        def ended(task: asyncio.Task[Any]) -> None:
            if not outcome.called:
                outcome.callback(None)
            elif not task.cancelled() and (error := task.exception()) is not None:
                self._mistakes.report(self.handler, error)

        def expire() -> None:
            task.cancel()
            outcome.errback(HandlerTimeout(f"{self.handler.name} did not finish within {timeout:g} s"))

        self._tasks.add(task)  # the loop itself refers to a waiting task but weakly
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(ended)
        timer = self._threads.reactor.callLater(timeout, expire) if timeout else None
        try:
            await outcome
        except (CancelledError, asyncio.CancelledError):
            task.cancel()
            raise asyncio.CancelledError from None
        finally:
            if timer is not None and timer.active():
                timer.cancel()

    def _in_its_place(self, args: tuple[Any, ...]) -> Coroutine[Any, Any, Any]:
        match self._moves.where if self._moves else self.handler.run:
            case "loop":
                return self._on_loop(args)
            case "process":
                return self._in_process(args)
        return self._in_thread(args)

    def _at_once(self, args: tuple[Any, ...]) -> Any:
        """Run a coroutine that never waits."""
        outer = self._marks.enter((self._name, self._subject(args)), self._account)
        try:
            self.handler.function(*args).send(None)
        except StopIteration as stop:
            return self._answer(stop.value)
        except (SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:  # nobody has cancelled it
            raise RuntimeError(f"the handler raised {type(error).__name__}") from error
        finally:
            self._marks.leave(outer)

    async def _on_loop(self, args: tuple[Any, ...]) -> Any:
        if self._gate is not None:
            await self._gate.enter()
        try:
            names = self._name, self._subject(args)
            outer = self._marks.enter(names, self._account)
            try:
                if self._moves:
                    result = self._moves.timed("loop", plain_result, self.handler, args)
                else:
                    result = self.handler.function(*args)
                if not inspect.iscoroutine(result):
                    if not hasattr(result, "__await__"):
                        return self._answer(result)
                    result = _awaiting(result)  # a Deferred, from a function under inlineCallbacks for one
                try:
                    awaited = result.send(None)
                except StopIteration as stop:
                    return self._answer(stop.value)
            finally:
                self._marks.leave(outer)
            marked = partial(_marked, self._marks, names, self._account)
            return marked(self._answer, await await_deferreds(_Marked(marked, result), awaited))
        except (SystemExit, KeyboardInterrupt) as error:
            # asyncio would end the whole process.
            raise RuntimeError(f"the handler raised {type(error).__name__}") from error
        finally:
            if self._gate is not None:
                self._gate.leave()

    async def _in_thread(self, args: tuple[Any, ...]) -> Any:
        if self._gate is not None:
            await self._gate.enter()
        return await self._threads.call(self._work, args, self._gate)

    def _work(self, *args: Any) -> Any:
        if self._moves:
            return self._answer(self._moves.timed("thread", plain_result, self.handler, args))
        return self._answer(plain_result(self.handler, args))

    async def _in_process(self, args: tuple[Any, ...]) -> Any:
        assert self._processes is not None, "a worker without processes"
        if self._gate is not None:
            await self._gate.enter()
        return await self._processes.call(self.handler, args, self._gate)


# The errors that callers get as they are, and what they count as.
_OUTCOMES: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((ClientError, Disconnect), "refused"),
    ((HandlerTimeout,), "timeout"),
    ((PoolFull,), "full"),
    ((asyncio.CancelledError, GeneratorExit), "cancelled"),
)


class AdmissionPolicy:
    """Who is let through to one handler, by its declared policy, while the worker or the handler has too much to do.

    wide_open: whether it is `open` whatever happens.
    """

    def __init__(self, handler: Handler, pressure: PressureReading, throttle: Throttle, metrics: Metrics) -> None:
        self.throttle = throttle
        self._handler = handler
        self._pressure = pressure
        self._metrics = metrics
        self._counters: dict[str, Counter] = {}
        self.wide_open = handler.cache is None and handler.pressure == "ignore"

    @property
    def open(self) -> bool:
        """Whether the handler may simply be called: nothing is kept, and nothing presses or it is not heeded."""
        return self.wide_open or (self._handler.cache is None and self._has_room)

    @property
    def _has_room(self) -> bool:
        return not self._pressure.pressed and self.throttle.admits()

    def is_pressed(self) -> bool:
        """Whether the worker is under pressure."""
        return self._pressure.pressed

    def admit(self, args: tuple[Any, ...]) -> bool:
        """Whether the handler may run; if not, it is for its cache to answer. Raises Overloaded when that is refused.

        Raises ValueError, and whatever a policy that is a function raises: the application's mistake.
        """
        if self._has_room:
            return True
        policy = self._handler.pressure
        if callable(policy):
            policy = policy(*args)
            if policy not in POLICIES:
                raise ValueError(f"a pressure policy returns one of {', '.join(POLICIES)}, not {policy!r}")
        if policy == "refuse" or (policy == "stale" and self._handler.cache is None):
            raise self.refusal()
        return policy == "ignore"

    def refusal(self) -> Overloaded:
        """What to raise for a call that is refused. Counts it."""
        why = next(iter(self._pressure.reasons), "lag")  # of this handler
        counter = self._counters.get(why)
        if counter is None:
            counter = self._counters[why] = shed(self._metrics, self._handler.kind, why)
        counter.value += 1
        return Overloaded(f"{self._handler.name} is refused: {why}")


def shed(metrics: Metrics, kind: str, reason: str) -> Counter:
    """Return the counter of calls refused under pressure. kind: the kind of handler, or "handshake"."""
    return metrics.counter("realtime_shed_requests", "Refused because of pressure.", kind=kind, reason=reason)


# -- which handler runs ------------------------------------------------------------------------------------------------


def _marked(
    marks: Marker, names: tuple[bytes, bytes], account: LoopAccount, function: Callable[..., Any], *args: Any
) -> Any:
    outer = marks.enter(names, account)
    try:
        return function(*args)
    finally:
        marks.leave(outer)


class _Marked:
    """A handler's coroutine, each step of which is marked; between two steps others run."""

    __slots__ = ("_coroutine", "_marked")

    def __init__(self, marked: Callable[..., Any], coroutine: Coroutine[Any, Any, Any]) -> None:
        self._marked = marked
        self._coroutine = coroutine

    def send(self, value: Any) -> Any:
        return self._marked(self._coroutine.send, value)

    def throw(self, error: BaseException) -> Any:
        return self._marked(self._coroutine.throw, error)


def _subject(handler: Handler) -> Callable[[tuple[Any, ...]], bytes]:
    """What tells the channel or method that a call with these arguments is for, in UTF-8."""
    if handler.kind in ("on_subscribe", "on_publish"):
        return lambda args: str(args[1]).encode("utf-8", "replace")
    if handler.kind == "http":
        return lambda args: str(args[0].path).encode("utf-8", "replace")
    method = handler.name.partition(" ")[2].encode("utf-8", "replace")
    return lambda args: method


# -- tasks and threads ------------------------------------------------------------------------------------------------


def never_waits(function: Callable[..., Any]) -> bool:
    """Whether it is a coroutine function without an `await`: one step is all of it, and needs no task around it."""
    if not inspect.iscoroutinefunction(function) or not inspect.isfunction(function):
        return False
    return all(instruction.opname not in _WAITING for instruction in dis.get_instructions(function))


# What `await`, `async for`, `async with` and `yield` are compiled to.
_WAITING = {"GET_AWAITABLE", "SEND", "YIELD_VALUE", "GET_AITER", "GET_ANEXT", "BEFORE_ASYNC_WITH"}


def _result(task: asyncio.Task[Any]) -> Any:
    if task.cancelled():
        raise RuntimeError("the handler was cancelled from within")
    return task.result()


async def _awaiting(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
