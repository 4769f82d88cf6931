"""The application's handlers, by the event that they are declared for: channel, method, route or lifecycle.

    session -> Dispatcher.procedure("report") -> HandlerCall, which runs the function (`realtime.handlers.call`)

The dispatcher owns what the calls share: the thread pool, the compute pool, and the start and stop of both with the
application's `on_start` and `on_stop` handlers.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.task import deferLater
from twisted.python.threadable import isInIOThread

from realtime.app import App, Patterns, Server
from realtime.app.declarations import Where
from realtime.errors import ApplicationFailed, ClientError, Disconnect, HandlerTimeout, PoolFull
from realtime.handlers.call import HandlerCall, HandlerServices
from realtime.handlers.coroutines import drive, start_future
from realtime.handlers.outcomes import HandlerErrorLog
from realtime.handlers.recurring import RecurringCall
from realtime.handlers.threads import HandlerThreads
from realtime.supervision.pressure import Throttle

# The share of a stop's time for the `finally` blocks of cancelled calls, before the `on_stop` handlers.
CANCEL_SHARE = 0.25
# Seconds between two looks at the cancelled calls.
POLL_INTERVAL = 0.02


class Dispatcher:
    """The handlers of one App, ready to be called. It implements `realtime.protocol.context.Handlers` for sessions.

    Loop thread only, except `run_coroutine`. Construct it before the loop runs or while it does; `start` it on the
    loop. threads: the pool of handlers with run="thread". procedure: returns the handler that answers calls of a
    method; call it with (client, data), for encoded JSON, bytes or None. routes: the calls by "METHOD path", see
    `route`. ledger: of the loop's time. throttles: of the handlers that may press the loop; the owner of the loop's
    heartbeat calls their `observe`.
    """

    def __init__(self, app: App, services: HandlerServices) -> None:
        self._app = app
        self._services = services
        self.ledger = services.ledger
        self._error_log = HandlerErrorLog(
            services.log, services.reactor, services.metrics, services.settings.max_error_series
        )
        self._calls: list[HandlerCall] = []
        self.threads = HandlerThreads(
            services.reactor, services.settings.threads, services.settings.thread_queue, services.lock
        )
        self.threads.register_metrics(services.metrics)
        self.connecting = self._single_call("on_connecting")
        self.connected = self._single_call("on_connected")
        self.disconnected = self._single_call("on_disconnected")
        self.message = self._single_call("on_message")
        self._subscribing = Patterns(self._make_calls("on_subscribe"))
        self._publishing = Patterns(self._make_calls("on_publish"))
        procedures = self._make_calls("rpc")
        self.procedure: Callable[[str], HandlerCall | None] = procedures.get
        self.routes = self._make_calls("http")
        self.throttles: list[Throttle] = [call.throttle for call in self._calls if call.is_throttled]
        self.has_procedures = bool(procedures)
        self._all_recurring = [RecurringCall(call, services) for call in self._make_calls("every").values()]

    def subscribing(self, channel: str) -> HandlerCall | None:
        """Return the handler that decides on subscriptions to `channel`.

        Call it with (client, channel, data); it returns a Grant or None.
        """
        return self._subscribing.find(channel)

    def publishing(self, channel: str) -> HandlerCall | None:
        """Return the handler that decides on clients' publications to `channel`.

        Call it with (client, channel, data); it returns the data to publish in place of the client's, or None.
        """
        return self._publishing.find(channel)

    def route(self, method: str, path: str) -> HandlerCall | None:
        """Return the handler that answers requests for exactly this path.

        Use its `call`, with a `realtime.app.Request`; it returns a `PreparedResponse`.
        """
        return self.routes.get(f"{method} {path}")

    @property
    def running(self) -> int:
        """The number of calls of handlers that have started and wait for something."""
        return sum(call.running for call in self._calls)

    def bind(self, server: Server) -> None:
        """Connect the App's own methods (`App.publish` and the others) to the server, here and in the processes."""
        pressure = self._services.pressure
        self._app.bind(server, self.run_coroutine, lambda: pressure.reasons, self._services.worker)
        if self._services.compute_pool is not None:
            self._services.compute_pool.bind(server)

    def run_coroutine(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine of the server on the loop: return its future there, or wait for its result in a thread."""
        if isInIOThread():
            return self._services.lock.call(start_future, coroutine, self.ledger, self._services.lock.call_on_loop)
        result: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def done(value: Any, error: BaseException | None) -> None:
            if error is None:
                result.set_result(value)
            else:
                result.set_exception(error)

        try:
            self._services.reactor.callFromThread(drive, coroutine, done, self.ledger)
        except RuntimeError:  # in a fork of the worker
            coroutine.close()
            raise
        return result.result()

    async def start(self) -> None:
        """Open the pools and run the `on_start` handlers.

        Raises ApplicationFailed with one line about the first handler that fails: this worker can't serve.
        """
        self.threads.start()
        compute_pool = self._services.compute_pool
        if compute_pool is not None and any(call.handler.run == "process" for call in self._calls):
            compute_pool.start()
        for call in self._make_calls("on_start").values():
            try:
                await call.call(timeout=0)
            except ClientError as error:
                raise ApplicationFailed(
                    f"{call.handler.place}: {call.handler.name} failed: {_first_line(error)}"
                ) from None

    def start_recurring(self, where: Where) -> None:
        """Begin the periodic functions of one kind: this worker is to run them from now on."""
        for recurring in self._recurring(where):
            recurring.start()

    def stop_recurring(self, where: Where) -> None:
        """Begin no further run of these periodic functions."""
        for recurring in self._recurring(where):
            recurring.stop()

    def give_up_recurring(self) -> None:
        """Stop the periodic functions with where="one", and cancel their runs: another worker may run them."""
        for recurring in self._recurring("one"):
            recurring.stop()
            recurring.cancel()

    def has_recurring(self, where: Where) -> bool:
        """Whether there are such periodic functions."""
        return bool(self._recurring(where))

    def is_running_once(self) -> bool:
        """Whether a periodic function with where="one" runs at the moment."""
        return any(recurring.is_running for recurring in self._recurring("one"))

    def find_term(self, find: Callable[[], int]) -> None:
        """Have `find` return the term of the periodic functions with where="one", 0 outside of one."""
        for recurring in self._recurring("one"):
            recurring.find_term = find

    def _recurring(self, where: Where) -> list[RecurringCall]:
        return [one for one in self._all_recurring if one.is_once == (where == "one")]

    async def stop_handlers(self, grace: float) -> None:
        """Cancel the calls that still run, and run the `on_stop` handlers, within about `grace` seconds."""
        reactor = self._services.reactor
        began = reactor.seconds()
        for call in self._calls:
            call.cancel_all()
        while self.running and reactor.seconds() < began + grace * CANCEL_SHARE:
            await deferLater(reactor, POLL_INTERVAL)
        for call in reversed(self._make_calls("on_stop").values()):
            seconds_left = began + grace - reactor.seconds()
            if seconds_left > 0:
                # The failure of one handler, which is logged and counted, must not keep the next from running.
                with contextlib.suppress(ClientError, Disconnect, HandlerTimeout, PoolFull):
                    await call.call(timeout=seconds_left)

    async def stop(self, grace: float) -> None:
        """Close the pools within about `grace` seconds; `stop_handlers` comes first.

        A thread that has not returned by then is left behind; it ends with the process.
        """
        reactor, compute_pool = self._services.reactor, self._services.compute_pool
        deadline = reactor.seconds() + grace
        if compute_pool is not None:
            await compute_pool.stop(max(deadline - reactor.seconds(), 0.0))
        await self.threads.stop(max(deadline - reactor.seconds(), 0.0))

    def _single_call(self, kind: str) -> HandlerCall | None:
        return next(iter(self._make_calls(kind).values()), None)

    def _make_calls(self, kind: str) -> dict[str, HandlerCall]:
        calls = {
            key: HandlerCall(handler, self._services, self.threads, self._error_log, self._app.http.errors)
            for key, handler in self._app.handlers(kind).items()
        }
        self._calls += calls.values()
        return calls


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
