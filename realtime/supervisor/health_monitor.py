"""Health monitor: polls the shared page of each process, and notifies listeners when a worker's condition changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from twisted.internet.interfaces import IDelayedCall
from twisted.logger import Logger

from realtime.config.settings import LoopSettings
from realtime.process import log
from realtime.process.periodic import PeriodicTasks
from realtime.supervision.health import (
    CHECK_INTERVAL,
    Condition,
    Health,
    HealthTracker,
    broker_beat_interval,
)
from realtime.supervision.pool import Pool
from realtime.supervision.slots import BROKER, Slot, SlotState
from realtime.supervision.vitals import Vitals

Listener = Callable[[int, Health], None]

# Seconds between two full checks while every process is ready and every worker healthy. Quick checks run in between.
FULL_CHECK_INTERVAL = 0.25

_LEAVING = (SlotState.LEAVING, SlotState.HANDING_OVER)

_log = Logger(observer=log.observer)


class MonitoredProcess(Protocol):
    """A process with vital signs."""

    @property
    def vitals(self) -> Vitals | None: ...
    def peek(self) -> tuple[int, float, int]: ...


class HealthMonitor:
    """Checks the health of every slot.

    It checks at each moment when a loop could be found lagging, and every CHECK_INTERVAL seconds while one is.

    health: health of the workers' slots by number, from the first full check on. broker: the broker's, likewise; None
    without one. listeners: called with (slot, health) after each change of a worker's condition, when `health` is
    already up to date. after_check: called after each full check, a few
    times a second while all workers are healthy. tasks: periodic tasks, run after a full check. Append to the last
    three.
    """

    def __init__(self, reactor: Any, loop: LoopSettings, pool: Pool, processes: Mapping[int, MonitoredProcess]) -> None:
        """reactor: its `seconds` must be CLOCK_MONOTONIC's. processes: the running ones by slot, a live dictionary."""
        self.health: dict[int, Health] = {}
        self.broker: Health | None = None
        self.listeners: list[Listener] = []
        self.after_check: list[Callable[[], None]] = []
        self.tasks = PeriodicTasks(_log)
        self._reactor = reactor
        self._tracker = HealthTracker(loop)
        self._broker_tracker = HealthTracker(loop, broker_beat_interval(loop))
        self._pool = pool
        self._processes = processes
        self._assessed: dict[int, MonitoredProcess | None] = {}  # by slot, at the latest check
        self._running = False
        self._checked_at = 0.0
        self._call: IDelayedCall | None = None

    def configure(self, loop: LoopSettings) -> None:
        """Use other limits of lag from now on."""
        self._tracker.configure(loop)
        self._broker_tracker.configure(loop)

    def start(self) -> None:
        """Check now, and keep checking."""
        self._running = True
        now = self._reactor.seconds()
        due = 0.0
        try:
            due = self._quick_check(now)
            if not due:
                self.check()
                self.tasks.run_due(now)
                due = min(health.due for health in self._all())
        finally:
            # Also after an exception: a mistake in one check must not end the monitoring.
            if self._running:
                self._call = self._reactor.callLater(due - now if due > now else CHECK_INTERVAL, self.start)

    def stop(self) -> None:
        """Stop checking. Idempotent."""
        self._running = False
        if self._call is not None and self._call.active():
            self._call.cancel()

    def _quick_check(self, now: float) -> float:
        """Return when to check again; 0.0: a full check is necessary now."""
        if now - self._checked_at >= FULL_CHECK_INTERVAL or not self._pool.ready:
            return 0.0
        due = math.inf
        for health in self._all():
            process = self._processes.get(health.slot)
            if process is None or health.condition is not Condition.HEALTHY:
                return 0.0
            beat, lag, busy_since = process.peek()
            if health.slot == BROKER:
                # Its page shows the lag of its latest beat for a second, which the full checks notice early enough.
                due = min(due, self._broker_tracker.quick_check(BROKER, beat, 0.0, busy_since, now))
            else:
                due = min(due, self._tracker.quick_check(health.slot, beat, lag, busy_since, now))
        return due

    def _all(self) -> Iterator[Health]:
        """The latest health of every process."""
        yield from self.health.values()
        if self.broker is not None:
            yield self.broker

    def check(self) -> None:
        """Assess every slot now, and notify the listeners."""
        now = self._checked_at = self._reactor.seconds()
        changed = []
        for slot in self._pool.workers:
            before = self.health.get(slot.number)
            process = self._processes.get(slot.number)
            if self._assessed.get(slot.number) is not process:
                self._assessed[slot.number] = process
                self._tracker.forget(slot.number)
            health = self._tracker.assess(slot.number, self._vitals(slot), now, slot.state in _LEAVING)
            self.health[slot.number] = health
            if before is None or before.condition is not health.condition:
                changed.append(health)
        if (broker := self._pool.slots.get(BROKER)) is not None:
            leaving = broker.state is SlotState.LEAVING
            self.broker = self._broker_tracker.assess(BROKER, self._vitals(broker), now, leaving)
        for health in changed:
            self._notify(health)
        for function in self.after_check:
            try:
                function()
            except Exception:
                _log.failure("a function after a health check raised; the checks go on")

    def _vitals(self, slot: Slot) -> Vitals | None:
        """Read the vital signs of a process that serves or drains."""
        process = self._processes.get(slot.number)
        return process.vitals if process is not None and slot.state in (SlotState.READY, *_LEAVING) else None

    def _notify(self, health: Health) -> None:
        for listener in self.listeners:
            try:
                listener(health.slot, health)
            except Exception:
                # A mistake in one listener must not keep the change from the others.
                _log.failure(
                    "a health listener raised on the change of worker {slot} to {condition}; the checks go on",
                    slot=health.slot,
                    condition=health.condition.value,
                )
