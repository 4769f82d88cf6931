"""The periodic functions of one worker (`App.every`): when each of them runs next."""

from __future__ import annotations

import math
from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall

from realtime.errors import ClientError, Disconnect, EngineUnavailable, HandlerTimeout, PoolFull
from realtime.handlers.call import HandlerCall, HandlerServices
from realtime.handlers.coroutines import drive
from realtime.repetition import Repetition


class RecurringCall:
    """Calls one handler at the begins of its intervals, one run at a time.

    Runs with where="each" count their intervals from the start, those with "one" from the beginning of Unix time, so
    that all workers agree. A run needs the loop's own thread if the handler does, so a blocked loop delays it.
    is_running: whether a run is under way. find_term: returns the number of the term of where="one", 0 outside of one.
    """

    def __init__(self, call: HandlerCall, services: HandlerServices) -> None:
        schedule = call.handler.schedule
        assert schedule is not None, "a handler without a schedule"
        self.handler = call.handler
        self.is_running = False
        self.find_term: Callable[[], int] = int
        self._call = call
        self._schedule = schedule
        self._services = services
        self.is_once = schedule.where == "one"
        self._clock: Callable[[], float] = services.wall_clock if self.is_once else services.reactor.seconds
        self._origin = 0.0
        self._number = 0  # of the latest begin of an interval, counted from the origin
        self._timer: IDelayedCall | None = None
        self._is_started = False
        self._failures: Repetition[str] = Repetition()
        self._skipped = services.metrics.counter(
            "realtime_handler_runs_skipped",
            "Runs of periodic functions that were left out, as the run before them took too long.",
            handler=call.handler.name,
        )

    def start(self) -> None:
        """Begin the first interval. Idempotent."""
        if self._is_started:
            return
        self._is_started = True
        now = self._clock()
        self._origin = 0.0 if self.is_once else now
        self._number = math.floor((now - self._origin) / self._schedule.interval)
        if self.is_running:  # since before `stop`: the next run comes after the end of this one
            return
        if self._schedule.immediately:
            self._begin(self._number)
        else:
            self._wait()

    def stop(self) -> None:
        """Begin no further run. A run under way goes on; `cancel` ends it."""
        self._is_started = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def cancel(self) -> None:
        """Cancel the run that is under way; a thread goes on. Its end is logged."""
        self._call.cancel_all("was cancelled, as another worker may run it now")

    def _wait(self) -> None:
        """Wait for the next begin of an interval after now."""
        now = self._clock()
        passed = math.floor((now - self._origin) / self._schedule.interval)
        if passed < self._number - 1:  # the clock was set back
            self._number = passed
        number = max(passed, self._number) + 1
        self._skipped.value += number - self._number - 1
        delay = max(self._origin + number * self._schedule.interval - now, 0.0)
        self._timer = self._services.reactor.callLater(delay, self._begin, number)

    def _begin(self, number: int) -> None:
        self._timer, self._number, self.is_running = None, number, True
        drive(self._run(), self._ended, self._services.ledger)

    async def _run(self) -> None:
        lock = self._services.lock
        if lock.is_relieving and self.handler.run not in ("thread", "process"):
            await lock.back_on_loop()
        # The wait may have taken longer than the term.
        term = self.find_term()
        if self._is_started and (term or not self.is_once):
            await self._call.call(term)

    def _ended(self, result: object, error: BaseException | None) -> None:
        self.is_running = False
        self._report(error)
        if self._is_started:
            self._wait()

    def _report(self, error: BaseException | None) -> None:
        """Log a failure that `HandlerCall` leaves to its caller."""
        if isinstance(error, ClientError) and not isinstance(error.__cause__, (EngineUnavailable, type(None))):
            return  # it has logged the cause
        if isinstance(error, ClientError | Disconnect | PoolFull) or (
            isinstance(error, HandlerTimeout) and self._is_started
        ):
            self._warn(str(error.__cause__ or error))

    def _warn(self, reason: str) -> None:
        left_out = self._failures.admit(reason, self._services.reactor.seconds())
        if left_out is not None:
            self._services.log.warn(
                "{name} at {place} failed: {reason}{times}; its next run comes all the same",
                name=self.handler.name,
                place=self.handler.place,
                reason=reason,
                times=f" ({left_out} more like it in the minute before)" if left_out else "",
            )
