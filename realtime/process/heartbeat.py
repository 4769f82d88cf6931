"""The pulse of a process's loop: what it writes to its vitals page, so that the supervisor sees how the loop turns.

each turn    Turns, which is the loop's selector, notes when the loop begins to work and when it idles
each beat    Pulse, a timer, writes the reading: how late the timer was, what the turns were like, what is held; while
             the loop idles, its selector nods in the midst of its wait, which is all that changes then
each call    Marks names the handler that runs
"""

from __future__ import annotations

import asyncio
import math
import selectors
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import psutil
from twisted.logger import Logger

from realtime.config.settings import LoopSettings
from realtime.metrics import Sample
from realtime.process import log
from realtime.process.periodic import PeriodicTasks
from realtime.process.selector import ReadingSelector, ReadyEvents
from realtime.supervision.loop_time import LoopAccount, LoopTimeLedger, LoopWork
from realtime.supervision.vitals import NEGLIGIBLE_LAG, ProcessState, Vitals, VitalsPage

_log = Logger(observer=log.observer)

# Seconds over which the utilization is smoothed.
_SMOOTHING = 1.0
# Nanoseconds of a turn whose exact length is kept. Less than any sensible `loop.lagging`.
_LONG = 10_000_000
# Seconds between two looks at our own memory, which cost about 20 microseconds each.
_RSS_INTERVAL = 1.0


# The counter of what each account was charged.
LOOP_SECONDS = "realtime_loop_seconds"

# A handler, and the channel or method that it is called for, in UTF-8.
Names = tuple[bytes, bytes]


class DelayedCall(Protocol):
    """A call that was scheduled."""

    def cancel(self) -> None: ...


class TimerClock(Protocol):
    """What the pulse needs of a reactor. seconds: CLOCK_MONOTONIC's."""

    def seconds(self) -> float: ...
    def callLater(self, delay: float, f: Callable[[], None]) -> DelayedCall: ...


class LoopClock:
    """The timers of the asyncio loop itself: a beat costs half of what it does by way of Twisted's."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.seconds = time.monotonic
        self.callLater = loop.call_later


class IdleBeat(Protocol):
    """A pulse that has no timer now. Times are nanoseconds. due: of the next nod. until: when there must be a turn."""

    due: float
    until: float

    def nod(self, now: int) -> bool:
        """Beat, if that is all there is to say."""

    def end(self) -> None:
        """The loop takes a turn."""


class MeasuredSelector(ReadingSelector):
    """The selector of an asyncio loop, which measures that loop.

    A loop is either inside `select` or at work, so this is the one place that sees every turn, and a turn that does not
    end too: the page says since when. idle: nanoseconds spent waiting, together. turns, callbacks: see `Vitals`. ready:
    the loop's own queue, set when there is a loop. rest: whose beats are nods while the loop idles. accounts: charged
    with the time that it is not idle.
    """

    def __init__(self, page: VitalsPage, now: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__()
        self.accounts = LoopTimeLedger(now)
        self._reading = self.accounts.open(LoopWork.PROTOCOL)
        self.idle = 0
        self.turns = 0
        self.callbacks = 0
        self.ready: Sized = ()
        self.rest: IdleBeat | None = None
        self._page = page
        self._now = now
        self._since = now()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As any selector's. About a microsecond more."""
        worked = self._now()
        if worked - self._since > _LONG:
            self._page.record_block(self._since, worked)
        if timeout is not None and timeout <= 0:  # the loop has work and only looks for more
            ready, now = self.poll(timeout), worked
            self._page.set_busy_since(now)
        else:
            ready, now = self._idle(timeout, worked)
        self._since = now
        self.turns += 1
        self.callbacks += len(ready) + len(self.ready)
        if self.rest is not None:
            self.rest.end()
        if not ready:
            return []
        before = self.accounts.switch(self._reading)
        try:
            return self.dispatch(ready)
        finally:
            self.accounts.switch(before)

    def _idle(self, timeout: float | None, now: int) -> tuple[ReadyEvents, int]:
        """Wait from `now` on, with nods in between; who is ready, and the time."""
        rest = self.rest
        if rest is not None:
            until = rest.until if timeout is None else min(rest.until, now + timeout * 1e9)
            timeout = max(0.0, min(rest.due, until) - now) / 1e9
        while True:
            self._page.set_busy_since(0)
            self.accounts.idle(now)
            began, ready = now, self.poll(timeout)
            now = self._now()
            self.accounts.wake(now)
            self.idle += now - began
            self._page.set_busy_since(now)
            if rest is None or ready or now >= until or not rest.nod(now):
                return ready, now
            timeout = (min(rest.due, until) - now) / 1e9


class HandlerMarker:
    """Says on the page which handler runs on the loop, and has it charged for its time.

    A handler may run inside another; the inner one counts.
    """

    def __init__(self, page: VitalsPage, accounts: LoopTimeLedger) -> None:
        self._page = page
        self._accounts = accounts
        self._now: Names | None = None

    def enter(self, names: Names, account: LoopAccount) -> tuple[Names | None, LoopAccount]:
        """A handler, or its next step, begins. Give what is returned to `leave`."""
        outer = self._now, self._accounts.switch(account)
        self._now = names
        self._page.mark(*names)
        return outer

    def leave(self, outer: tuple[Names | None, LoopAccount]) -> None:
        """It has returned, or waits."""
        self._now, account = outer
        self._accounts.switch(account)
        if self._now is None:
            self._page.unmark()
        else:
            self._page.mark(*self._now)


def _none() -> int:
    return 0


@dataclass(frozen=True, slots=True)
class LoadGauges:
    """Functions that return the load of a process. Each beat calls them: they must be quick and must not raise."""

    connections: Callable[[], int] = _none
    subscriptions: Callable[[], int] = _none
    queued_bytes: Callable[[], int] = _none
    threads_busy: Callable[[], int] = _none
    threads_waiting: Callable[[], int] = _none


class Heartbeat:
    """Writes the page every `interval` seconds while it runs.

    chores: done after a beat, when they are due. interval: `loop.interval`, and may
    be changed. rests: whether the selector may beat in its place while the loop idles. What an idle loop's beat costs
    is the memory that it touches, which the caches have lost meanwhile: a nod touches a tenth of what a turn does.
    """

    def __init__(
        self, page: VitalsPage, clock: TimerClock, loop: LoopSettings, turns: MeasuredSelector | None = None
    ) -> None:
        """turns: the loop's selector."""
        self._gauges = LoadGauges()
        self._on_beat: Callable[[Vitals], None] = _ignore
        self.state = ProcessState.STARTING
        self.lag = 0.0  # seconds, of the last beat
        self.utilization = 0.0  # see `Vitals`
        self.rss = 0  # bytes, at most about a second old
        self.chores = PeriodicTasks(_log)
        self.interval = loop.interval
        self.rests = False
        self.due = self.until = math.inf
        self._nodded = False
        self._page = page
        self._clock = clock
        self._turns = turns
        self._idle = 0
        self._measured = 0.0
        self._rss_due = -math.inf
        self._due = 0.0
        self._running = False
        self._call: DelayedCall | None = None
        self._process = psutil.Process()
        self._tick: Callable[[], None] = self._beat
        if turns is not None:
            self._tick = turns.accounts.charging(turns.accounts.open(LoopWork.TIMERS), self._beat)

    def observe(self, gauges: LoadGauges, on_beat: Callable[[Vitals], None] | None = None) -> None:
        """Report the load of these gauges from the next beat on. on_beat: is called with the vitals of each beat."""
        self._gauges = gauges
        self._on_beat = on_beat or _ignore

    def start(self) -> None:
        """Beat now, and go on."""
        self._running = True
        self._due = self._measured = self._clock.seconds()
        self._beat()

    def stop(self) -> None:
        """Beat no more, and say so: the loop ends. Idempotent."""
        if self._running:
            self._running = False
            if self._call is not None:
                self._call.cancel()
            self.enter(ProcessState.ENDED)

    def enter(self, state: ProcessState) -> None:
        """Say it on the page at once, not only at the next beat."""
        self.state = state
        self._write(self._clock.seconds())

    def _beat(self) -> None:
        now = self._clock.seconds()
        self._tell(now)
        self.chores.do(now)
        turn = min(self.chores.due(), self._rss_due)
        # From now, not from when it was due: a stalled loop does not make up for the beats that it missed.
        self._due = max(now, min(now + self.interval, turn))
        if self.rests and self._turns is not None:
            self.due, self.until = self._due * 1e9, turn * 1e9
            self._turns.rest = self
        else:
            self._call = self._clock.callLater(self._due - now, self._tick)

    def _tell(self, now: float) -> None:
        self.lag = max(0.0, now - self._due)
        self._measure(now)
        self._on_beat(self._write(now))

    # While it rests.

    def nod(self, now: int) -> bool:
        """Say that it beats, and no more. False: there is more to say."""
        if not self.due <= now <= self.due + NEGLIGIBLE_LAG * 1e9:
            return False
        self._page.idle_beat(now)
        self._nodded = True
        self.due = now + self.interval * 1e9
        return True

    def end(self) -> None:
        """Have the next beat by a timer. What happened while it rested is told now: others go by it in this turn."""
        assert self._turns is not None
        self._turns.rest = None
        if not self._running:
            return
        now = self._clock.seconds()
        self._due = min(self.due, self.until) / 1e9
        if self._nodded:
            self._nodded = False
            self._tell(now)
        self._call = self._clock.callLater(max(0.0, self._due - now), self._tick)

    def _measure(self, now: float) -> None:
        if now >= self._rss_due:
            self._rss_due = now + _RSS_INTERVAL
            with suppress(OSError):  # out of descriptors: the beat must go on
                self.rss = self._process.memory_info().rss
        passed = now - self._measured
        if self._turns is None or passed <= 0:
            return
        idle = self._turns.idle
        busy = min(max(1.0 - (idle - self._idle) / 1e9 / passed, 0.0), 1.0)
        # An average whose weights fall off exponentially with age, whatever the time between two measurements.
        self.utilization += (busy - self.utilization) * (1.0 - math.exp(-passed / _SMOOTHING))
        self._idle, self._measured = idle, now

    def _write(self, now: float) -> Vitals:
        turns, gauges = self._turns, self._gauges
        vitals = Vitals(
            int(now * 1e9),
            self.lag,
            gauges.connections(),
            gauges.subscriptions(),
            self.state,
            self.utilization,
            turns.turns if turns else 0,
            turns.callbacks if turns else 0,
            gauges.queued_bytes(),
            gauges.threads_busy(),
            gauges.threads_waiting(),
            self.rss,
        )
        self._page.write(vitals)
        return vitals


def loop_time(accounts: LoopTimeLedger) -> Iterator[Sample]:
    """What each account was charged, as metrics."""
    help = "Time that the process's loop has worked, by what for. Waiting is not counted, and nothing twice."
    for account in accounts:
        labels = [("kind", account.kind.value), ("name", account.name)]
        yield Sample(LOOP_SECONDS, "counter", help, labels, account.spent / 1e9)


def _ignore(_: Vitals) -> None: ...
