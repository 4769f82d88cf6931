"""The heartbeat of a process's loop: it writes the process's vitals page, which the supervisor reads.

each turn    MeasuredSelector, the loop's selector, notes when the loop begins to work and when it idles
each beat    Heartbeat, a timer, writes a reading: the timer's lag, the loop's turns, the process's load. While the loop
             idles, the selector writes the time of the beat in the midst of its wait, since nothing else changes then
each call    HandlerMarker writes the name of the running handler
"""

from __future__ import annotations

import asyncio
import math
import selectors
import time
from collections.abc import Callable, Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
from twisted.logger import Logger

from realtime.config.settings import LoopSettings
from realtime.metrics import NONE, Sample
from realtime.process import log
from realtime.process.periodic import PeriodicTasks
from realtime.process.selector import ReadingSelector, ReadyEvents
from realtime.supervision.loop_time import LoopAccount, LoopTimeLedger, LoopWork
from realtime.supervision.vitals import NEGLIGIBLE_LAG, ProcessState, Vitals, VitalsPage

_log = Logger(observer=log.observer)

# Seconds over which the utilization is smoothed.
_SMOOTHING = 1.0
# Nanoseconds from which on the exact length of a turn is kept. Less than any sensible `loop.lagging`.
_LONG_TURN = 10_000_000
# Seconds between two readings of the process's resident memory, which cost about 20 microseconds each.
_RSS_INTERVAL = 1.0


# The counter of the time that each account of the loop was charged.
LOOP_SECONDS = "realtime_loop_seconds"

# A handler, and the channel or method of its call, in UTF-8.
HandlerNames = tuple[bytes, bytes]


class DelayedCall(Protocol):
    """A scheduled call."""

    def cancel(self) -> None: ...


class TimerClock(Protocol):
    """The part of a reactor that a heartbeat uses. seconds: CLOCK_MONOTONIC's."""

    def seconds(self) -> float: ...
    def callLater(self, delay: float, f: Callable[[], None]) -> DelayedCall: ...


class LoopClock:
    """The timers of the asyncio loop itself: a beat costs half of what it costs with Twisted's timers."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.seconds = time.monotonic
        self.callLater = loop.call_later


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


class IdleBeat(Protocol):
    """A heartbeat without a timer, driven by the selector while the loop idles.

    beat_due: CLOCK_MONOTONIC nanoseconds of the next beat. turn_due: when the loop must take a turn, for more than a
    beat.
    """

    beat_due: float
    turn_due: float

    def beat_idle(self, now: int) -> bool:
        """Write a beat. False: the loop must take a turn instead."""

    def end_idle(self) -> None:
        """Go back to a timer: the loop takes a turn."""


class MeasuredSelector(ReadingSelector):
    """The selector of an asyncio loop, which measures that loop.

    A loop is either inside `select` or at work, so this is the one place that sees every turn, and a turn that does not
    end too: the page holds since when the loop is busy. idle: nanoseconds of waiting in total. turns, callbacks: see
    `Vitals`. accounts: charged with all time that the loop does not idle. idle_beat: the heartbeat to drive while the
    loop idles; None while it has a timer.
    """

    def __init__(self, page: VitalsPage, now: Callable[[], int] = time.monotonic_ns) -> None:
        super().__init__()
        self.accounts = LoopTimeLedger(now)
        self._reading = self.accounts.open(LoopWork.PROTOCOL)
        self._timing = self.accounts.open(LoopWork.TIMERS)
        self.idle = 0
        self.turns = 0
        self.callbacks = 0
        self.idle_beat: IdleBeat | None = None
        self._callback_queue: Sized = ()
        self._loop: Any = None
        self._page = page
        self._now = now
        self._busy_since = now()

    def attach(self, loop: Any) -> None:
        """Measure this loop of asyncio, whose selector this is. The loop exists only now.

        asyncio has no public access to its queue and its timers. Without them callbacks are not counted, and each turn
        of the selector is one of asyncio.
        """
        if hasattr(loop, "_ready"):
            self._callback_queue = loop._ready
            self._loop = loop if hasattr(loop, "_scheduled") and hasattr(loop, "_stopping") else None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As any selector's. Takes about a microsecond more.

        While all ready descriptors have direct readers, and these leave nothing to do for asyncio, it goes on without a
        turn of asyncio, which would take longer than a small message does. The server's own calls and timers need none
        either.
        """
        if self._after_reading:
            self._finish_reading()
        now = self._now()
        until = math.inf if timeout is None else now + timeout * 1e9
        next_timer, timers = self._next_timer(), self.timers
        while True:
            if now - self._busy_since > _LONG_TURN:
                self._page.record_block(self._busy_since, now)
            number = len(self._next_turn)
            wake_at = now if number else min(until, timers.next_due * 1e9)
            if wake_at <= now:  # work is queued, and the loop polls for more: no idling
                ready = self.poll(0)
                self._page.set_busy_since(now)
            else:
                ready, now = self._idle(wake_at, now)
            self._busy_since = self.accounts.turn = now
            self.turns += 1
            self.callbacks += len(ready) + len(self._callback_queue)
            if self.idle_beat is not None:
                self.idle_beat.end_idle()
            has_calls = number or timers.next_due * 1e9 <= now
            if not (ready or has_calls):
                return []
            events = []
            if ready:
                before = self.accounts.switch(self._reading)
                try:
                    events = self.dispatch(ready)
                finally:
                    self.accounts.switch(before)
            if has_calls:
                before = self.accounts.switch(self._timing)
                self.run_calls(number)
                self.accounts.switch(before)
            loop = self._loop
            if events or loop is None or loop._ready or loop._stopping or self._next_timer() is not next_timer:
                return events
            now = self._now()
            if now >= until:
                return events

    def _next_timer(self) -> object:
        """Return the loop's earliest timer, None without one."""
        timers = self._loop._scheduled if self._loop is not None else ()
        return timers[0] if timers else None

    def _idle(self, until: float, now: int) -> tuple[ReadyEvents, int]:
        """Wait from `now` to `until`, with idle beats meanwhile. Returns the ready descriptors and the time."""
        idle_beat = self.idle_beat
        turn_due = until if idle_beat is None else min(until, idle_beat.turn_due)
        while True:
            wake_at = turn_due if idle_beat is None else min(idle_beat.beat_due, turn_due)
            timeout = None if wake_at == math.inf else max(0.0, wake_at - now) / 1e9
            self._page.set_busy_since(0)
            self.accounts.idle(now)
            began, ready = now, self.poll(timeout)
            now = self._now()
            self.accounts.wake(now)
            self.idle += now - began
            self._page.set_busy_since(now)
            if idle_beat is None or ready or now >= turn_due or not idle_beat.beat_idle(now):
                return ready, now


class HandlerMarker:
    """Writes the running handler and its calls in this turn to the page, and charges the handler's account.

    A handler may run inside another; the inner one counts. Each step of a coroutine counts as a call.
    """

    def __init__(self, page: VitalsPage, accounts: LoopTimeLedger) -> None:
        self._page = page
        self._accounts = accounts
        self._running: HandlerNames | None = None

    @property
    def running(self) -> HandlerNames | None:
        """The names of the handler that runs, None without one."""
        return self._running

    def enter(self, names: HandlerNames, account: LoopAccount) -> tuple[HandlerNames | None, LoopAccount]:
        """A handler, or its next step, begins. Returns the outer handler, for `leave`."""
        outer = self._running, self._accounts.enter(account)
        self._running = names
        handler, subject = names
        self._page.mark(handler, subject, account.turn, account.calls, account.spent - account.spent_before)
        return outer

    def leave(self, outer: tuple[HandlerNames | None, LoopAccount]) -> None:
        """The handler has returned, or waits."""
        self._running, account = outer
        self._accounts.switch(account)
        if self._running is None:
            self._page.unmark()
        else:
            self._page.mark(*self._running, account.turn, account.calls, account.spent - account.spent_before)


class Heartbeat:
    """Writes the page every `interval` seconds while it runs.

    tasks: run after a beat, when they are due. interval: `loop.interval`, or longer (`slow_down`). state, lag,
    utilization, rss: see `Vitals`; `rss` is at most about a second old.

    With `beats_idle` the selector beats in place of the timer while the loop idles. The cost of an idle loop's beat is
    the memory that it touches, which the caches have lost meanwhile: an idle beat touches a tenth of what a turn does.
    """

    def __init__(
        self,
        page: VitalsPage,
        clock: TimerClock,
        loop: LoopSettings,
        selector: MeasuredSelector | None = None,
        beats_idle: bool = False,
    ) -> None:
        """selector: the loop's; None for a loop that is not measured."""
        self.state = ProcessState.STARTING
        self.lag = 0.0
        self.utilization = 0.0
        self.rss = 0
        self.tasks = PeriodicTasks(_log)
        self.interval = loop.interval
        self.beat_due = self.turn_due = math.inf  # of `IdleBeat`
        self._gauges = LoadGauges()
        self._on_beat: Callable[[Vitals], None] = _ignore
        self._beats_idle = beats_idle
        self._has_beaten_idle = False
        self._page = page
        self._clock = clock
        self._selector = selector
        self._measured_idle = 0
        self._measured_at = 0.0
        self._rss_due = -math.inf
        self._due = 0.0
        self._is_running = False
        self._call: DelayedCall | None = None
        self._process = psutil.Process()
        self._tick: Callable[[], None] = self._beat
        if selector is not None:
            self._tick = selector.accounts.charging(selector.accounts.open(LoopWork.TIMERS), self._beat)

    def observe(self, gauges: LoadGauges, on_beat: Callable[[Vitals], None] | None = None) -> None:
        """Write the load of these gauges from the next beat on. on_beat: called with the vitals of each beat."""
        self._gauges = gauges
        self._on_beat = on_beat or _ignore

    def slow_down(self, interval: float) -> None:
        """Beat at most once per `interval` seconds."""
        self.interval = max(self.interval, interval)

    def start(self) -> None:
        """Beat now, and every `interval` seconds from then on."""
        self._is_running = True
        self._due = self._measured_at = self._clock.seconds()
        self._beat()

    def stop(self) -> None:
        """Stop beating and write the state ENDED. Idempotent."""
        if self._is_running:
            self._is_running = False
            if self._call is not None:
                self._call.cancel()
            self.enter(ProcessState.ENDED)

    def enter(self, state: ProcessState) -> None:
        """Change the state, and write it at once instead of with the next beat."""
        self.state = state
        now = self._clock.seconds()
        if state is ProcessState.READY:
            # The start's long steps delayed the next beat, but no client. From now on delays count.
            self.lag, self._due = 0.0, max(self._due, now)
            self._on_beat(self._write(now))
        else:
            self._write(now)

    def _beat(self) -> None:
        now = self._clock.seconds()
        self._publish(now)
        self.tasks.run_due(now)
        turn_due = min(self.tasks.next_due(), self._rss_due)
        # From now, not from the time when the beat was due: a stalled loop does not make up for missed beats.
        self._due = max(now, min(now + self.interval, turn_due))
        if self._beats_idle and self._selector is not None:
            self.beat_due, self.turn_due = self._due * 1e9, turn_due * 1e9
            self._selector.idle_beat = self
        else:
            self._call = self._clock.callLater(self._due - now, self._tick)

    def _publish(self, now: float) -> None:
        """Measure, write, and hand the reading on."""
        self.lag = max(0.0, now - self._due)
        self._measure(now)
        self._on_beat(self._write(now))

    # While the loop idles

    def beat_idle(self, now: int) -> bool:
        """Write the time of the beat alone. False, with nothing written, for a late beat: its lag must be written."""
        if not self.beat_due <= now <= self.beat_due + NEGLIGIBLE_LAG * 1e9:
            return False
        self._page.idle_beat(now)
        self._has_beaten_idle = True
        self.beat_due = now + self.interval * 1e9
        return True

    def end_idle(self) -> None:
        """Set a timer for the next beat, and write a whole reading first: code of this turn relies on it."""
        assert self._selector is not None
        self._selector.idle_beat = None
        if not self._is_running:
            return
        now = self._clock.seconds()
        self._due = min(self.beat_due, self.turn_due) / 1e9
        if self._has_beaten_idle:
            self._has_beaten_idle = False
            self._publish(now)
        self._call = self._clock.callLater(max(0.0, self._due - now), self._tick)

    def _measure(self, now: float) -> None:
        """Bring memory and utilization up to date."""
        if now >= self._rss_due:
            self._rss_due = now + _RSS_INTERVAL
            with suppress(OSError):  # without free descriptors the beat must go on
                self.rss = self._process.memory_info().rss
        passed = now - self._measured_at
        if self._selector is None or passed <= 0:
            return
        idle = self._selector.idle
        busy = min(max(1.0 - (idle - self._measured_idle) / 1e9 / passed, 0.0), 1.0)
        # An average whose weights fall off exponentially with age, whatever the time between two measurements.
        self.utilization += (busy - self.utilization) * (1.0 - math.exp(-passed / _SMOOTHING))
        self._measured_idle, self._measured_at = idle, now

    def _write(self, now: float) -> Vitals:
        gauges, selector = self._gauges, self._selector
        vitals = Vitals(
            int(now * 1e9),
            self.lag,
            gauges.connections(),
            gauges.subscriptions(),
            self.state,
            self.utilization,
            selector.turns if selector else 0,
            selector.callbacks if selector else 0,
            gauges.queued_bytes(),
            gauges.threads_busy(),
            gauges.threads_waiting(),
            self.rss,
        )
        self._page.write(vitals)
        return vitals


def loop_time(accounts: LoopTimeLedger) -> Iterator[Sample]:
    """The time that each account was charged, as metrics."""
    help = "Busy time of the process's loop by kind of work and name. Each moment is charged once; idle time is not."
    for account in accounts:
        labels = [("kind", account.kind.value), ("name", account.name or NONE)]
        yield Sample(LOOP_SECONDS, "counter", help, labels, account.spent / 1e9)


def _ignore(_: Vitals) -> None: ...
