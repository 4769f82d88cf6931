"""Calls one handler: where and when it runs, for how long its caller waits, and which exceptions the caller gets.

    HandlerCall(...) -> admission policy -> cache, if any -> Task -> the coroutine, on the loop
                                                                  `> semaphore -> thread pool  -> the function
                                                                  `> semaphore -> compute pool -> the function

Every call ends in time, whatever the handler does: with a result, or with one of the exceptions that `HandlerCall`
names. The handler's place may stay taken for longer, since a thread can't be stopped (a process is killed); such
threads are bounded and counted. An exception that the handler did not mean for its caller is logged once with its
traceback, and the caller gets ClientError 100 in its place.
"""

from __future__ import annotations

import asyncio
import dis
import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from types import MappingProxyType
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger

from realtime.app import ARGUMENTS, Handler
from realtime.cache import Entry, NothingCached
from realtime.client_log import ClientLog
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
)
from realtime.handlers.compute_pool import ComputePool
from realtime.handlers.coroutines import CoroutineDriver, await_deferreds, drive, eager_task
from realtime.handlers.error_answers import Answers, ErrorAnswer, with_answers
from realtime.handlers.marking import ChargingMarker, MarkedCoroutine, Marker, call_marked, names_reader
from realtime.handlers.outcomes import HandlerErrorLog, OutcomeCounters
from realtime.handlers.placement import PlacementTracker
from realtime.handlers.policy import NO_PRESSURE, AdmissionPolicy, PressureReading
from realtime.handlers.results import call_plain_function, result_converter
from realtime.handlers.threads import BoundedSemaphore, HandlerThreads, ThreadSafeClient
from realtime.metrics import Metrics
from realtime.process.server_lock import ServerLock
from realtime.supervision.loop_time import LoopTimeLedger, LoopWork
from realtime.supervision.pressure import Throttle
from realtime.types import WorkerInfo


def _monotonic_ledger() -> LoopTimeLedger:
    return LoopTimeLedger(time.monotonic_ns)


@dataclass(frozen=True, slots=True)
class HandlerServices:
    """The collaborators and settings that all handlers of a worker share.

    reactor: IReactorTime and IReactorFromThreads, on the asyncio loop. ledger: of the loop's time; each handler gets an
    account in it. marker: records the handler that runs, and charges its account in `ledger`; None to charge only.
    pressure: decides, together with each handler's policy, which calls are refused. compute_pool: not started yet, for
    handlers with run="process". slow_call: seconds on the loop that are too long for a handler with run="auto".
    client_log: of calls that are refused, or not answered in time. lock: see `realtime.process.server_lock`.
    worker: see `App.worker`. wall_clock: Unix time.
    """

    reactor: Any
    settings: WorkersSettings
    metrics: Metrics
    log: Logger
    ledger: LoopTimeLedger = field(default_factory=_monotonic_ledger)
    marker: Marker | None = None
    pressure: PressureReading = NO_PRESSURE
    compute_pool: ComputePool | None = None
    slow_call: float = 0.05
    client_log: ClientLog = field(default_factory=ClientLog)
    lock: ServerLock = field(default_factory=ServerLock)
    worker: WorkerInfo = field(default_factory=WorkerInfo)
    wall_clock: Callable[[], float] = time.time


class HandlerCall:
    """One handler, ready to be called for clients (call the object) and for other callers (`call`).

    For the holder of the server lock. In the relief thread, a call that needs application code on the loop waits for
    the loop's own thread.

    throttle: limits the handler's concurrent calls after it has pressed the loop; it needs the loop's beats if
    `is_throttled`.
    """

    def __init__(
        self,
        handler: Handler,
        services: HandlerServices,
        threads: HandlerThreads,
        error_log: HandlerErrorLog,
        answers: Answers = MappingProxyType({}),
    ) -> None:
        """answers: to exceptions, see `realtime.handlers.error_answers`."""
        never_waits_itself = handler.run == "loop" and never_waits(handler.function)
        handler = with_answers(handler, answers)
        settings, metrics, ledger = services.settings, services.metrics, services.ledger
        self.handler = handler
        self._threads = threads
        self._compute_pool = services.compute_pool
        self._error_log = error_log
        self._ended = OutcomeCounters(metrics, handler.name)
        self._account = ledger.open(LoopWork.HANDLER, handler.name)
        self._marker = services.marker or ChargingMarker(ledger)
        self._lock = services.lock
        # Whether no code of the application but the handler itself is part of a call.
        self._is_alone = handler.cache is None and handler.convert is None and not callable(handler.pressure)
        self._names = names_reader(handler)
        self._timeout = settings.handler_timeout if handler.timeout is None else handler.timeout
        # The handler's own limit of concurrent calls, if it has one.
        self._semaphore = BoundedSemaphore(handler.limit, settings.thread_queue) if handler.limit else None
        self.throttle = Throttle(self._account, settings.sample_calls)
        self._sample_timeout = settings.sample_timeout
        self._sample_waits = metrics.counter(
            "realtime_handler_sample_waits",
            "Calls that waited for the end of the handler's first calls in this worker.",
            handler=handler.name,
        )
        self._client_log = services.client_log
        self._policy = AdmissionPolicy(handler, services.pressure, self.throttle, metrics, self._client_log)
        self._placement: PlacementTracker | None = None
        if handler.run == "auto":
            self._placement = PlacementTracker(handler, services.slow_call, services.reactor, metrics, services.log)
        self._takes_client = ARGUMENTS[handler.kind][0][:1] == ("client",)
        # Mostly a slice, without a call of Python code.
        self._take = itemgetter(handler.taken) if handler.convert is None else handler.take
        self._convert = result_converter(handler.kind, handler.cache is not None)
        self._never_waits = never_waits_itself and self._semaphore is None
        self._is_always_immediate = self._never_waits and self._policy.admits_always
        # The loop itself holds only a weak reference to a waiting task. Values: what ends the wait of its caller.
        self._tasks: dict[asyncio.Task[Any] | CoroutineDriver, Callable[[str], None]] = {}
        self._waiting: list[Deferred[None]] = []  # calls until the first ones have ended

    @property
    def running(self) -> int:
        """The number of calls that have started and wait for something."""
        return len(self._tasks)

    def cancel_all(self, outcome: str = "did not finish before the end of the worker") -> None:
        """Cancel the calls that wait for something. Their callers get HandlerTimeout with this outcome."""
        for expire in list(self._tasks.values()):
            expire(outcome)

    @property
    def is_throttled(self) -> bool:
        """Whether `throttle` may limit the handler."""
        return self._policy.is_throttled

    @property
    def is_immediate(self) -> bool:
        """Whether `call_now` may be used: the handler never waits, and its policy admits the call directly."""
        return (
            self._is_always_immediate or (self._never_waits and self._policy.admits_directly)
        ) and not self._lock.is_relieving

    def call_now(self, *args: Any) -> Any:
        """Call a handler that `is_immediate` for a client, without a coroutine, and return its result.

        Raises the exceptions that awaiting the call would raise. The handler runs in a context of its own.
        """
        if self._takes_client:
            args = (ThreadSafeClient(args[0], self._threads.call_server, self._policy.is_under_pressure), *args[1:])
        try:
            # Without the throttle: only one call runs at a time of a handler that never waits.
            result = copy_context().run(self._run_immediately, self._take(args))
        except BaseException as error:
            self._count_failure(error)
            raise
        self._ended["ok"].value += 1
        return result

    def find_cached(self, *args: Any) -> Entry | None:
        """Return the cached answer that `call` would return at once; None if there is none, or a decision is needed."""
        cache = self.handler.cache
        if cache is None or not self._policy.may_serve_cached:
            return None
        if self._lock.is_relieving and (cache.has_own_key or self.handler.convert is not None):
            return None  # these are the application's code
        try:
            return cache.find(self._take(args))
        except Exception:  # of the key function: `call` reports it
            return None

    async def __call__(self, *args: Any) -> Any:
        """Call the handler for a client, with all the arguments of its kind. Raises ClientError and Disconnect alone.

        An unexpected exception, a timeout and a full pool become the temporary error 100; a call that is refused under
        pressure becomes the temporary error 111.
        """
        try:
            return await self.call(*args)
        except (HandlerTimeout, PoolFull):
            raise ClientError(*INTERNAL_ERROR) from None
        except Overloaded:
            raise ClientError(*TOO_MANY_REQUESTS) from None

    async def call(self, *args: Any, timeout: float | None = None) -> Any:
        """Call the handler. Raises ClientError, Disconnect, HandlerTimeout, PoolFull, Overloaded and ErrorAnswer.

        Cancelling the caller cancels the handler, unless a cache keeps its result. timeout: seconds, 0 for none, in
        place of the declared one.
        """
        if self._takes_client:
            args = (ThreadSafeClient(args[0], self._threads.call_server, self._policy.is_under_pressure), *args[1:])
        if self._lock.is_relieving and not self._leaves_loop:
            if (cached := self.find_cached(*args)) is not None:
                return cached.value
            await self._lock.back_on_loop()
        try:
            args = self._take(args)
        except ClientError as error:
            self._count_failure(error)
            raise
        limit = self._timeout if timeout is None else timeout
        if not self.throttle.is_proven and self.throttle.running >= self.throttle.sample and self.is_throttled:
            await self._wait_for_sample()
            if self._lock.is_relieving and not self._leaves_loop:
                await self._lock.back_on_loop()
        # From here on nothing waits before the first line of the application's code.
        if self._policy.admits_directly:
            return await self._compute(args, limit)
        try:
            may_compute = self._policy.admit(args)
            if self.handler.cache is None:
                return await self._compute(args, limit)
            # Other callers share the computation, so the cache runs it in a plain task, which can't await Deferreds.
            return await self.handler.cache.call(
                lambda: await_deferreds(self._compute(args, limit)), args, None, may_compute
            )
        except NothingCached:
            raise self._policy.refusal() from None
        except (RealtimeError, asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as error:  # of the policy function, or of the cache's key or tags
            self._ended["error"].value += 1
            self._report(error)
            raise ClientError(*INTERNAL_ERROR) from error

    async def _compute(self, args: tuple[Any, ...], timeout: float) -> Any:
        """Run the handler, and count how that ended."""
        self.throttle.enter()
        try:
            if self._never_waits:
                result = self._run_immediately(args)
            else:
                finished: Deferred[Any] = Deferred()
                running = self._start(finished, args)
                result = await (finished if running is None else self._wait(running, finished, timeout))
        except BaseException as error:
            self._count_failure(error)
            raise
        finally:
            self.throttle.leave()
            if self._waiting and self.throttle.is_proven:
                self._end_sample()
        self._ended["ok"].value += 1
        return result

    async def _wait_for_sample(self) -> None:
        """Wait for the end of the first calls: a handler that blocks the loop shall not do so a hundred times at once.

        The wait is short, and ends for good after `workers.sample_timeout`, since calls may take as long as they like.
        """
        turn: Deferred[None] = Deferred()
        self._sample_waits.value += 1
        self._waiting.append(turn)
        if len(self._waiting) == 1:
            self._threads.reactor.callLater(self._sample_timeout, self._end_sample)
        await turn

    def _end_sample(self) -> None:
        if not self.throttle.is_proven:
            self.throttle.measure()
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            turn.callback(None)

    def _count_failure(self, error: BaseException) -> None:
        """Count a call that raised `error`. Raises ClientError 100 unless callers may see the error itself."""
        for kinds, outcome in _OUTCOMES:
            if isinstance(error, kinds):
                self._ended[outcome].value += 1
                self._log_refusal(error)
                return
        if isinstance(error, EngineUnavailable):
            self._ended["unavailable"].value += 1
        else:
            self._ended["error"].value += 1
            self._report(error)
        raise ClientError(*INTERNAL_ERROR) from error

    def _report(self, error: BaseException) -> None:
        """Log an exception of the handler, whose text is the application's."""
        self._lock.call_on_loop(self._error_log.report, self.handler, error)

    def _log_refusal(self, error: BaseException) -> None:
        """Name the cause of a refusal for the log: the application, a time limit, or too few threads."""
        match error:
            case ClientError():  # the session of the client logs it
                error.kind = error.kind or "handler"
                return
            case Disconnect():
                error.kind = error.kind or "handler_disconnect"
                return
            case HandlerTimeout():
                kind = "handler_timeout"
            case PoolFull():
                kind = "handler_queue"
            case _:
                return
        pool, threads = self._threads, ""
        if self._place == "thread":
            threads = f" ({pool.busy} of {pool.size} threads are busy, {pool.overdue} past their time)"
            if pool.overdue == pool.size:
                kind = "threads_hang"
        name, place = self.handler.name, self.handler.place
        self._client_log.refuse(kind, handler=name, place=place, detail=error, size=pool.size, threads=threads)

    @property
    def _place(self) -> str:
        """Where the next call runs: "loop", "thread" or "process"."""
        return self._placement.place if self._placement else self.handler.run

    @property
    def _leaves_loop(self) -> bool:
        """Whether the next call runs no code of the application in the loop's thread, which may be blocked."""
        return self._is_alone and self._place != "loop"

    def _start(self, finished: Deferred[Any], args: tuple[Any, ...]) -> asyncio.Task[None] | CoroutineDriver | None:
        """Start the handler; return what runs it, None if it has ended.

        On the loop a task runs it, as asyncio's libraries need one. Threads and processes need none: while application
        code blocks the loop, no task would go on.
        """
        if self._place != "loop":
            return drive(self._run_to(finished, args), _ignore)
        task = eager_task(self._run_to(finished, args))
        return None if task.done() else task

    async def _run_to(self, finished: Deferred[Any], args: tuple[Any, ...]) -> None:
        """Run the handler, and hand on its outcome at once.

        A task itself would tell in the next turn of the loop, after all handlers that go on in this one: an answer
        would wait for them, and they may block.
        """
        try:
            result = await self._run(args)
        except (CancelledError, asyncio.CancelledError, GeneratorExit):
            if not finished.called:
                finished.errback(RuntimeError("the handler was cancelled from within"))
            raise
        except BaseException as error:
            if not finished.called:
                finished.errback(error)
            else:  # after the timeout
                self._report(error)
        else:
            if not finished.called:
                finished.callback(result)

    async def _wait(
        self, running: asyncio.Task[None] | CoroutineDriver, finished: Deferred[Any], timeout: float
    ) -> Any:
        """Return a handler's result, until the timeout. A task that ignores its cancellation goes on after that."""

        def expire(outcome: str) -> None:
            if not finished.called:
                finished.errback(HandlerTimeout(f"{self.handler.name} {outcome}"))
            self._lock.call_on_loop(running.cancel)

        self._tasks[running] = expire  # the loop itself holds only a weak reference to a waiting task
        if isinstance(running, asyncio.Task):
            running.add_done_callback(self._tasks.pop)
        late = f"did not finish within {timeout:g} s"
        timer = self._threads.reactor.callLater(timeout, expire, late) if timeout else None
        try:
            return await finished
        except (CancelledError, asyncio.CancelledError):
            self._lock.call_on_loop(running.cancel)
            raise asyncio.CancelledError from None
        finally:
            if timer is not None and timer.active():
                timer.cancel()
            if isinstance(running, CoroutineDriver):
                del self._tasks[running]

    # Where the handler runs.

    def _run(self, args: tuple[Any, ...]) -> Coroutine[Any, Any, Any]:
        match self._place:
            case "loop":
                return self._run_on_loop(args)
            case "process":
                return self._run_in_process(args)
        return self._run_in_thread(args)

    def _run_immediately(self, args: tuple[Any, ...]) -> Any:
        """Run a coroutine that never waits: its first step is all of it."""
        outer = self._marker.enter(self._names(args), self._account)
        try:
            self.handler.function(*args).send(None)
        except StopIteration as stop:
            return self._convert(stop.value)
        except (SystemExit, KeyboardInterrupt, asyncio.CancelledError) as error:  # no caller has cancelled it
            raise RuntimeError(f"the handler raised {type(error).__name__}") from error
        finally:
            self._marker.leave(outer)

    async def _run_on_loop(self, args: tuple[Any, ...]) -> Any:
        if self._semaphore is not None:
            await await_deferreds(self._semaphore.acquire())
        try:
            names = self._names(args)
            outer = self._marker.enter(names, self._account)
            try:
                if self._placement:
                    result = self._placement.measure("loop", call_plain_function, self.handler, args)
                else:
                    result = self.handler.function(*args)
                if not inspect.iscoroutine(result):
                    if not hasattr(result, "__await__"):
                        return self._convert(result)
                    result = _await(result)  # a Deferred, as a function under inlineCallbacks returns one
                try:
                    awaited = result.send(None)
                except StopIteration as stop:
                    return self._convert(stop.value)
            finally:
                self._marker.leave(outer)
            marked = partial(call_marked, self._marker, names, self._account)
            return marked(self._convert, await await_deferreds(MarkedCoroutine(marked, result), awaited))
        except (SystemExit, KeyboardInterrupt) as error:
            # In a task these would end the loop, and with it the process.
            raise RuntimeError(f"the handler raised {type(error).__name__}") from error
        finally:
            if self._semaphore is not None:
                self._semaphore.release()

    async def _run_in_thread(self, args: tuple[Any, ...]) -> Any:
        if self._semaphore is not None:
            await self._semaphore.acquire()
        return await self._threads.call(self._call_plain_function, args, self._semaphore)

    def _call_plain_function(self, *args: Any) -> Any:
        if self._placement:
            return self._convert(self._placement.measure("thread", call_plain_function, self.handler, args))
        return self._convert(call_plain_function(self.handler, args))

    async def _run_in_process(self, args: tuple[Any, ...]) -> Any:
        assert self._compute_pool is not None, "a worker without a compute pool"
        if self._semaphore is not None:
            await self._semaphore.acquire()
        return await self._compute_pool.call(self.handler, args, self._semaphore)


# The exceptions that callers get as they are, and the outcome under which each is counted.
_OUTCOMES: tuple[tuple[tuple[type[BaseException], ...], str], ...] = (
    ((ClientError, Disconnect, ErrorAnswer), "refused"),
    ((HandlerTimeout,), "timeout"),
    ((PoolFull,), "full"),
    ((asyncio.CancelledError, GeneratorExit), "cancelled"),
)


def never_waits(function: Callable[..., Any]) -> bool:
    """Return whether a function is a coroutine function without an `await`, which needs one step and no task."""
    if not inspect.iscoroutinefunction(function) or not inspect.isfunction(function):
        return False
    return all(instruction.opname not in _WAITING for instruction in dis.get_instructions(function))


# The instructions that `await`, `async for`, `async with` and `yield` compile to.
_WAITING = {"GET_AWAITABLE", "SEND", "YIELD_VALUE", "GET_AITER", "GET_ANEXT", "BEFORE_ASYNC_WITH"}


async def _await(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


def _ignore(result: Any, error: BaseException | None) -> None:
    """Take the end of `HandlerCall._run_to`, which has handed on its outcome."""
