"""Threads for the handlers: their own pool, a bounded queue before it, and the way back to the loop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

from twisted.internet.defer import Deferred, TimeoutError
from twisted.internet.threads import blockingCallFromThread, deferToThreadPool
from twisted.python.threadable import isInIOThread
from twisted.python.threadpool import ThreadPool

from realtime.app import Client
from realtime.errors import FORCE_DISCONNECT, Disconnect, PoolFull
from realtime.handlers.coroutines import settle
from realtime.metrics import Metrics
from realtime.types import Grant

Result = TypeVar("Result")


class BoundedSemaphore:
    """At most `places` are inside at a time; at most `queue` more wait for a place, in order of arrival."""

    def __init__(self, places: int, queue: int) -> None:
        self._places = places
        self._queue = queue
        self._waiting: dict[asyncio.Future[None], None] = {}
        self.inside = 0

    @property
    def waiting(self) -> int:
        """How many wait now."""
        return len(self._waiting)

    async def enter(self) -> None:
        """Take a place, waiting for one if need be; raises PoolFull at once when too many wait. Then `leave` is due."""
        if self.inside < self._places:
            self.inside += 1
            return
        if len(self._waiting) >= self._queue:
            raise PoolFull("every place is taken, and so is every place in the queue")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[turn] = None
        try:
            await turn
        except BaseException:
            if turn.done() and not turn.cancelled():
                self.leave()  # the turn came in the moment of giving up
            raise
        finally:
            self._waiting.pop(turn, None)

    def leave(self) -> None:
        """Give the place to whoever waits longest."""
        self.inside -= 1
        for turn in self._waiting:
            if not turn.done():
                self.inside += 1
                turn.set_result(None)
                return


class DaemonPool(ThreadPool):
    """A pool whose threads do not hold up the end of the process."""

    threadFactory = partial(threading.Thread, daemon=True)  # type: ignore[assignment]


class HandlerThreads:
    """The threads of the handlers, and the bounded queue before them (Twisted's own has no bound).

    A thread whose caller has given up is *overdue*: it can't be stopped, and keeps its place until it returns.
    """

    def __init__(self, reactor: Any, size: int, queue: int) -> None:
        self.reactor = reactor
        self._gate = BoundedSemaphore(size, queue)
        self._pool = DaemonPool(0, size, "handlers")
        self._overdue = 0

    def measure(self, metrics: Metrics) -> None:
        """Show the pool's depth in the metrics."""
        metrics.gauge("realtime_handler_threads_busy", "Handler threads at work.", lambda: self.busy)
        metrics.gauge("realtime_handler_threads_waiting", "Calls that wait for a thread.", lambda: self.waiting)
        metrics.gauge("realtime_handler_threads_overdue", "Threads that run past their time.", lambda: self._overdue)

    @property
    def busy(self) -> int:
        """Threads at work."""
        return self._gate.inside

    @property
    def waiting(self) -> int:
        """Calls that wait for a thread."""
        return self._gate.waiting

    def start(self) -> None:
        """Be ready for calls."""
        self._pool.start()

    async def stop(self, grace: float) -> None:
        """End the idle threads, and wait for the others for `grace` seconds at most."""
        ended: Deferred[None] = Deferred()

        def close() -> None:
            self._pool.stop()  # joins every thread
            self.reactor.callFromThread(ended.callback, None)

        threading.Thread(target=close, name="handlers-stop", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await ended.addTimeout(grace, self.reactor)

    async def call(
        self, function: Callable[..., Result], args: tuple[Any, ...], also: BoundedSemaphore | None = None
    ) -> Result:
        """Call `function` in a thread, in a copy of the caller's context, and return or raise what it does.

        also: another gate that the caller has entered; it is left together with the pool's own. Raises PoolFull.
        """
        try:
            await self._gate.enter()
        except BaseException:
            if also is not None:
                also.leave()
            raise
        outcome: asyncio.Future[Result] = asyncio.get_running_loop().create_future()

        def returned(result: tuple[Any, BaseException | None]) -> None:
            self._gate.leave()
            if also is not None:
                also.leave()
            if outcome.cancelled():
                self._overdue -= 1
            settle(outcome, *result)

        work = deferToThreadPool(self.reactor, self._pool, copy_context().run, _caught, function, args)
        work.addCallback(returned)
        try:
            return await outcome
        except asyncio.CancelledError:
            if outcome.cancelled():
                self._overdue += 1
            raise


class ThreadSafeClient:
    """A `realtime.app.Client` that may be used in any thread: what touches the session is done on the loop."""

    __slots__ = ("_client", "_pressed", "_reactor")

    def __init__(self, client: Client, reactor: Any, pressed: Callable[[], bool]) -> None:
        """pressed: whether this worker is under pressure, for any thread to ask."""
        self._client = client
        self._reactor = reactor
        self._pressed = pressed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ThreadSafeClient) and self._client is other._client

    def __hash__(self) -> int:
        return hash(self._client)

    def __repr__(self) -> str:
        return f"<Client {self.id} of user {self.user!r}>"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def cache_key(self) -> str:
        """Cached answers are shared by the connections of one user, and by nobody else."""
        return self._client.user

    @property
    def under_pressure(self) -> bool:
        return self._pressed()

    @property
    def channels(self) -> frozenset[str]:
        return self._on_loop(lambda: frozenset(self._client.channels))

    def send(self, data: Any) -> None:
        self._on_loop(lambda: self._client.send(data))

    def subscribe(self, channel: str, grant: Grant | None = None) -> None:
        self._on_loop(lambda: self._client.subscribe(channel, grant))

    def refresh(self, expire_at: int | None = None, info: Any = None) -> None:
        self._on_loop(lambda: self._client.refresh(expire_at, info))

    def unsubscribe(self, channel: str) -> None:
        self._on_loop(lambda: self._client.unsubscribe(channel))

    def disconnect(self, code: int = FORCE_DISCONNECT[0], reason: str = FORCE_DISCONNECT[1]) -> None:
        Disconnect(code, reason)  # refuses what can't be sent, here in the handler
        self._on_loop(lambda: self._client.disconnect(code, reason))

    def _on_loop(self, function: Callable[[], Result]) -> Result:
        return function() if isInIOThread() else blockingCallFromThread(self._reactor, function)


def _caught(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, BaseException | None]:
    """Whatever a thread's function returns or raises, as a value; what would end the loop or an `await` is wrapped."""
    try:
        return function(*args), None
    except (StopIteration, SystemExit, KeyboardInterrupt) as error:
        wrapped = RuntimeError(f"the handler raised {type(error).__name__}")
        wrapped.__cause__ = error
        return None, wrapped.with_traceback(error.__traceback__)
    except BaseException as error:
        return None, error
