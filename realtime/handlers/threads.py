"""Runs handlers in threads: a thread pool of their own, a bounded queue before it, and the way back to the loop."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, TypeVar

from msgspec import Struct
from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.threads import blockingCallFromThread, deferToThreadPool
from twisted.python.threadable import isInIOThread
from twisted.python.threadpool import ThreadPool

from realtime.app import Client
from realtime.errors import FORCE_DISCONNECT, Disconnect, PoolFull
from realtime.metrics import Metrics
from realtime.process.server_lock import ServerLock
from realtime.types import Grant

Result = TypeVar("Result")


class BoundedSemaphore:
    """A semaphore with a bounded queue: `permits` holders at a time, and `queue` waiters in order of arrival.

    A waiter goes on at once, on the stack of the caller that releases: no turn of the loop is needed, which application
    code may block.
    """

    def __init__(self, permits: int, queue: int) -> None:
        self._permits = permits
        self._queue = queue
        self._waiters: dict[Deferred[None], None] = {}
        self.held = 0

    @property
    def waiting(self) -> int:
        """The number of waiters."""
        return len(self._waiters)

    async def acquire(self) -> None:
        """Take a permit, waiting for one if necessary; each must be given back with `release`.

        Raises PoolFull at once when the queue is full.
        """
        if self.held < self._permits:
            self.held += 1
            return
        if len(self._waiters) >= self._queue:
            raise PoolFull("every place is taken, and so is every place in the queue")
        waiter: Deferred[None] = Deferred()
        self._waiters[waiter] = None
        try:
            await waiter
        except BaseException:
            if waiter not in self._waiters:
                self.release()  # the permit was granted in the moment of cancellation
            raise
        finally:
            self._waiters.pop(waiter, None)

    def release(self) -> None:
        """Give a permit back; the longest waiter gets it."""
        self.held -= 1
        if self._waiters:
            waiter = next(iter(self._waiters))
            del self._waiters[waiter]
            self.held += 1
            waiter.callback(None)


class DaemonPool(ThreadPool):
    """A thread pool whose threads do not delay the end of the process."""

    # A method and not a `functools.partial`: since Python 3.14 a partial in a class body binds `self` like a function.
    @staticmethod
    def threadFactory(*args: Any, **kwargs: Any) -> threading.Thread:  # type: ignore[override]
        return threading.Thread(*args, **kwargs, daemon=True)

    def forget_unstarted(self) -> None:
        """Forget the threads that could not be started: `stop` would raise when it joins them."""
        self.threads[:] = [thread for thread in self.threads if thread.ident is not None]


class HandlerThreads:
    """The threads of one worker's handlers, and the bounded queue before them (Twisted's own queue has no bound).

    A thread is *overdue* when its caller has stopped waiting: it can't be stopped, and keeps its place in the pool
    until the handler returns.
    """

    def __init__(self, reactor: Any, size: int, queue: int, lock: ServerLock | None = None) -> None:
        """reactor: IReactorTime and IReactorFromThreads. size: threads. queue: calls that may wait for a thread."""
        self.reactor = reactor
        self._lock = lock or ServerLock()
        self.size = size
        self._semaphore = BoundedSemaphore(size, queue)
        self._pool = DaemonPool(0, size, "handlers")
        self._overdue = 0

    def register_metrics(self, metrics: Metrics) -> None:
        """Add gauges of the pool's use to `metrics`."""
        metrics.gauge("realtime_handler_threads_busy", "Handler threads at work.", lambda: self.busy)
        metrics.gauge("realtime_handler_threads_waiting", "Calls that wait for a thread.", lambda: self.waiting)
        metrics.gauge("realtime_handler_threads_overdue", "Threads that run past their time.", lambda: self.overdue)

    @property
    def busy(self) -> int:
        """The number of threads that run a handler."""
        return self._semaphore.held

    @property
    def overdue(self) -> int:
        """The number of threads that run a handler past its time."""
        return self._overdue

    @property
    def waiting(self) -> int:
        """The number of calls that wait for a thread."""
        return self._semaphore.waiting

    def start(self) -> None:
        """Start the pool; `call` may be used from now on."""
        self._pool.start()

    async def stop(self, grace: float) -> None:
        """End the idle threads, and wait for the busy ones for `grace` seconds at most."""
        closed: Deferred[None] = Deferred()

        def close() -> None:
            self._pool.stop()  # joins every thread
            self.reactor.callFromThread(closed.callback, None)

        threading.Thread(target=close, name="handlers-stop", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await closed.addTimeout(grace, self.reactor)

    def call_server(self, function: Callable[[], Result]) -> Result:
        """Call a function of the server for application code, which may run in any thread, and return its result."""
        if isInIOThread():
            return self._lock.call(function)
        return blockingCallFromThread(self.reactor, function)

    async def call(
        self, function: Callable[..., Result], args: tuple[Any, ...], held: BoundedSemaphore | None = None
    ) -> Result:
        """Call `function` in a thread, in a copy of the caller's context; return its result or raise its exception.

        held: a semaphore that the caller has acquired; it is released together with the thread. Raises PoolFull.
        """
        try:
            await self._semaphore.acquire()
        except BaseException:
            if held is not None:
                held.release()
            raise
        outcome: Deferred[Result] = Deferred()
        has_returned = False

        def returned(result: tuple[Any, BaseException | None]) -> None:
            nonlocal has_returned
            has_returned = True
            self._semaphore.release()
            if held is not None:
                held.release()
            value, error = result
            if outcome.called:
                self._overdue -= 1
            elif error is None:
                outcome.callback(value)
            else:
                outcome.errback(error)

        try:
            thread_call = deferToThreadPool(self.reactor, self._pool, copy_context().run, _capture, function, args)
        except RuntimeError as error:  # the system starts no further thread, so nothing will release the places
            self._pool.forget_unstarted()
            self._semaphore.release()
            if held is not None:
                held.release()
            raise PoolFull(f"no thread can be started: {error}") from error
        thread_call.addCallback(returned)
        try:
            return await outcome
        finally:
            if not has_returned:  # the call was cancelled
                self._overdue += 1


class ThreadSafeClient(Struct, eq=False):
    """A `realtime.app.Client` for handlers in any thread: calls that concern the session run on the loop.

    Each call of a handler makes one. call_server: see `HandlerThreads.call_server`. is_under_pressure: whether this
    worker is under pressure; may be called in any thread.
    """

    _client: Client
    _call_server: Callable[[Callable[[], Any]], Any]
    _is_under_pressure: Callable[[], bool]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ThreadSafeClient) and self._client is other._client

    def __hash__(self) -> int:
        return hash(self._client)

    def __repr__(self) -> str:
        return f"<Client {self.id} of user {self.user!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def cache_key(self) -> str:
        """Return the user id: the connections of one user share cached answers, and different users never do."""
        return self._client.user

    @property
    def under_pressure(self) -> bool:
        return self._is_under_pressure()

    @property
    def channels(self) -> frozenset[str]:
        channels: frozenset[str] = self._call_server(lambda: frozenset(self._client.channels))
        return channels

    def send(self, data: Any) -> None:
        self._call_server(lambda: self._client.send(data))

    def subscribe(self, channel: str, grant: Grant | None = None) -> None:
        self._call_server(lambda: self._client.subscribe(channel, grant))

    def refresh(self, expire_at: int | None = None, info: Any = None) -> None:
        self._call_server(lambda: self._client.refresh(expire_at, info))

    def unsubscribe(self, channel: str) -> None:
        self._call_server(lambda: self._client.unsubscribe(channel))

    def disconnect(self, code: int = FORCE_DISCONNECT[0], reason: str = FORCE_DISCONNECT[1]) -> None:
        Disconnect(code, reason)  # raises ValueError here, in the handler, for a code that can't be sent
        self._call_server(lambda: self._client.disconnect(code, reason))


def _capture(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
    """Call a function and return (result, None) or (None, error).

    StopIteration, SystemExit and KeyboardInterrupt would end an `await` or the loop; they are wrapped in RuntimeError.
    """
    try:
        return function(*args), None
    except (StopIteration, SystemExit, KeyboardInterrupt) as error:
        wrapped = RuntimeError(f"the handler raised {type(error).__name__}")
        wrapped.__cause__ = error
        return None, wrapped.with_traceback(error.__traceback__)
    except BaseException as error:
        return None, error
